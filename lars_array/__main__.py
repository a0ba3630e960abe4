"""The command line: ``python -m lars_array``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from lars_array._version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.command == "info":
        return _info(as_json=options.json)
    return _demo(quick=options.quick, seed=options.seed, out=options.out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lars_array", description="LARS, layer-wise adaptive rate scaling, on Array API arrays."
    )
    parser.add_argument("--version", action="version", version=f"lars-array {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    summary = "Train a small network with large batches, with LARS and without."
    demo = commands.add_parser("demo", help=summary, description=summary)
    demo.add_argument("--quick", action="store_true", help="be done in seconds, with less to conclude from")
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="of data and weights (default: %(default)s)")
    demo.add_argument("--out", type=Path, default=Path("demo-output"), metavar="DIR", help="default: %(default)s")

    summary = "Show the versions, the processors and the kernels usable here."
    info = commands.add_parser("info", help=summary, description=summary)
    info.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _info(as_json: bool) -> int:
    from lars_array.info import collect, render

    if as_json:
        import json

        print(json.dumps(collect(), indent=2))
    else:
        print(render(collect()))
    return 0


def _demo(quick: bool, seed: int, out: Path) -> int:
    missing = [name for name in ("sklearn", "matplotlib", "rich") if find_spec(name) is None]
    if missing:
        print(f"The demo needs {', '.join(missing)}: pip install 'lars-array[demo]'", file=sys.stderr)
        return 2
    from lars_array.demo import main as demo

    return demo(quick=quick, seed=seed, out=out)


if __name__ == "__main__":
    sys.exit(main())
