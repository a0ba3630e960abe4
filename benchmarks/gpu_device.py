"""The GPU as the benchmark needs it: its name, its clock, and how fast it copies."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.contestant import UnavailableError

__all__ = ["Gpu"]

AHEAD = 0.02  # seconds that the device is kept busy, while the host asks for a step that is to be timed there
COPIED = 1 << 30  # bytes
COPIES = 20

SPIN = """extern "C" __global__ void spin(long long cycles) {
    long long start = clock64();
    while (clock64() - start < cycles) { }
}"""


class Gpu:
    """The current CUDA device, on the stream that CuPy and torch share if nothing is said.

    Raises
    ------
    UnavailableError
        If there is none, or no CuPy.
    """

    def __init__(self) -> None:
        try:
            import cupy
        except ImportError as error:
            raise UnavailableError(f"no CuPy: {error}") from error
        if not cupy.cuda.is_available():
            raise UnavailableError("no CUDA device")
        self._cupy, self._device = cupy, cupy.cuda.Device()
        self._spin = cupy.RawKernel(SPIN, "spin")

    def facts(self) -> dict[str, Any]:
        """Return what the figures depend on."""
        runtime, attributes = self._cupy.cuda.runtime, self._device.attributes
        name = runtime.getDeviceProperties(self._device.id)["name"]
        return {
            "name": name.decode() if isinstance(name, bytes) else str(name),
            "compute_capability": self._device.compute_capability,
            "multiprocessors": attributes["MultiProcessorCount"],
            "l2_mib": self.cache_bytes() / 2**20,
            "memory_gib": round(self._device.mem_info[1] / 2**30),
            "driver": runtime.driverGetVersion(),
            "runtime": runtime.runtimeGetVersion(),
        }

    def cache_bytes(self) -> int:
        """Return the size of the L2 cache."""
        return int(self._device.attributes["L2CacheSize"])

    def free_bytes(self) -> int:
        """Return how much memory can be had."""
        return int(self._device.mem_info[0])

    def give_back(self) -> None:
        """Give back to the device what libraries keep for later."""
        gc.collect()
        self._cupy.get_default_memory_pool().free_all_blocks()
        if "torch" in sys.modules:
            sys.modules["torch"].cuda.empty_cache()

    def synchronize(self) -> None:
        """Wait until all streams are done."""
        self._device.synchronize()

    def copy_bandwidth(self) -> float:
        """Return the bytes a second, read and written, of copies on the device: the median of several."""
        size = min(COPIED, self.free_bytes() // 4)
        source = self._cupy.ones(size, np.uint8)
        target = self._cupy.empty_like(source)
        seconds = [self.timed(lambda: self._cupy.copyto(target, source), ahead=True)[1] for _ in range(COPIES)]
        return 2 * size / float(np.median(seconds))

    def timed(self, step: Callable[[], object], *, ahead: bool) -> tuple[float, float, float]:
        """Return the seconds of a step: of the host until the device is done, of the device, of the host alone.

        Parameters
        ----------
        step : callable
            What to time.
        ahead : bool
            Whether the device has something else to do first, so that what the host takes to ask for the step does
            not show, if it is less than that. The first time is of no use then.

        Returns
        -------
        tuple (float, float, float)
            By the host's clock, until the device is done; by the device's events; and by the host's clock, until the
            call returns.
        """
        events = self._cupy.cuda.Event(), self._cupy.cuda.Event()
        self.synchronize()
        if ahead:
            self._spin((1,), (1,), (np.int64(AHEAD * 1e3 * self._device.attributes["ClockRate"]),))
        start = time.perf_counter()
        events[0].record()
        step()
        queued = time.perf_counter() - start
        events[1].record()
        self.synchronize()
        seconds = time.perf_counter() - start
        return seconds, self._cupy.cuda.get_elapsed_time(*events) / 1e3, queued
