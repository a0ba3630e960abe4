"""The memory of an optimizer's parameters: JAX arrays for its user, arrays that can be written to for the kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lars_array._arrays import ArraySpecs, array_at, check_gradient, form_of
from lars_array._stepper import KEPT, shown, uninterrupted
from lars_jax._devices import check_has_values, cuda_device, devices_of, first_cpu, is_cuda
from lars_jax._donation import barrier, check_context, copy, donate

__all__ = ["CudaBuffers", "DonatedBuffers", "GradientSpecs", "buffers_of"]


class GradientSpecs(ArraySpecs):
    """`ArraySpecs` of the gradients of a step: JAX arrays or None.

    JAX takes microseconds for an address, and both donation and the kernel need it: it is found once a step.

    Attributes
    ----------
    found : int64 array, or None
        The addresses of the gradients of this step, None if they have other types or layouts.
    """

    def __init__(self, arrays: Sequence[Any]) -> None:
        super().__init__(arrays)
        self.found = self._addresses(arrays)

    def fits(self, arrays: Sequence[Any]) -> bool:
        """Find the addresses of a step's gradients; return whether these have the same types and layouts."""
        self.found = None
        if list(map(type, arrays)) == self._types and True not in [x.is_deleted() for x in _present(arrays)]:
            self.found = super().addresses(arrays)
        return self.found is not None

    def addresses(self, arrays: Sequence[Any]) -> Any:
        """See `ArraySpecs.addresses`; `arrays` are the last passed to `fits`."""
        return self.found

    def read(self, arrays: Sequence[Any]) -> list[list[Any]]:
        """See `ArraySpecs.read`."""
        there = _present(arrays)
        columns = [[x.dtype for x in there], [x.shape for x in there], [x.sharding for x in there]]
        return [*columns, list(map(_layout, there))]

    def _addresses(self, arrays: Sequence[Any]) -> Any:
        return np.array([x.unsafe_buffer_pointer() for x in _present(arrays)], np.int64)

    def _spans(self, arrays: Sequence[Any]) -> Any:
        return np.array([(0, x.nbytes) for x in _present(arrays)], np.int64)


