"""Kernels: `sums` and `writer` for particular arrays, by name.

A kernel is a class ``Kernel`` in a module of this package that is imported when it is first chosen::

    DESCRIPTION                            the arrays it takes
    unsupported_reason(params)             why it can't take these parameters, or None; a static method
    fallback()                             the kernel for arrays that are not dense; None: it takes all; a static method
    Kernel(arrays, xp)                     for the rows of a step, a `KernelArrays`
        .sums(grads, operand) -> S         as core.sums, of `Gradients`
        .writer(grads, C, taken=None)      a call that does core.apply for each row, in place, and allocates nothing; on
                                           a device, where `taken`, a bool array of shape (), is true
        .apply(grads, C, taken=None)       the same at once: `kernels.base.Writing`

and optionally

    specs(arrays) -> ArraySpecs            a faster comparison of arrays; a static method
    .fused(...)                            sums, coefficients and, if asked, apply in one go: `kernels.compiled`
    .enqueue(...)                          a whole step without waiting for its result: `kernels.cuda`
    .moved(held, places) -> Kernel         the kernel for arrays of the same types and layouts that lie elsewhere
    .part(index) -> Kernel                 the kernel for some of its layers
    .is_capturing() -> bool                whether launches are captured in a graph

The caller makes the device of the arrays the current one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from lars_array._messages import near, shown

__all__ = ["KERNELS", "NUMPY_KERNELS", "check_kernel_name", "choose", "report"]

KERNELS = ("compiled", "blocked", "cuda", "portable")  # fastest first
NUMPY_KERNELS = ("compiled", "blocked", "portable")


def choose(params: Sequence[Any], name: str | None = None) -> Any:
    """Return the kernel for `params`: that called `name`, else that of ``LARS_ARRAY_KERNEL``, else the fastest.

    Parameters
    ----------
    params : sequence of arrays
        All parameters of an optimizer.
    name : str, optional
        A name in `KERNELS`.

    Returns
    -------
    type
        The kernel.

    Raises
    ------
    ValueError
        If no kernel has that name, or it can't take the parameters.
    """
    source = "kernel"
    if name is None and os.environ.get("LARS_ARRAY_KERNEL"):
        name, source = os.environ["LARS_ARRAY_KERNEL"], "LARS_ARRAY_KERNEL"
    if name is None:
        return next(kernel for kernel in map(_load, KERNELS) if kernel.unsupported_reason(params) is None)
    check_kernel_name(name, source)
    reason = _load(name).unsupported_reason(params)
    if reason is not None:
        raise ValueError(f"{source} {shown(name)} can't be used here: {reason}")
    return _load(name)


def check_kernel_name(name: Any, source: str = "kernel") -> None:
    """Raise ValueError unless a kernel is called `name`; `source` is what gave it."""
    if not isinstance(name, str) or name not in KERNELS:
        raise ValueError(f"{source} must be one of {', '.join(KERNELS)}; got {shown(name)}{near(name, KERNELS)}")


def report() -> list[tuple[str, bool, str]]:
    """Return for each kernel, fastest first, its name, whether it is usable on this machine, and for what or why not.

    Returns
    -------
    list of tuple (str, bool, str)
        Fastest first.
    """
    reasons = [(name, _load(name).unsupported_reason([])) for name in KERNELS]
    return [(name, reason is None, reason or _load(name).DESCRIPTION) for name, reason in reasons]


def _load(name: str) -> Any:
    module = f"{name}.kernel" if name in ("compiled", "cuda") else name
    return import_module(f"lars_array.kernels.{module}").Kernel
