"""``python -m benchmarks tables``: write the figures of README.md and docs/performance.md from the results.

What stands between ``<!-- figures: NAME -->`` and ``<!-- end of figures -->`` is replaced, and nothing else.
"""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.contestants import REFERENCE
from benchmarks.host import KINDS
from benchmarks.machine import ROOT

__all__ = ["DOCUMENTS", "filled", "main"]

RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = [ROOT / "README.md", ROOT / "docs" / "performance.md"]
MARKED = re.compile(r"(?<=<!-- figures: )([a-z-]+)( -->\n).*?(?=<!-- end of figures -->)", re.DOTALL)

CPU_CASES = {
    "resnet50": "ResNet-50",
    "vit-b": "ViT-B/16",
    "alexnet": "AlexNet",
    "tiny": "10,000 arrays of 100",
}
CPU_ROWS = {
    "flat pass": "lower bound: one pass over a flat array (not LARS)",
    "torch SGD, fused": "torch's fused SGD (not LARS)",
    "lars_array compiled, nonfinite=propagate": '`lars_array`, compiled, `nonfinite="propagate"`',
    "lars_array compiled": "`lars_array`, compiled",
    "lars_array blocked": "`lars_array`, NumPy only",
    "lars_torch": "`lars_torch`",
    "lars_jax.LARS, donate=True": "`lars_jax.LARS`, eager, `donate=True`",
    "lars_jax.LARS": "`lars_jax.LARS`, eager",
    "lars_jax.lars, jax.jit, donated": "`lars_jax.lars` under `jax.jit`, donated",
    "lars_jax.lars, jax.jit": "`lars_jax.lars` under `jax.jit`",
    "timm, torch.compile": "timm under `torch.compile`",
    "timm": "timm",
    "torch_optimizer": "torch_optimizer",
    "optax, jax.jit": "optax under `jax.jit`",
    "optax, jax.jit, donated": "optax under `jax.jit`, donated",
}
AFTER_WORK_CASES = {"resnet50": "ResNet-50", "vit-b": "ViT-B/16", "tiny": "10,000 arrays of 100"}
WORKS = {
    "alone": "nothing",
    "torch": "a forward and backward pass of torch",
    "numpy": "matrix products of NumPy",
    "jax": "a jitted gradient of JAX",
}
AFTER_WORK_ROWS = {
    "tight pass": "lower bound of SGD: one pass",
    "two passes": "lower bound of LARS: two passes, layer by layer",
    "torch SGD, fused": "torch's fused SGD (not LARS)",
    "lars_array, propagate": '`lars_array`, `nonfinite="propagate"`',
    "lars_array, raise": "`lars_array`",
    "lars_torch": "`lars_torch`",
    "lars_jax.LARS, donate=True": "`lars_jax.LARS`, `donate=True`",
    "lars_jax.lars, jitted, donated": "`lars_jax.lars` under `jax.jit`, donated",
}
README_CASES = ["resnet50", "vit-b", "tiny"]
README_ROWS = [
    "torch SGD, fused",
    "lars_array compiled, nonfinite=propagate",
    "lars_torch",
    "lars_jax.lars, jax.jit, donated",
    "timm",
    "optax, jax.jit, donated",
]
GPU_CASES = {"resnet50": "ResNet-50", "vit-l": "ViT-L/16", "1b": "1.1 billion parameters"}
GPU_ROWS = {
    "torch SGD, fused": "torch's fused SGD (5 accesses per element, not LARS)",
    "lars_array, CuPy, captured in a graph": "`lars_array` on CuPy arrays, CUDA graph",
    "lars_array, CuPy": "`lars_array` on CuPy arrays",
    "lars_torch": "`lars_torch`",
    "optax, jax.jit": "optax under `jax.jit`",
    "timm, foreach": "timm, foreach",
    "timm, torch.compile": "timm under `torch.compile`",
    "torch_optimizer": "torch_optimizer",
}
HOST_ROWS = {
    "torch SGD, fused": "torch's fused SGD (not LARS)",
    "torch SGD, fused, on one element each": "torch's fused SGD, with its CPU kernel on one element of each",
    "torch SGD, foreach": "torch's foreach SGD (not LARS)",
    "lars_array, CuPy, propagate": '`lars_array` on CuPy arrays, `nonfinite="propagate"`',
    "lars_array, CuPy": "`lars_array` on CuPy arrays",
    "lars_torch": "`lars_torch`",
}


def main(arguments: list[str]) -> int:
    """Write the documents, or say which differ, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a document differs")
    only_check = parser.parse_args(arguments).check
    stale = False
    for path in DOCUMENTS:
        text = path.read_text()
        if filled(text) == text:
            continue
        stale = True
        print(f"{'differs' if only_check else 'written'}: {path.relative_to(ROOT)}")
        if not only_check:
            path.write_text(filled(text))
    return int(stale and only_check)


def filled(text: str) -> str:
    """Return a document with the figures of the results."""
    return MARKED.sub(lambda found: f"{found[1]}{found[2]}\n{FIGURES[found[1]]()}\n", text)


def _cpu_table() -> str:
    return _ratios(list(CPU_CASES), list(CPU_ROWS))


def _readme_table() -> str:
    return _ratios(README_CASES, README_ROWS)


def _ratios(cases: Sequence[str], contestants: Sequence[str]) -> str:
    """Return the ratios to flash's arithmetic, rows in the order of the first column."""
    measured = _results("cpu")["cases"]

    def ratio(case: str, name: str) -> float | None:
        row = measured[case]["contestants"].get(name)
        return None if row is None else float(row["ratio"]["median"])

    rows = sorted(contestants, key=lambda name: ratio(cases[0], name) or 0.0)
    table = [[CPU_ROWS[name], *(_short(ratio(case, name)) for case in cases)] for name in rows]
    return _table([CPU_CASES[case] for case in cases], table)


