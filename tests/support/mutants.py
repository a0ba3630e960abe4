"""Print the names of mutants drawn at random, for `mutmut run`: a run of all takes a day.

After a run of any mutant, which makes them all::

    make mutation ARGS="$(python tests/support/mutants.py 300 lars_array.core.)"
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path


def main() -> None:
    """Print the names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int)
    parser.add_argument("prefix", help="of the names, such as lars_array.core.")
    parser.add_argument("--but", nargs="*", default=[], help="prefixes of names that are left out")
    asked = parser.parse_args()
    metas = [json.loads(path.read_text()) for path in sorted(Path("mutants").rglob("*.meta"))]
    names = [name for meta in metas for name in meta["exit_code_by_key"] if name.startswith(asked.prefix)]
    names = [name for name in names if not name.startswith(tuple(asked.but))]
    print(*random.Random(0).sample(names, min(asked.count, len(names))))


if __name__ == "__main__":
    main()