class DonatedBuffers:
    """Memory of JAX on the CPU that no other array shares while it is written to, between `acquire` and `release`.

    With `donates`, `release` returns the arrays that own it, and `acquire` takes them back; else it returns copies.

    Parameters
    ----------
    device : jax.Device
        Where the parameters lie.
    names : sequence of str
        Their names, for messages.
    leaves : sequence of arrays
        The parameters, copied.
    donates : bool
        Whether `release` returns the arrays that are written to.

    Attributes
    ----------
    donates : bool
        As given.
    arrays : list of arrays
        The parameters as kernels take them; another list where the memory has moved.
    specs : GradientSpecs
        Those of the gradients of the last step.
    """

    def __init__(self, device: Any, names: Sequence[str], leaves: Sequence[Any], donates: bool) -> None:
        self._device, self._names, self.donates = device, list(names), donates
        self.specs = GradientSpecs([])
        with self.context():
            self._allocate(leaves)

    def _allocate(self, leaves: Sequence[Any]) -> None:
        """Own copies of the parameters from now on."""
        self._token = self._new_token()
        check_context(self._token)
        given = [x if isinstance(x, jax.Array) else np.asarray(x) for x in leaves]
        self._token, self._own = copy(self._token, jax.device_put(given, self._device), ())
        for name, mine, x in zip(self._names, self._own, given):
            if mine.dtype != x.dtype:
                raise TypeError(f"JAX makes {mine.dtype!r} of {shown(name)}, {x.dtype!r}; see jax_enable_x64")
        self._is_wide = any(np.finfo(x.dtype).bits == 64 for x in self._own if x.dtype.kind in "fc")
        self._used: list[Any] = []  # JAX arrays that the kernels read
        self._replaced: list[Any] = []  # arrays that JAX may have copied instead of donating them
        self._addresses: list[int] = []
        self._sync()
        self._locate()

    def _locate(self) -> None:
        """Make `arrays` anew if the memory has moved."""
        addresses = [x.unsafe_buffer_pointer() for x in self._own]
        if addresses != self._addresses:
            self._addresses = []  # until all is known
            self.arrays = [self.view(x, write=True) for x in self._own]
            self._occupied = {at for at, x in zip(addresses, self._own) if x.size}
            self._addresses = addresses

    def check_context(self) -> None:
        """Raise where JAX would not compute here and now; see `lars_jax._donation.check_context`."""
        if self._token.is_deleted():
            self._token = self._new_token()
        check_context(self._token)

    def _new_token(self) -> Any:
        return jax.device_put(np.zeros((), np.uint32), self._device)

    def check_there(self) -> None:
        """Raise ValueError if the parameters were deleted."""
        deleted = [x.is_deleted() for x in self._own]
        if True in deleted:
            own = "with donate=True what a step returns are the parameters themselves"
            why = own if self.donates else "its memory is an array of JAX too, which jax.live_arrays lists"
            name = self._names[deleted.index(True)]
            raise ValueError(f"parameter {shown(name)} was deleted: {why}; give replace_params others")

    def check(self, what: str, array: Any) -> None:
        """Raise unless a value is an array on the device, with values; `what` is its name in messages."""
        check_has_values(what, array)
        if not isinstance(array, (jax.Array, np.ndarray)):
            raise TypeError(f"{what} must be an array; got {shown(array)}")
        _check_device(what, array, self._device)

    def gradients(self, given: Sequence[Any]) -> list[Any]:
        """Return the gradients of a step as the stepper takes them, checked; None for None."""
        if self._is_wide and not jax.config.jax_enable_x64:
            raise TypeError("parameters of 64 bits can be stepped only where jax_enable_x64 is set, as it was for them")
        self.check_there()
        grads = list(given)
        if not self.specs.fits(grads):
            grads = [g if g is None else self._checked(*row) for g, *row in zip(grads, self._names, grads, self._own)]
            if any(isinstance(g, np.ndarray) for g in grads):
                self._used = [g for g in grads if isinstance(g, jax.Array)]
                return [None if g is None else self.view(g) for g in grads]
            if not self.specs.fits(grads):
                self.specs = GradientSpecs(grads)
        self._used = _present(grads)
        return grads

    def _checked(self, name: str, g: Any, p: Any) -> Any:
        """Return a gradient in the order of the parameter's elements; raise if it does not fit."""
        g = np.asarray(g) if isinstance(g, np.generic) else g
        self.check(f"the gradient of {shown(name)}", g)
        if g.shape != p.shape or g.dtype != p.dtype:
            check_gradient(name, *(form_of(x.dtype, x.shape) for x in (g, p)))
        return _in_order(g, p)

    def acquire(self) -> None:
        """Have JAX finish with the memory; it may be written to until `release`."""
        pending = self._pending()
        if not self.donates:
            self._token = barrier(self._token, pending)
            return self._sync()
        # Gradients may be the parameters themselves, also those without elements.
        found = self.specs.found
        read = [x.unsafe_buffer_pointer() for x in self._used] if found is None else found.tolist()
        is_apart = self._occupied.isdisjoint(read) and set(map(id, self._own)).isdisjoint(map(id, self._used))
        before, old = self.arrays, self._own
        self._renew(donate if is_apart else copy, pending)
        self._sync()
        self._locate()
        self._replaced = [] if self.arrays is before else old

    def _renew(self, way: Any, also: list[Any]) -> None:
        """Own what `donate` or `copy` returns."""
        with uninterrupted():  # between the two, nothing holds the parameters
            self._token, self._own = way(self._token, self._own, also)

    def release(self) -> list[Any]:
        """Return the parameters as they are now, JAX arrays."""
        used = self._fences()
        if not self.donates:
            self._token, found = copy(self._token, self._own, used)
        else:
            if used:
                self._renew(donate, used)
            found = list(self._own)
        for x in self._replaced:
            x.delete()
        self._replaced = []
        self.forget()
        return found

    def forget(self) -> None:
        """Keep no gradients of a step that is over."""
        self._used, self.specs.found = [], None

    def refill(self, arrays: Sequence[Any]) -> None:
        """Write other parameters to the memory; `release` must follow."""
        if True in [x.is_deleted() for x in self._own]:
            return self._allocate(arrays)
        given = list(map(_in_order, arrays, self._own))
        self.specs.found, self._used = None, [x for x in given if isinstance(x, jax.Array)]
        self.acquire()
        for p, x in zip(self.arrays, map(self.view, given)):
            p[...] = x

    def __reduce__(self) -> tuple[Any, ...]:
        self.check_there()
        leaves = [np.array(x) for x in self._own]
        return _restored, (type(self), self._device.local_hardware_id, self._names, leaves, self.donates)

    # Memory of other devices overrides what follows.

    def context(self) -> AbstractContextManager[Any]:
        """Return the context in which all other methods are called."""
        return nullcontext()

    def view(self, array: Any, *, write: bool = False) -> Any:
        """Return an array as kernels take it on the memory of another, which it doesn't keep alive."""
        if not isinstance(array, jax.Array):
            return np.asarray(array)
        return array_at(array.unsafe_buffer_pointer(), array.shape, array.dtype, write=write)

    def numbers(self, groups: Sequence[dict[str, Any]], found_inf: Any) -> tuple[Any, Any]:
        """Return hyper-parameters at this step and `found_inf` as the stepper takes them."""
        _check_device("found_inf", found_inf, self._device)
        return groups, np.asarray(found_inf) if isinstance(found_inf, jax.Array) else found_inf

    def to_numpy(self, array: Any) -> Any:
        """Return a copy of a momentum buffer or master."""
        return np.array(array)

    def from_numpy(self, state: Any) -> Any:
        """Return the state of each parameter with arrays as kernels take them."""
        return state

    def _sync(self) -> None:
        """Have the kernels go on after the work of JAX that ends with the token."""
        self._token.block_until_ready()

    def _pending(self) -> list[Any]:
        """Return the used arrays that may not be ready before the next token."""
        jax.block_until_ready(self._used)
        return []

    def _fences(self) -> list[Any]:
        """Return the arrays that are not ready before the kernels are done, and those that these use."""
        return []


