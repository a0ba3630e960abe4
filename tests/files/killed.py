"""Processes that save again and again, and are killed: python killed.py PATH COUNT

Prints for each the number of the last file that it has reported, and that of the file which is there.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time

import numpy as np

from lars_array import LARS, load, save

SIZES = {"w": 60_000, "b": 1000}


def save_for_ever(path: str, number: int, pipe: int) -> None:
    """Save files of which all numbers are the same, and report each."""
    params = {name: np.zeros(size) for name, size in SIZES.items()}
    optimizer = LARS(params, lr=0.0, momentum=1.0, kernel="blocked")  # without threads, which a fork has none of
    optimizer.step({name: np.zeros_like(p) for name, p in params.items()})
    views = optimizer.state_views()
    while True:
        for name, p in params.items():
            p[...] = views[name]["momentum_buffer"][...] = number
        save(path, optimizer, params=params, metadata={"number": number})
        os.write(pipe, f"{number}\n".encode())
        number += 1


def number_of(path: str) -> int:
    """Return the number of a file, which is whole."""
    saved = load(path)
    number: int = saved.metadata["number"]
    for name, p in saved.params.items():
        for x in (p, saved.state["state"][name]["momentum_buffer"]):
            assert x.shape == (SIZES[name],) and np.all(x == number), f"{name} of {number} is of another file"
    return number


def main(path: str, count: int) -> None:
    rng, last = random.Random(0), -1
    for _ in range(count):
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            save_for_ever(path, last + 1, writer)
        os.close(writer)
        told = os.read(reader, 100)  # the first is saved
        time.sleep(rng.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while more := os.read(reader, 4096):
            told += more
        os.close(reader)
        last = number_of(path)
        print(int(told.split()[-1]), last)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
