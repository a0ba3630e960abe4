"""What the kernels are held against: flash's equations as torch code does them, and ways to lie in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

# The type that each element type is computed in, written again here: a mistake in the table must not hide itself.
COMPUTED_IN = {
    "float16": "f4",
    "bfloat16": "f4",
    "float32": "f4",
    "float64": "f8",
    "complex64": "c8",
    "complex128": "c16",
}


def flash_step(p: Any, g: Any, v: Any, **given: Any) -> tuple[Any, Any]:
    """Return p' and v' of one layer in float64, branch by branch like the original and not as an affine map."""
    use = {"momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "eta": 1e-3, "eps": 1e-8} | given
    wide = "c16" if np.iscomplexobj(p) else "f8"
    p, d = p.astype(wide), g.astype(wide)
    p_norm, g_norm = np.sqrt(np.sum(np.abs(p) ** 2)), np.sqrt(np.sum(np.abs(d) ** 2))
    if use["weight_decay"] != 0 and p_norm != 0 and g_norm != 0:
        ratio = use["eta"] * p_norm / (g_norm + use["weight_decay"] * p_norm + use["eps"])
        d = ratio * (d + use["weight_decay"] * p)
    if use["momentum"] != 0:
        v = d if v is None else use["momentum"] * v + (1 - use["dampening"]) * d
        d = d + use["momentum"] * v if use["nesterov"] else v
    return p - use["lr"] * d, v


def flash_terms(p: Any, g: Any, v: Any, **given: Any) -> tuple[float, float]:
    """Return how large the terms are at most of which p' and v' are sums: what rounding is relative to."""
    size = [None if x is None else np.abs(x.astype("c16")) for x in (p, g, v)]
    new_p, new_v = flash_step(*size, **given | {"lr": -given["lr"]})
    return float(np.max(new_p, initial=0)), 0.0 if new_v is None else float(np.max(new_v, initial=0))


def tolerance(dtype: Any, roundings: int = 8) -> float:
    """Return what a few roundings in the type that `dtype` is computed in may cost, relative to the largest number."""
    return roundings * float(np.finfo(COMPUTED_IN[np.dtype(dtype).name]).eps)


def assert_close(ours: Any, theirs: Any, allowed: float, what: str = "", scale: float = 0.0) -> None:
    """Compare two arrays, in error relative to the largest entry of the second, or to `scale` where that is larger."""
    assert ours.shape == theirs.shape, f"{what}: shapes {ours.shape} and {theirs.shape}"
    if not theirs.size:
        return
    wide = "c16" if np.iscomplexobj(theirs) else "f8"
    a, b = ours.astype(wide), theirs.astype(wide)
    worst, largest = np.max(np.abs(a - b)), max(np.max(np.abs(b)), scale)
    assert worst <= allowed * largest, f"{what}: off by {worst}, where the largest entry is {largest}"


def assert_stored_close(ours: Any, theirs: Any, allowed: float, what: str = "", scale: float = 0.0) -> None:
    """Compare parameters with `theirs` in float64; half precision may be stored as the neighbouring number."""
    spacing = {"float16": 2.0**-10, "bfloat16": 2.0**-7}.get(ours.dtype.name)
    if spacing is None or not ours.size:
        assert_close(ours, theirs, allowed, what, scale)
        return
    least = 6e-8  # of float16, whose subnormal numbers lie that far apart
    slack = spacing * np.abs(theirs) + allowed * max(np.max(np.abs(theirs)), scale) + least
    off = np.abs(ours.astype("f8") - theirs)
    assert np.all(off <= slack), f"{what}: off by {np.max(off)}"


def assert_same_bits(ours: Any, theirs: Any, what: str = "") -> None:
    """Compare byte for byte: this tells -0.0 from 0.0 and knows every nan."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, what
    assert ours.tobytes() == theirs.tobytes(), f"{what}: bits differ"


def gaussian(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> Any:
    """Return random numbers of any type, complex ones in both parts."""
    x = rng.standard_normal(shape)
    if np.dtype(dtype).kind == "c":
        x = x + 1j * rng.standard_normal(shape)
    return np.asarray(x).astype(dtype)


def _strided(x: Any) -> Any:
    wide = np.zeros((*x.shape[:-1], 2 * x.shape[-1]) if x.ndim else (2,), x.dtype)[..., ::2]
    return _filled(wide if x.ndim else wide[0:1].reshape(()), x)


def _unaligned(x: Any) -> Any:
    raw = np.zeros(x.nbytes + 1, np.uint8)
    return _filled(raw[1:].view(x.dtype).reshape(x.shape), x)


def _reversed(x: Any) -> Any:
    turned = (..., *(slice(None, None, -1) for _ in x.shape))  # with the dots a view even of a 0-d array
    return _filled(np.zeros(x.shape, x.dtype)[turned], x)


def _permuted(x: Any) -> Any:
    axes = np.roll(np.arange(x.ndim), 1)
    return _filled(np.zeros([x.shape[a] for a in axes], x.dtype).transpose(np.argsort(axes)), x)


def _sliced(x: Any) -> Any:
    """Rows that are dense each, with gaps between them: a window of a larger matrix."""
    bigger = np.zeros([n + 3 for n in x.shape], x.dtype)
    return _filled(bigger[(..., *(slice(1, n + 1) for n in x.shape))], x)


def _filled(view: Any, x: Any) -> Any:
    view[...] = x
    return view


# Each returns a writable array of the numbers of x that lies in memory in its own way.
LAYOUTS: dict[str, Callable[[Any], Any]] = {
    "C": lambda x: np.array(x, order="C"),
    "Fortran": lambda x: np.array(x, order="F"),
    "permuted": _permuted,
    "strided": _strided,
    "sliced": _sliced,
    "reversed": _reversed,
    "transposed": lambda x: np.array(x.T, order="C").T,
    "unaligned": _unaligned,
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
}