class CudaBuffers(DonatedBuffers):
    """Memory of JAX on a GPU, where CuPy steps the parameters on its current stream.

    JAX does not know of CuPy's work. So a step lies between two computations of JAX: CuPy's stream waits for the first,
    which takes the gradients and everything that nobody else may see; JAX waits for CuPy's stream before the second,
    which returns the parameters. The host waits for neither.
    """

    def __init__(self, device: Any, names: Sequence[str], leaves: Sequence[Any], donates: bool) -> None:
        self._cupy = _cupy(device)
        self._home = self._cupy.cuda.Device(device.local_hardware_id)
        with self._home:
            self._fence = self._cupy.zeros((), np.float32)  # importing it, JAX waits for CuPy's stream
        super().__init__(device, names, leaves, donates)

    def check(self, what: str, array: Any) -> None:
        """See `DonatedBuffers.check`."""
        if isinstance(array, np.ndarray):
            raise TypeError(f"{what} must be an array of JAX on {self._device}, as the parameters; got one of NumPy")
        super().check(what, array)

    def context(self) -> AbstractContextManager[Any]:
        """Return a context in which the device is CuPy's current one."""
        home: AbstractContextManager[Any] = self._home
        return home

    def view(self, array: Any, *, write: bool = False) -> Any:
        """See `DonatedBuffers.view`."""
        cupy = self._cupy
        if array.size == 0:
            return cupy.empty(array.shape, array.dtype)
        memory = cupy.cuda.UnownedMemory(array.unsafe_buffer_pointer(), array.nbytes, None, self._home.id)
        return cupy.ndarray(array.shape, array.dtype, cupy.cuda.MemoryPointer(memory, 0))

    def numbers(self, groups: Sequence[dict[str, Any]], found_inf: Any) -> tuple[Any, Any]:
        """See `DonatedBuffers.numbers`; the device reads those that lie on it."""
        known = [{key: self._number(x) for key, x in group.items()} for group in groups]
        return known, self._number(found_inf)

    def _number(self, x: Any) -> Any:
        """Return a CuPy array for a JAX array of shape () on the device, and a number for one on the host."""
        if getattr(x, "shape", None) != ():
            return x
        if not isinstance(x, jax.Array) or devices_of(x) != [self._device]:
            return x.item()
        self._used.append(x)
        return self._cupy.from_dlpack(x)

    def to_numpy(self, array: Any) -> Any:
        """See `DonatedBuffers.to_numpy`."""
        return self._cupy.asnumpy(array)

    def from_numpy(self, state: Any) -> Any:
        """See `DonatedBuffers.from_numpy`."""
        if not isinstance(state, Mapping) or not all(isinstance(own, Mapping) for own in state.values()):
            return state  # refused when it is read
        return {
            name: {key: self._cupy.asarray(x) if key in KEPT and x is not None else x for key, x in own.items()}
            for name, own in state.items()
        }

    def _sync(self) -> None:
        self._cupy.from_dlpack(self._token)

    def _pending(self) -> list[Any]:
        return self._used

    def _fences(self) -> list[Any]:
        return [jnp.from_dlpack(self._fence, copy=False), *self._used]


