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
from lars_jax.turns import copied, handed_over, waited_for
from lars_jax.values import cuda_device, devices_of

__all__ = ["CudaPlace"]


class CudaPlace:
    """See `lars_jax.places.Place`. The memory is that of arrays of JAX that nobody else holds.

    With `donate` these arrays are handed out after a step, and taken back by the next; else copies are.

    Parameters
    ----------
    device : jax.Device
        Where the parameters lie.
    names : sequence of str
        For messages.
    leaves : sequence of arrays
        Copied.
    donate : bool
        Whether what is handed out is what the next step writes to.
    """

    knows = False

    def __init__(self, device: Any, names: Sequence[str], leaves: Sequence[Any], donate: bool) -> None:
        self._names, self._donate = list(names), donate
        self._go_to(device)
        self._start(leaves)

    def _go_to(self, device: Any) -> None:
        self._cupy = _cupy(device)
        self._device, self._home = device, self._cupy.cuda.Device(device.local_hardware_id)
        self._sharding: Any = None
        self._mark = jax.device_put(np.zeros((), np.uint32), device)
        with self._home:
            self._token = self._cupy.zeros((), np.float32)

    def _start(self, leaves: Sequence[Any]) -> None:
        given = [x if isinstance(x, jax.Array) else np.asarray(x) for x in leaves]
        self._mark, self._own = copied(self._mark, jax.device_put(given, self._device), ())
        for name, mine, x in zip(self._names, self._own, given):
            if mine.dtype != x.dtype:
                raise TypeError(f"JAX makes {mine.dtype!r} of {name!r}, {x.dtype!r}; see jax_enable_x64")
        self._shapes = [(x.shape, x.dtype) for x in self._own]
        self._wide = any(kind.itemsize // (2 if kind.kind == "c" else 1) == 8 for _, kind in self._shapes)
        self._places: list[int] = []
        self.memory: list[Any] = [None] * len(self._own)
        self._gradients: list[Any] = [None] * len(self._own)
        self._gradients_at: list[Any] = [None] * len(self._own)
        self._held: list[Any] = []
        self._old: list[Any] = []
        with self._home:
            self._find()

    def here(self) -> AbstractContextManager[Any]:
        """Return a context in which the device is CuPy's current one."""
        home: AbstractContextManager[Any] = self._home
        return home

    def check(self, what: str, array: Any) -> None:
        """Refuse what is no array of JAX on the device."""
        if not isinstance(array, jax.Array):
            raise TypeError(f"{what} must be an array of JAX on {self._device}, as the parameters; got one of NumPy")
        # A sharding that was looked at is not looked at again: most arrays share one.
        if array.sharding is self._sharding:
            return
        found = devices_of(array)
        if found != [self._device]:
            raise TypeError(
                f"{what} must lie on the parameters' device {self._device}, else use lars_jax.lars; "
                f"got {', '.join(map(str, found))}"
            )
        self._sharding = array.sharding

    def begin(self, given: Sequence[Any]) -> tuple[list[Any], bool]:
        """Have CuPy's current stream wait for the gradients, and for all that JAX was to do with the parameters."""
        if self._wide and jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
            raise TypeError("parameters of 64 bits can be stepped only where jax_enable_x64 is set, as it was for them")
        self._held = [x for x in given if x is not None]
        if self._donate:
            self._take_back(self._held)
        else:
            self._mark = waited_for(self._mark, self._held)
        self._cupy.from_dlpack(self._mark)
        moved = self._find()
        for i, x in enumerate(given):
            at = None if x is None else (x.unsafe_buffer_pointer(), x.dtype)
            if at != self._gradients_at[i]:
                self._gradients[i] = None if x is None else self._view(x)
                self._gradients_at[i] = at
        return list(self._gradients), moved

    def _take_back(self, given: Sequence[Any]) -> None:
        for name, x in zip(self._names, self._own):
            if x.is_deleted():
                raise ValueError(
                    f"parameter {name!r} was deleted: with donate=True what a step returns are the parameters "
                    "themselves, and they must be there for the next one"
                )
        old = self._own
        self._mark, self._own = handed_over(self._mark, old, given)
        self._old = old  # of which those are left that could not be handed over

    def _find(self) -> bool:
        """Look where the parameters are now, and return whether that is elsewhere."""
        places = [x.unsafe_buffer_pointer() for x in self._own]
        if places == self._places:
            return False
        self._places, self.memory = places, list(map(self._view, self._own))
        return True

    def _view(self, array: Any) -> Any:
        """Return an array of CuPy on the memory of one of JAX, which it doesn't keep alive."""
        cupy = self._cupy
        if array.size == 0:
            return cupy.empty(array.shape, array.dtype)
        place = array.unsafe_buffer_pointer()
        memory = cupy.cuda.UnownedMemory(place, array.size * array.dtype.itemsize, None, self._home.id)
        return cupy.ndarray(array.shape, array.dtype, cupy.cuda.MemoryPointer(memory, 0))

    def refill(self, arrays: Sequence[Any]) -> bool:
        """Write other numbers to the memory, and return whether it is elsewhere now."""
        if any(x.is_deleted() for x in self._own):
            self._start(arrays)
            return True
        views, moved = self.begin(arrays)
        for p, x in zip(self.memory, views):
            p[...] = x
        return moved

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
        self._held.append(x)
        return self._cupy.from_dlpack(x)

    def _scheduled(self, schedule: Any) -> Any:
        return lambda step: self._number(schedule(step))

    def end(self) -> list[Any]:
        """Hand out the parameters, for which JAX waits until CuPy's stream has come to here."""
        held = [jnp.from_dlpack(self._token, copy=False), *self._held]
        if self._donate:
            self._mark, self._own = handed_over(self._mark, self._own, held)
            shown = list(self._own)
        else:
            self._mark, shown = copied(self._mark, self._own, held)
        for x in self._old:
            x.delete()
        self._held, self._old = [], []
        return shown

    def outside(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return a state dict with arrays of NumPy."""
        groups = [
            {key: np.asarray(x) if isinstance(x, jax.Array) else x for key, x in group.items()}
            for group in state_dict["param_groups"]
        ]
        return {**state_dict, "param_groups": groups, "state": self._converted(state_dict["state"], self._cupy.asnumpy)}

    def inside(self, state: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """Return the state of each parameter with arrays of CuPy on the device."""
        return self._converted(state, self._cupy.asarray)

    def _converted(self, state: Mapping[str, Mapping[str, Any]], convert: Any) -> dict[str, dict[str, Any]]:
        return {
            name: {key: convert(x) if key in KEPT and x is not None else x for key, x in own.items()}
            for name, own in state.items()
        }

    def __getstate__(self) -> dict[str, Any]:
        number, kept = self._device.local_hardware_id, [np.array(x) for x in self._own]
        return {"number": number, "kept": kept, "names": self._names, "donate": self._donate}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._names, self._donate = state["names"], state["donate"]
        self._go_to(cuda_device(state["number"]))
        self._start(state["kept"])


def _cupy(device: Any) -> Any:
    try:
        import cupy
    except ImportError as error:
        extra = "pip install lars-array[cuda12] or lars-array[cuda13]"
        raise ImportError(
            f"parameters on {device} are stepped by CuPy: {extra}; under jit use lars_jax.lars"
        ) from error
    if reason := problem():
        raise TypeError(f"parameters on {device} can't be stepped by CuPy, use lars_jax.lars: {reason}")
    return cupy
