"""How memory is visited: `sums` and `apply` for particular arrays. Kernels do not know what LARS is.

A kernel is a class ``Kernel`` in a module of this package that is imported when it is first asked for::

    TAKES                              a description
    unusable(params) -> str or None    why it can't take these parameters; a static method
    Kernel(params, buffers, xp, masters=None)
                                       for the layers of a step, as long as they are the same; a buffer may be None.
                                       Where `masters` has an array, it is what is trained, and the parameter becomes
                                       its rounding; gradients may be of any type that fits, now this, now that
        .sums(grads, operand) -> S     as core.sums
        .apply(grads, C, written=None, out=None) -> None
                                       as core.apply for each layer, in place, or to the arrays `out` instead of
                                       `params`; `written`, a bool array of shape (), lies beside the parameters:
                                       where it is false nothing at all is changed, and `out` gets a copy of `params`
        .move(params) -> None          the parameters are these from now on, what was `out` before

and, if it takes NumPy arrays, ``addresses(arrays)``, where their data begin, a static method; if it sees quickly
that arrays look as others did, ``looks(arrays)``, a `lars_array.looks.Looks`; and, if it can compute coefficients by
itself, ``.take(...)``, see `lars_array.kernels.compiled`, or where the host is not to wait,
``.enqueue(...)``, see `lars_array.kernels.cuda`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from typing import Any

__all__ = ["KERNELS", "NUMPY_KERNELS", "pick", "report"]

KERNELS = ("compiled", "blocked", "cuda", "portable")  # fastest first
NUMPY_KERNELS = ("compiled", "blocked", "portable")  # those that take its arrays


def pick(params: Sequence[Any], name: str | None = None) -> Any:
    """Return the kernel for `params`: the one that is named, here or by ``LARS_ARRAY_KERNEL``, or the fastest.

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
    what = "kernel"
    if name is None and os.environ.get("LARS_ARRAY_KERNEL"):
        name, what = os.environ["LARS_ARRAY_KERNEL"], "LARS_ARRAY_KERNEL"
    if name is None:
        return next(kernel for kernel in map(_load, KERNELS) if kernel.unusable(params) is None)
    if name not in KERNELS:
        raise ValueError(f"{what} must be one of {', '.join(KERNELS)}; got {name!r}")
    reason = _load(name).unusable(params)
    if reason is not None:
        raise ValueError(f"{what} {name!r} can't be used here: {reason}")
    return _load(name)


def report() -> list[tuple[str, bool, str]]:
    """Return, for each kernel, its name, whether it is usable on this machine, and what for or why not.

    Returns
    -------
    list of tuple (str, bool, str)
        Fastest first.
    """
    reasons = [(name, _load(name).unusable([])) for name in KERNELS]
    return [(name, reason is None, reason or _load(name).TAKES) for name, reason in reasons]


def _load(name: str) -> Any:
    return import_module(f"lars_array.kernels.{name}").Kernel