def buffers_of(names: Sequence[str], leaves: Sequence[Any], donates: bool) -> DonatedBuffers:
    """Return the memory of parameters, JAX arrays on one device or NumPy arrays.

    Raises
    ------
    TypeError
        If they lie on several devices, or on one that is neither the first CPU device nor a CUDA device.
    ImportError
        If they lie on a CUDA device and CuPy is not installed.
    """
    home: Any = None  # a parameter and its device
    for name, leaf in zip(names, leaves):
        check_has_values(f"parameter {shown(name)}", leaf)
        if not isinstance(leaf, jax.Array):
            continue
        found = devices_of(leaf)
        if len(found) > 1 or not (found[0] == first_cpu() or is_cuda(found[0])):
            raise TypeError(
                f"parameter {shown(name)} must lie on the first CPU device or on one CUDA device, else use "
                f"lars_jax.lars; got {', '.join(map(str, found))}"
            )
        home = home or (name, found[0])
        if found[0] != home[1]:
            raise TypeError(
                f"parameters must lie on one device, else use lars_jax.lars; {shown(home[0])} lies on {home[1]} and "
                f"{shown(name)} on {found[0]}"
            )
    if home and is_cuda(home[1]):
        return CudaBuffers(home[1], names, leaves, donates)
    return DonatedBuffers(first_cpu(), names, leaves, donates)


def _restored(kind: Any, number: int, *arguments: Any) -> DonatedBuffers:
    buffers: DonatedBuffers = kind(cuda_device(number) if kind is CudaBuffers else first_cpu(), *arguments)
    return buffers


def _present(arrays: Sequence[Any]) -> list[Any]:
    return [x for x in arrays if x is not None]


def _check_device(what: str, array: Any, device: Any) -> None:
    if isinstance(array, jax.Array) and (found := devices_of(array)) != [device]:
        raise TypeError(
            f"{what} must lie on the parameters' device {device}, else use lars_jax.lars; "
            f"got {', '.join(map(str, found))}"
        )


def _layout(x: Any) -> Any:
    # JAX crashes where the array was deleted. The public `format` takes forty times as long.
    return None if x.is_deleted() else getattr(x, "_pjrt_layout", None)


def _in_order(x: Any, p: Any) -> Any:
    """Return an array whose elements lie in the order of the parameter's, which views assume."""
    if not isinstance(x, jax.Array) or _layout(x) == _layout(p):
        return x
    return jax.device_put(x, p.format if hasattr(p, "format") else p.layout)


def _cupy(device: Any) -> Any:
    try:
        import cupy
    except ImportError as error:
        needed = "CuPy, pip install 'lars-array[cuda12]' or 'lars-array[cuda13]'"
        raise ImportError(f"parameters on {device} need {needed}; or use lars_jax.lars") from error
    if cupy.cuda.runtime.is_hip or not cupy.cuda.is_available():
        reason = "it is for ROCm" if cupy.cuda.runtime.is_hip else "it finds no CUDA device"
        raise TypeError(f"parameters on {device} can't be stepped by CuPy, use lars_jax.lars: {reason}")
    return cupy
