"""``python -m benchmarks cpu``: measure, print a table, and write a JSON."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks import cpu


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("suite", choices=["cpu"])
    parser.add_argument("--rounds", type=int, default=31, help="how often each contestant is timed (default: 31)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu.json"), help="where the JSON goes")
    arguments = parser.parse_args()

    result = cpu.measure(arguments.rounds)
    print(result["case"], "-", result["processor"], f"- {result['cores']} cores, {result['rounds']} rounds\n")
    print(f"{'ratio':>6} {'median':>9} {'quartiles':>15} {'fastest':>8}   ms")
    for name, row in sorted(result["contestants"].items(), key=lambda item: item[1]["ratio"]):
        quartiles = f"{row['lower_quartile_ms']:.1f} - {row['upper_quartile_ms']:.1f}"
        print(f"{row['ratio']:6.2f} {row['median_ms']:9.1f} {quartiles:>15} {row['minimum_ms']:8.1f}   {name}")
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
