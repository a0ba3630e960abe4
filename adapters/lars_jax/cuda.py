"""Parameters on a CUDA device: memory of JAX, seen and stepped by CuPy, and the order of what both do.

JAX knows nothing of what CuPy reads and writes. So a step is put between two of JAX's computations: CuPy's stream waits
for the first, which takes the gradients and all that may not be seen by others; JAX waits for CuPy's stream before the
second, which hands the parameters out. The host waits for neither.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lars_array.kernels.cuda_device import problem
from lars_array.roster import KEPT
from lars_jax.place import Place
from lars_jax.turns import copied, handed_over
from lars_jax.values import cuda_device, devices_of

__all__ = ["CudaPlace"]


class CudaPlace(Place):
    """See `Place`. CuPy works on the stream that is its current one, of the device where the parameters lie."""

    knows = False

    def __init__(self, device: Any, names: Sequence[str], leaves: Sequence[Any], donate: bool) -> None:
        self._cupy = _cupy(device)
        self._home = self._cupy.cuda.Device(device.local_hardware_id)
        with self._home:
            self._token = self._cupy.zeros((), np.float32)
        super().__init__(device, names, leaves, donate)

    def here(self) -> AbstractContextManager[Any]:
        """Return a context in which the device is CuPy's current one."""
        home: AbstractContextManager[Any] = self._home
        return home

    def check(self, what: str, array: Any) -> None:
        """Refuse what is no array of JAX on the device."""
        if not isinstance(array, jax.Array):
            raise TypeError(f"{what} must be an array of JAX on {self._device}, as the parameters; got one of NumPy")
        super().check(what, array)

    def _sync(self) -> None:
        self._cupy.from_dlpack(self._mark)

    def _view(self, array: Any, *, write: bool = False) -> Any:
        cupy = self._cupy
        if array.size == 0:
            return cupy.empty(array.shape, array.dtype)
        place, size = array.unsafe_buffer_pointer(), array.size * array.dtype.itemsize
        memory = cupy.cuda.UnownedMemory(place, size, None, self._home.id)
        return cupy.ndarray(array.shape, array.dtype, cupy.cuda.MemoryPointer(memory, 0))

    @contextmanager
    def numbers(self, groups: Sequence[dict[str, Any]], found_inf: Any) -> Iterator[Any]:
        """Yield `found_inf`; it, and hyper-parameters that lie on the device, are read by the device."""
        known = [dict(group) for group in groups]
        for group in groups:
            group.update({key: self._number(x) for key, x in group.items() if isinstance(x, jax.Array)})
            if callable(group["lr"]):
                group["lr"] = self._scheduled(group["lr"])
        try:
            yield self._number(found_inf)
        finally:
            for group, before in zip(groups, known):
                group.update(before)

    def _number(self, x: Any) -> Any:
        """Return an array of shape () that lies on the device as one of CuPy, and one that lies here as a number."""
        if getattr(x, "shape", None) != ():
            return x
        if not isinstance(x, jax.Array) or devices_of(x) != [self._device]:
            return x.item()
        self._given.append(x)
        return self._cupy.from_dlpack(x)

    def _scheduled(self, schedule: Any) -> Any:
        return lambda step: self._number(schedule(step))

    def _handed_out(self) -> list[Any]:
        # JAX does all that is to come once CuPy's stream has come to here, and has the gradients' memory until then.
        given = [jnp.from_dlpack(self._token, copy=False), *self._given]
        if not self._donate:
            self._mark, shown = copied(self._mark, self._own, given)
            return shown
        self._mark, self._own = handed_over(self._mark, self._own, given)
        return list(self._own)

    def outside(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return a state dict with arrays of NumPy."""
        groups = [
            {key: np.asarray(x) if isinstance(x, jax.Array) else x for key, x in group.items()}
            for group in state_dict["param_groups"]
        ]
        return {**state_dict, "param_groups": groups, "state": _converted(state_dict["state"], self._cupy.asnumpy)}

    def inside(self, state: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Mapping[str, Any]]:
        """Return the state of each parameter with arrays of CuPy on the device."""
        return _converted(state, self._cupy.asarray)

    def __setstate__(self, state: dict[str, Any]) -> None:
        device = cuda_device(state["number"])
        self.__init__(device, state["names"], state["leaves"], state["donate"])  # type: ignore[misc]


def _converted(state: Mapping[str, Mapping[str, Any]], convert: Any) -> dict[str, dict[str, Any]]:
    return {
        name: {key: convert(x) if key in KEPT and x is not None else x for key, x in own.items()}
        for name, own in state.items()
    }


def _cupy(device: Any) -> Any:
    try:
        import cupy
    except ImportError as error:
        needed = "CuPy, pip install lars-array[cuda12] or lars-array[cuda13]"
        raise ImportError(f"parameters on {device} need {needed}; or use lars_jax.lars") from error
    if reason := problem():
        raise TypeError(f"parameters on {device} can't be stepped by CuPy, use lars_jax.lars: {reason}")
    return cupy
