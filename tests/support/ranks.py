"""Scripts on several processes of torch.distributed, one after the other, each of which answers in JSON.

A launch takes seconds, so a script has many cases: `run` starts it once for each number of processes, whichever test
asks first, and tests look up what their case has answered on each rank.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from filelock import FileLock

__all__ = ["answers", "serve"]

LIMIT = 240  # seconds for a script; a collective waits for at most 30
ROOT = Path(__file__).resolve().parents[2]

Answers = dict[str, list[Any]]


def answers(script: Path, processes: int, folder: Path, *, name: str = "", lost: int = 0) -> Answers:
    """Return what the cases of a script answer, by case a list over ranks; the script runs once in `folder`.

    Parameters
    ----------
    script : Path
        Calls `serve`.
    processes : int
        How many.
    folder : Path
        The same for all tests of a run, such as the parent of pytest's base temporary folder.
    name : str
        Of the run, which the script can see in the last of its arguments; by default that of the script.
    lost : int
        How many processes are killed on purpose, and answer nothing.
    """
    place = folder / f"{name or script.stem}-{processes}"
    with FileLock(f"{place}.lock"):
        if not (place / "done").exists():
            place.mkdir()
            _launch(script, processes, place, processes - lost)
            (place / "done").touch()
    ranks = [json.loads(path.read_text()) for path in sorted(place.glob("*.json"))]
    return {case: [answer[case] for answer in ranks] for case in ranks[0]}


def _launch(script: Path, processes: int, place: Path, expected: int) -> None:
    path = os.pathsep.join([str(script.parent), str(ROOT), str(ROOT / "adapters"), str(ROOT / "tests/support")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "LARS_ARRAY_THREADS": "1"}
    commands = [[sys.executable, str(script), str(rank), str(processes), str(place)] for rank in range(processes)]
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command in commands
    ]
    try:
        outputs = [process.communicate(timeout=LIMIT)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    failed = [output for process, output in zip(running, outputs, strict=True) if process.returncode]
    if len(list(place.glob("*.json"))) < expected:
        raise RuntimeError(f"{script.name} failed on {processes} processes:\n" + "\n".join(failed)[-5000:])


def serve(cases: Mapping[str, Callable[[], Any]], seconds: float = 30, *, ends: bool = True) -> None:
    """Answer all cases on this rank: what a case returns, or the error as ``{"error": type, "message": text}``.

    A collective waits for `seconds`. `ends` is False if one of the processes is lost, which no barrier would survive.
    """
    import torch
    from torch import distributed

    rank, processes, place = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    store = f"file://{place / 'store'}"
    limit = timedelta(seconds=seconds)
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=processes, timeout=limit)
    found = {}
    for name, case in cases.items():
        try:
            found[name] = case()
        except Exception as error:
            found[name] = {"error": type(error).__name__, "message": str(error), "where": traceback.format_exc()}
    (place / f"{rank}.json").write_text(json.dumps(found))
    if not ends:
        os._exit(0)
    distributed.barrier()
    distributed.destroy_process_group()
