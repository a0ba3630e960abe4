"""Scripts of this folder in processes of their own, where the CPU is several devices: JAX settles that as it starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from threading import Timer
from typing import Any

LIMIT = 300.0  # seconds, after which processes that wait for each other are ended


def printed_by(script: str, devices: int, arguments: Sequence[Sequence[str]] = ((),)) -> list[Any]:
    """Run a script once for each entry of `arguments`, all at a time; return the JSON that each prints on a line."""
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
    }
    command = [sys.executable, "-W", "error", str(Path(__file__).parent / script)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([*command, *own], env=environment, **pipes) for own in arguments]

    def end() -> None:
        for process in started:
            process.kill()

    timer = Timer(LIMIT, end)
    timer.start()
    try:
        texts = [process.communicate() for process in started]
    finally:
        timer.cancel()
        end()
    assert not any(process.returncode for process in started), "\n".join(errors for _, errors in texts)
    return [json.loads(next(x for x in output.splitlines() if x.startswith("{"))) for output, _ in texts]
