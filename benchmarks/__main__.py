"""``python -m benchmarks cpu``, or gpu: measure one optimizer step, print a table, and write JSON, Markdown, a plot.

``python -m benchmarks after-work``, ``compare``, ``host``, ``size`` and ``tables`` have arguments of their own: see
`benchmarks.after_work`, `benchmarks.compare`, `benchmarks.host`, `benchmarks.size` and `benchmarks.figures`.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import after_work, compare, cpu, figures, growth, host, latency, plot, results, size, table
from benchmarks.cases import CASES, GROUPS, GROWTH, chosen
from benchmarks.contestant import OPTIONS, UnavailableError
from benchmarks.contestants import CPU
from benchmarks.machine import ROOT, commit, machine, versions

FORMAT = 2  # of the JSON; increased when the contents of its cases change
OUT = ROOT / "benchmarks" / "results"


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 1 if a contestant failed, 2 if nothing could be measured."""
    given = sys.argv[1:] if arguments is None else arguments
    commands = {"after-work": after_work.main, "compare": compare.main, "host": host.main, "size": size.main}
    commands["tables"] = figures.main
    if given and given[0] in commands:
        return commands[given[0]](given[1:])
    parser = _parser()
    asked = parser.parse_args(given)
    if asked.rounds is not None and asked.rounds < 1:
        parser.error("--rounds must be at least 1")
    if asked.suite == "gpu":
        return _gpu(asked, parser)
    if asked.list:
        print(_listing())
        return 0
    try:
        names = chosen(asked.case or ["default"])
    except ValueError as error:
        parser.error(str(error))
    contestants = [c for c in CPU if not asked.only or any(part in c.name for part in asked.only)]
    if not contestants:
        parser.error(f"no contestant has any of {', '.join(map(repr, asked.only))} in its name; see --list")
    # Results of some contestants must not replace those of all.
    path = None if asked.only and asked.out is None else (asked.out or OUT) / "cpu.json"
    if asked.render:
        return _render(path or OUT / "cpu.json")

    setting: dict[str, Any] = {"format": FORMAT, "machine": machine(), "versions": versions(), "options": OPTIONS}
    try:
        document = setting | {"cases": {}} if path is None else results.load(path, setting, replace=asked.replace)
    except results.ConflictError as conflict:
        print(conflict, file=sys.stderr)
        return 2
    _measure(document, names, contestants, asked.rounds, path)
    if not asked.only:
        document["latency"] = latency.measure()
    _write(path, document)
    print(table.markdown(document))
    measured = [document["growth"] if name == "growth" else document["cases"][name] for name in names]
    return int(any(part["failed"] for part in measured))


def _gpu(asked: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from benchmarks import gpu, gpu_device
    from benchmarks.gpu_contestants import GPU

    if asked.list:
        lines = [f"  {name:12} {case.title}" for name, case in gpu.CASES.items()]
        print("\n".join(["Cases:", *lines, "Contestants:", *(f"  {c.name}" for c in GPU)]))
        return 0
    unknown = [name for name in asked.case or () if name not in gpu.CASES]
    if unknown:
        parser.error(f"case must be one of {', '.join(gpu.CASES)}; got {unknown[0]!r}")
    try:
        return gpu.main(asked.case, asked.rounds, asked.only, asked.out or OUT, gpu_device.Gpu())
    except UnavailableError as error:
        print(f"nothing can be measured here: {error}", file=sys.stderr)
        return 2


def _render(path: Path) -> int:
    if not path.exists():
        print(f"no {path.name} in that folder yet", file=sys.stderr)
        return 2
    document = json.loads(path.read_text())
    if document.get("format") != FORMAT:
        print(f"{path.name} has format {document.get('format')!r}; only {FORMAT!r} is supported", file=sys.stderr)
        return 2
    _write(path, document)
    print(table.markdown(document))
    return 0


def _measure(document: dict[str, Any], names: list[str], contestants: list[Any], rounds: int | None, path: Any) -> None:
    when = {"date": datetime.now(UTC).date().isoformat(), "commit": commit()}
    reasons = cpu.absent(contestants)
    for name in names:
        if name == "growth":
            document["growth"] = when | growth.measure(GROWTH, growth.growing(contestants, reasons), rounds)
        else:
            case = CASES[name]
            measured = cpu.measure(name, case, contestants, rounds or case.rounds, reasons=reasons)
            document["cases"][name] = when | measured
        document["cases"] = {key: document["cases"][key] for key in CASES if key in document["cases"]}
        _write(path, document)  # keep the results if a later case fails


def _write(path: Path | None, document: dict[str, Any]) -> None:
    if path is None:
        return
    results.save(path, document)
    path.with_suffix(".md").write_text(table.markdown(document))
    path.with_suffix(".png").write_bytes(plot.draw(document))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("suite", choices=["cpu", "gpu"], help="the device to measure")
    parser.add_argument("--list", action="store_true", help="list cases and contestants without measuring")
    parser.add_argument(
        "--case",
        nargs="+",
        metavar="NAME",
        help="cases or groups of cases (default: the group 'default', about a quarter of an hour)",
    )
    parser.add_argument("--rounds", type=int, help="timed steps per contestant (default: depends on the case)")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="SUBSTRING",
        help="only contestants whose name contains one of these; files are then written only with --out",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of cpu.json, cpu.md and cpu.png (default: benchmarks/results)"
    )
    parser.add_argument("--replace", action="store_true", help="start a new cpu.json instead of adding cases to it")
    parser.add_argument("--render", action="store_true", help="render and print cpu.json again without measuring")
    return parser


def _listing() -> str:
    lines = ["Cases:"]
    for name, case in CASES.items():
        sizes = case.sizes
        lines.append(f"  {name:12} {case.title}, arrays: {len(sizes):,}, parameters: {sum(sizes):,}")
    lines += ["Groups of cases:", *(f"  {name:12} {', '.join(members)}" for name, members in GROUPS.items())]
    return "\n".join([*lines, "Contestants:", *(f"  {c.name} [{c.kind}, computes {c.rule}'s step]" for c in CPU)])


if __name__ == "__main__":
    sys.exit(main())