def _drift() -> str:
    """Say how far the baseline drifted, in the case where it did most."""
    cases = _results("cpu")["cases"]
    quartiles = {name: cases[name]["contestants"][REFERENCE]["quartiles_ms"] for name in CPU_CASES}
    worst = max(quartiles, key=lambda name: quartiles[name][1] / quartiles[name][0])
    low, high = quartiles[worst]
    return _paragraph(
        "Memory bandwidth on that machine drifts. Interleaving the rounds removes most of the effect, not all: for "
        f"{CPU_CASES[worst]} the quartiles of the baseline are {low:.0f} and {high:.0f} ms. *Donated* means that "
        "`jax.jit` may reuse the memory of the old parameters and state."
    )


def _gpu_table() -> str:
    results = _results("gpu-nvidia-h100-80gb-hbm3")
    cases = [results["cases"][name] for name in GPU_CASES]
    limits = [f"{_limit(results, case):.2f}" for case in cases]
    rows = [["lower bound: 7 memory accesses per element at copy bandwidth", *limits]]
    rows += [[label, *(_times(case["contestants"].get(name)) for case in cases)] for name, label in GPU_ROWS.items()]
    return _table(list(GPU_CASES.values()), rows)


def _readme_text() -> str:
    checked = _results("cpu")["cases"]["resnet50"]["contestants"]["lars_array compiled"]["ratio"]["median"]
    results = _results("gpu-nvidia-h100-80gb-hbm3")
    cases = [results["cases"][name] for name in GPU_CASES]
    to_limit = [_device(case, "lars_array, CuPy") / _limit(results, case) for case in cases]
    steps = [_results("after-work")["cases"][name]["torch"]["lars_torch"] for name in AFTER_WORK_CASES]
    after = ", ".join(_short(step["ratio"]["median"]) for step in steps)
    ours, reference = (_device(cases[0], name) for name in ("lars_array, CuPy", REFERENCE))
    return _paragraph(
        "By default `lars_array.LARS` rejects a step with a NaN or infinity before anything is written, which costs a "
        f"second pass over memory ({_short(checked)} in the first column); other implementations do not check. "
        f"On an NVIDIA H100 a step of ResNet-50 takes {ours:.2f} ms, {min(to_limit):.2f} to {max(to_limit):.2f} times "
        f"as long as its memory accesses at copy bandwidth, and of flash's arithmetic {reference:.1f} ms. "
        f"Right after a backward pass, `lars_torch` takes {after} times as long as torch's fused SGD in the three "
        "cases. [Performance](docs/performance.md) has all contestants, on the CPU "
        "and on the GPU, and how they were measured."
    )


def _after_work_table() -> str:
    """Return the milliseconds of steps after each work, with their ratio to torch's SGD after the same."""
    cases = [_results("after-work")["cases"][name] for name in AFTER_WORK_CASES]
    rows = []
    for work, label in WORKS.items():
        for name in AFTER_WORK_ROWS:
            found = [case[work].get(name) for case in cases]
            if any(found):
                cells = ["" if x is None else f"{x['median_ms']:.1f} ({_short(x['ratio']['median'])})" for x in found]
                rows.append([label, AFTER_WORK_ROWS[name], *cells])
                label = ""
    return _table(["step", *AFTER_WORK_CASES.values()], rows)


def _host_table() -> str:
    """Return the host's milliseconds of steps on a device, with their ratio to torch's SGD; then and before."""
    found, other = _results("host")["contestants"], _results("host-compare")
    compared, rows = other["comparisons"], []
    for name, label in HOST_ROWS.items():
        own = (found[name][kind] for kind in KINDS)
        cells = [f"{x['median_ms']:.2f} ({_short(x['ratio']['median'])})" for x in own]
        one = compared.get(f"host-cuda: {name}, new gradients")
        cells += ["", ""] if one is None else [_short(one[f"{who}_to_peer"]["median"]) for who in ("old", "new")]
        rows.append([label, *cells])
    return _table([*KINDS, f"in succession: ratio at {other['commits']['old'][:7]}", "ratio now"], rows)


FIGURES: dict[str, Callable[[], str]] = {
    "after-work": _after_work_table,
    "cpu": _cpu_table,
    "cpu-drift": _drift,
    "gpu": _gpu_table,
    "host": _host_table,
    "readme-table": _readme_table,
    "readme-text": _readme_text,
}


def _limit(results: dict[str, Any], case: dict[str, Any]) -> float:
    """Return the milliseconds of 7 accesses to each float32 element."""
    return float(1e3 * 4 * 7 * case["elements"] / results["copy_bytes_per_s"])


def _device(case: dict[str, Any], name: str) -> float:
    """Return the milliseconds of a contestant on the device."""
    return float(case["contestants"][name]["device"]["median_ms"])


def _times(row: dict[str, Any] | None) -> str:
    """Return device time and wall-clock time, or what there is of them."""
    if row is None:
        return ""
    times = (f"{row[clock]['median_ms']:.2f}" for clock in ("device", "host") if row[clock] is not None)
    return ",\N{NO-BREAK SPACE}".join(times)


def _short(x: float | None) -> str:
    return "" if x is None else f"{x:.3f}" if x < 0.005 else f"{x:.2f}"


def _table(columns: list[str], rows: list[list[str]]) -> str:
    """Return a table with a first column without a head."""
    lines = [["", *columns], *rows]
    shown = ["|" + "".join(f" {cell} |" if cell else " |" for cell in cells) for cells in lines]
    return "\n".join([shown[0], "|---" * len(lines[0]) + "|", *shown[1:], ""])


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 120, break_on_hyphens=False) + "\n"


def _results(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())
