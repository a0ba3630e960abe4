"""Fuzz `load` and `load_state_dict`, guided by coverage: python tests/fuzz/run.py CORPUS [options of libFuzzer]

Needs atheris. An empty corpus is filled with the seeds. Prints how many inputs were loaded and how many refused.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent))
READ = ["lars_array.files", "lars_array.state.checkpoint", "lars_array.hyperparams", "lars_array.schedules"]
with atheris.instrument_imports(include=READ):
    import mutations
    import targets

WORDS = [name for name in targets.HEADER if "/" in name] + [
    *("format", "version", "kind", "state_dict", "State", "param_groups", "names", "options", "previous_lr", "omitted"),
    *(
        "has_params",
        "metadata",
        "complex",
        "tuple",
        "dict",
        "float",
        "inf",
        "nan",
        "array",
        "scalar",
        "dtype",
        "float32",
    ),
    *("schedule", "warmup_cosine", "peak_lr", "steps", "state", "momentum_buffer", "master", "@w", "@h", "rule", "lr"),
    *("__metadata__", "data_offsets", "shape", "F64", "BF16", "complex64", "1e999", "18446744073709551615", "null"),
]


def mutate(data: bytes, most: int, seed: int) -> bytes:
    """Change the structure of an input, or its bytes."""
    rng = random.Random(seed)
    changed = mutations.mutated(data, rng) if rng.random() < 0.5 else None
    return atheris.Mutate(data, most) if changed is None or len(changed) > most else changed


class Counted(targets.Target):
    """Prints how many inputs were loaded and refused, since libFuzzer ends the process."""

    def __call__(self, data: bytes) -> None:
        super().__call__(data)
        self.runs = getattr(self, "runs", 0) + 1
        if self.runs % 100_000 == 0:
            print(f"{self.runs} inputs: {self.loaded} loaded, {self.refused} refused", flush=True)


def main() -> None:
    corpus = Path(sys.argv[1])
    corpus.mkdir(parents=True, exist_ok=True)
    for i, seed in enumerate(targets.seeds()):
        (corpus / f"seed{i}").write_bytes(seed)
    words = corpus.with_suffix(".dict")
    words.write_text("".join(f'"{word}"\n' for word in WORDS))
    limits = ["-timeout=10", "-rss_limit_mb=1024", "-max_len=8192", "-len_control=0"]
    atheris.Setup([*sys.argv, f"-dict={words}", *limits], Counted(), custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
