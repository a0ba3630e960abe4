"""How memory is visited: `sums` and `apply` for particular arrays. Kernels do not know what LARS is.

A kernel is a module of this package, imported when it is first asked for, with ``TAKES``, a description, and ::

    unusable(params) -> str or None                     why it can't take these parameters
    sums(params, grads, buffers, operand, xp) -> S      as core.sums
    apply(params, grads, buffers, C, xp) -> None        as core.apply for each layer, in place
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

__all__ = ["KERNELS", "pick", "report"]

KERNELS = ("blocked", "portable")  # fastest first


def pick(params: Sequence[Any], name: str | None = None) -> Any:
    """Return the kernel for `params`: the fastest that takes them, or the one that is named.

    Parameters
    ----------
    params : sequence of arrays
        All parameters of an optimizer.
    name : str, optional
        A name in `KERNELS`.

    Returns
    -------
    module
        The kernel.

    Raises
    ------
    ValueError
        If no kernel has that name, or it can't take the parameters.
    """
    if name is None:
        return next(kernel for kernel in map(_load, KERNELS) if kernel.unusable(params) is None)
    if name not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}; got {name!r}")
    reason = _load(name).unusable(params)
    if reason is not None:
        raise ValueError(f"kernel {name!r} can't be used here: {reason}")
    return _load(name)


def report() -> list[tuple[str, bool, str]]:
    """Return, for each kernel, its name, whether it is usable on this machine, and what for or why not.

    Returns
    -------
    list of tuple (str, bool, str)
        Fastest first.
    """
    return [(name, True, _load(name).TAKES) for name in KERNELS]


def _load(name: str) -> Any:
    return import_module(f"lars_array.kernels.{name}")
