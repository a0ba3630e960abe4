"""The document as Markdown."""

from __future__ import annotations

from typing import Any

__all__ = ["aligned", "digits", "markdown"]

HEAD = """# One optimizer step on a CPU

{machine}.

{versions}.

One step over float32 arrays: {options}.

Ratios are medians over rounds of the time relative to another contestant in the same round; lower is faster. The first
is relative to torch_optimizer (flash's arithmetic). The second is relative to the limit, a plain compiled loop over one
array with the same number of elements, which no LARS reaches. "First steps" is the time to build the optimizer and take
three steps, including compilation. Memory is the resident memory of the process for its steps, excluding parameters,
gradients and momentum buffers; in brackets, the memory that Python and NumPy allocate in one step. Error is the error
of the change after three steps, relative to float64, in the worst array; rounding the parameters to float32 alone gives
1e-5.
"""

DISTURBED = 0.1  # cores

COLUMNS = ["", "vs flash", "vs limit", "median ms", "quartiles ms", "first steps s", "memory MB", "error"]


def markdown(document: dict[str, Any]) -> str:
    """Return the tables of all cases, and of growth with the array size.

    Parameters
    ----------
    document : dict
        As in `benchmarks.results`.
    """
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    options = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in document["options"].items())
    parts = [HEAD.format(machine=_machine(document["machine"]), versions=versions, options=options)]
    parts += [_case(name, case) for name, case in document["cases"].items()]
    if document.get("latency"):
        parts.append(_latency(document["latency"]))
    if document.get("growth"):
        parts.append(_growth(document["growth"]))
    return "\n".join(parts)


def _machine(machine: dict[str, Any]) -> str:
    caches = ", ".join(f"{level} {size}" for level, size in machine["caches"].items())
    facts = [machine["processor"], f"{machine['cores']} cores", caches, f"{machine['memory_gib']} GiB"]
    facts += [machine["system"], f"huge pages: {machine['huge_pages']}"]
    return ", ".join([*facts, *(f"{key}={value}" for key, value in machine["environment"].items())])


def _case(name: str, case: dict[str, Any]) -> str:
    arrays = "1 array" if case["arrays"] == 1 else f"{case['arrays']:,} arrays"
    lines = [
        f"## {name}: {case['title']}, {arrays}, {case['elements']:,} parameters",
        "",
        f"{case['rounds']} rounds, {case['date']}, commit {case['commit'] or 'unknown'}."
        + _parties(case["parties"])
        + f" Other processes used {case['cores_used_by_others']:.2f} cores"
        + (", so these figures are unreliable." if case["cores_used_by_others"] > DISTURBED else "."),
        "",
        *aligned(
            COLUMNS, [_row(row) for row in sorted(case["contestants"].values(), key=lambda row: row["median_ms"])]
        ),
    ]
    for title, reasons in (("Skipped", case["skipped"]), ("Failed", case["failed"])):
        if reasons:
            lines += ["", f"{title}:", "", *_reasons(reasons)]
    return "\n".join(lines) + "\n"


def _parties(parties: list[list[str]]) -> str:
    if len(parties) == 1:
        return ""
    always = set.intersection(*map(set, parties))
    how = (
        f"In {len(parties)} groups, each with {' and '.join(sorted(always))}"
        if always
        else "Not all in the same rounds"
    )
    return f" {how}, because not all arrays fit in memory together."


def _reasons(reasons: dict[str, str]) -> list[str]:
    """Return one line per reason."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return [f"* {'; '.join(who)}: {reason}" for reason, who in names.items()]


def _row(row: dict[str, Any]) -> list[str]:
    return [
        row["label"],
        *("–" if row[key] is None else digits(row[key]["median"]) for key in ("ratio", "ratio_to_limit")),
        digits(row["median_ms"]),
        " – ".join(digits(x) for x in row["quartiles_ms"]),
        f"{row['first_steps_s']:.1f}",
        _memory(row.get("memory")),
        f"{row['error']:.0e}",
    ]


def _memory(memory: dict[str, Any] | None) -> str:
    if memory is None:
        return "–"
    if "failed" in memory:
        return str(memory["failed"])
    resident = "–" if memory["resident"] is None else f"{memory['resident'] / 1e6:,.1f}"
    return resident if memory["allocated"] is None else f"{resident} ({memory['allocated'] / 1e6:,.2f})"


def _latency(latency: dict[str, Any]) -> str:
    rows, notes = [], []
    for kernel, times in latency.items():
        if "skipped" in times:
            notes += ["", f"* {kernel}: {times['skipped']}"]
            continue
        for state in ("warm", "cold"):
            shown = (times[state][key] for key in ("import", "construct", "first_step", "second_step"))
            rows.append([f"{kernel}, {state}", *(f"{1e3 * seconds:,.1f}" for seconds in shown)])
    head = ["lars_array kernel", "import ms", "construct ms", "first step ms", "second step ms"]
    text = "In a new process with NumPy and ResNet-50's arrays loaded. Warm: with compiled code on disk. Cold: without."
    return "\n".join(["## First step", "", text, "", *aligned(head, rows), *notes]) + "\n"


def _growth(growth: dict[str, Any]) -> str:
    """Return tables of nanoseconds per element and of megabytes, with one column per size."""
    times, memories = [], []
    for row in growth["contestants"].values():
        found = list(zip(growth["sizes"], row["sizes"]))
        times.append([row["label"], *("–" if x is None else digits(1e6 * x["median_ms"] / size) for size, x in found)])
        memories.append([row["label"], *("–" if x is None else _memory(x.get("memory")) for _, x in found)])
    sizes = [f"{size:,}" for size in growth["sizes"]]
    lines = [
        "## Growth: one array",
        "",
        f"{growth['rounds']} rounds, each with all sizes of a contestant, {growth['date']}, commit "
        f"{growth['commit'] or 'unknown'}. Other processes used {growth['cores_used_by_others']:.2f} cores.",
        "",
        *aligned(["ns per element", *sizes], times),
        "",
        *aligned(["memory MB", *sizes], memories),
    ]
    if growth["failed"]:
        lines += ["", "Failed:", "", *_reasons(growth["failed"])]
    return "\n".join(lines) + "\n"


def aligned(head: list[str], rows: list[list[str]]) -> list[str]:
    """Return aligned lines, readable as plain text."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]

    def line(cells: list[str]) -> str:
        first, *rest = (cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths)))
        return "| " + " | ".join([first, *rest]) + " |"

    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return [line(head), line(rule), *map(line, rows)]


def digits(x: float) -> str:
    """Three significant digits, or all before the point."""
    return f"{x:,.0f}" if x >= 100 else f"{x:#.3g}"
