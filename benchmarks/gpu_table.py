"""The document of the GPU suite as Markdown."""

from __future__ import annotations

from typing import Any

__all__ = ["markdown"]

HEAD = """# One optimizer step on {name}

Compute capability {capability}, {multiprocessors} multiprocessors, {l2:g} MiB of L2 cache, {memory} GiB; CUDA driver
{driver}, runtime {runtime}. {versions}. Commit {commit}, {date}.

One step over float32 arrays: {options}. Copy bandwidth on the device is {bandwidth:.0f} GB/s, reads and writes
together. The limit is the time of 7 memory accesses per element at this bandwidth, the minimum for LARS without cache
hits.

In one launch, parameters and gradients that fit into the cache are read once: 5 accesses, 0.71 of the limit.

"Step" is wall-clock time on the host, from the call until the device is done. "Device" is the time between two events
queued behind other work, so it excludes the time of the call on the host, up to 20 ms, which is "queueing". The step is
measured apart from these two. Times are medians over rounds with all contestants in turn; ratios are medians within a
round, and lower is faster. "First steps" is the time to build the optimizer and take three steps, including
compilation. Error is the error of the change after three steps.
"""

COLUMNS = ["", "vs flash", "step ms", "quartiles ms", "device ms", "vs limit", "queueing ms", "first steps s", "error"]


def markdown(document: dict[str, Any]) -> str:
    """Return the table of each case.

    Parameters
    ----------
    document : dict
        As in `benchmarks.gpu`.
    """
    gpu, bandwidth = document["gpu"], document["copy_bytes_per_s"]
    head = HEAD.format(
        name=gpu["name"],
        capability=".".join([gpu["compute_capability"][:-1], gpu["compute_capability"][-1]]),
        multiprocessors=gpu["multiprocessors"],
        l2=gpu["l2_mib"],
        memory=gpu["memory_gib"],
        driver=gpu["driver"],
        runtime=gpu["runtime"],
        versions=", ".join(f"{name} {version}" for name, version in document["versions"].items()),
        commit=document["commit"],
        date=document["date"],
        options=", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in document["options"].items()),
        bandwidth=bandwidth / 1e9,
    )
    return "\n".join([head, *(_case(name, case, bandwidth) for name, case in document["cases"].items())])


def _case(name: str, case: dict[str, Any], bandwidth: float) -> str:
    limit = 1e3 * 4 * 7 * case["elements"] / bandwidth
    lines = [
        f"## {name}: {case['title']}, {case['arrays']:,} arrays, {case['elements']:,} parameters",
        "",
        f"{case['rounds']} rounds, {'interleaved' if case['interleaved'] else 'one contestant after the other'}. "
        f"Limit {limit:.3f} ms.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|---|{'---:|' * (len(COLUMNS) - 1)}",
    ]
    rows = sorted(case["contestants"].values(), key=lambda row: row["host"]["median_ms"])
    lines += [f"| {' | '.join(_cells(row, limit))} |" for row in rows]
    for what in ("skipped", "failed"):
        lines += ["", *(f"* {who}: {what}: {reason}" for who, reason in case[what].items())] if case[what] else []
    return "\n".join([*lines, ""])


def _cells(row: dict[str, Any], limit: float) -> list[str]:
    host, device = row["host"], row["device"]
    low, high = host["quartiles_ms"]
    return [
        row["label"],
        "" if row["ratio"] is None else f"{row['ratio']['median']:.3f}",
        f"{host['median_ms']:.3f}",
        f"{low:.3f} to {high:.3f}",
        "" if device is None else f"{device['median_ms']:.3f}",
        "" if device is None else f"{device['median_ms'] / limit:.2f}",
        "" if row.get("queued") is None else f"{row['queued']['median_ms']:.3f}",
        f"{row['first_steps_s']:.1f}",
        "not checked" if row["error"] is None else f"{row['error']:.0e}",
    ]
