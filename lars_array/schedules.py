"""Learning rates as pure functions of the step.

A schedule is an immutable value that can be compared, pickled, copied and printed. It is called with the number of the
step, starting from 0.
"""

from __future__ import annotations

import math
import sys
from numbers import Integral, Real
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from lars_array._messages import shown

__all__ = ["linear_scaled_lr", "warmup_cosine", "warmup_polynomial"]


def linear_scaled_lr(base_lr: float, batch_size: int, base_batch_size: int = 256) -> float:
    """Scale a learning rate with the batch size.

    Parameters
    ----------
    base_lr : float
        The learning rate for batches of `base_batch_size`.
    batch_size : int
        The batch size of the whole step, summed over all devices.
    base_batch_size : int, default: 256
        The batch size for which `base_lr` was tuned.

    Returns
    -------
    float
        ``base_lr * batch_size / base_batch_size``, the peak for a schedule.

    References
    ----------
    Goyal et al., "Accurate, Large Minibatch SGD", 2017, arXiv 1706.02677.

    Examples
    --------
    >>> linear_scaled_lr(0.1, batch_size=8192)
    3.2
    """
    base_lr = _real("base_lr", base_lr)
    return base_lr * _count("batch_size", batch_size, least=1) / _count("base_batch_size", base_batch_size, least=1)


class _WarmUp:
    """A linear warm-up to the peak, followed by a decay that the subclass defines in `_left`."""

    peak_lr: float
    total_steps: int
    warmup_steps: int
    end_lr: float
    start_lr: float

    # Not a dataclass: making two would be a sixth of `import lars_array`.

    def _set(self, peak_lr: float, total_steps: int, warmup_steps: int, end_lr: float, start_lr: float) -> None:
        if _count("warmup_steps", warmup_steps, least=0) > _count("total_steps", total_steps, least=1):
            raise ValueError(
                f"warmup_steps must be at most total_steps={shown(total_steps)}, got {shown(warmup_steps)}"
            )
        vars(self).update(
            peak_lr=_real("peak_lr", peak_lr),
            total_steps=int(total_steps),
            warmup_steps=int(warmup_steps),
            end_lr=_real("end_lr", end_lr),
            start_lr=_real("start_lr", start_lr),
        )

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{name} can't be set: make another {type(self).__name__}")

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash((type(self), *vars(self).values()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"

    def __call__(self, step: Any) -> Any:
        if isinstance(step, Integral):
            return float(self._lr(np.float64(_count("step", step, least=0)), np))
        try:
            xp = array_namespace(step)
        except TypeError:
            raise TypeError(f"step must be an integer or an array, got {shown(step)}") from None
        if not xp.isdtype(step.dtype, ("bool", "integral", "real floating")):
            raise TypeError(f"step must be an integer or an array of real numbers, got {shown(step)}")
        if not xp.isdtype(step.dtype, "real floating"):
            step = xp.astype(step, xp.__array_namespace_info__().default_dtypes()["real floating"])
        return self._lr(step, xp)

    def _lr(self, step: Any, xp: Any) -> Any:
        warmed = step / max(1, self.warmup_steps)
        decayed = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        left = self._left(xp.clip(decayed, 0.0, 1.0), xp)
        # In this form, unlike b + (a - b) * t, both ends are exact.
        return xp.where(
            step < self.warmup_steps,
            warmed * self.peak_lr + (1.0 - warmed) * self.start_lr,
            left * self.peak_lr + (1.0 - left) * self.end_lr,
        )

    def _left(self, decayed: Any, xp: Any) -> Any:
        raise NotImplementedError


class warmup_cosine(_WarmUp):  # noqa: N801 - used as a function, like functools.partial; its repr is the call
    """Linear warm-up, then half a cosine down to `end_lr`.

    Parameters
    ----------
    peak_lr : float
        The learning rate at step `warmup_steps`, for instance from `linear_scaled_lr`.
    total_steps : int
        The length of the whole run, including the warm-up. From this step on the learning rate is `end_lr`.
    warmup_steps : int, default: 0
        The length of the warm-up. If it equals `total_steps`, there is no decay: the step after the peak has `end_lr`.
    end_lr : float, default: 0.0
        The final learning rate.
    start_lr : float, default: 0.0
        The learning rate of step 0, if there is a warm-up.

    See Also
    --------
    warmup_polynomial : The decay of the LARS paper.

    Notes
    -----
    Called with an integer, the schedule returns a float. Called with an array, also a traced one, it computes with the
    array's namespace and returns an array: of the same dtype, or of the default floating-point dtype for integer
    arrays.

    The values equal those of `optax.warmup_cosine_decay_schedule`.

    Examples
    --------
    >>> lr = warmup_cosine(peak_lr=3.2, total_steps=100, warmup_steps=10)
    >>> [round(lr(step), 3) for step in (0, 5, 10, 55, 100, 101)]
    [0.0, 1.6, 3.2, 1.6, 0.0, 0.0]
    """

    def __init__(
        self, peak_lr: float, total_steps: int, warmup_steps: int = 0, end_lr: float = 0.0, start_lr: float = 0.0
    ) -> None:
        self._set(peak_lr, total_steps, warmup_steps, end_lr, start_lr)

    def _left(self, decayed: Any, xp: Any) -> Any:
        return 0.5 * (1.0 + xp.cos(math.pi * decayed))


class warmup_polynomial(_WarmUp):  # noqa: N801 - see warmup_cosine
    """Linear warm-up, then the polynomial decay of the LARS paper and of MLPerf.

    Parameters
    ----------
    peak_lr : float
        The learning rate at step `warmup_steps`, for instance from `linear_scaled_lr`.
    total_steps : int
        The length of the whole run, including the warm-up. From this step on the learning rate is `end_lr`.
    warmup_steps : int, default: 0
        The length of the warm-up. If it equals `total_steps`, there is no decay: the step after the peak has `end_lr`.
    end_lr : float, default: 0.0001
        The final learning rate.
    power : float, default: 2.0
        The degree of the polynomial, greater than 0.
    start_lr : float, default: 0.0
        The learning rate of step 0, if there is a warm-up.

    See Also
    --------
    warmup_cosine : The same warm-up; its notes on arrays apply here too.

    Notes
    -----
    After the warm-up the learning rate is
    ``(peak_lr - end_lr) * (1 - (step - warmup_steps) / (total_steps - warmup_steps))**power + end_lr``.

    MLPerf's reference, ``PolynomialDecayWithWarmup`` in ``retired_benchmarks/resnet-tf2`` of mlcommons/training, decays
    over one step more: its values are those of ``total_steps=train_steps + 1``.

    References
    ----------
    You et al., "Large Batch Training of Convolutional Networks", 2017, arXiv 1708.03888.

    Examples
    --------
    >>> lr = warmup_polynomial(peak_lr=10.0, total_steps=100, warmup_steps=20, end_lr=0.0)
    >>> [lr(step) for step in (0, 10, 20, 60, 100, 101)]
    [0.0, 5.0, 10.0, 2.5, 0.0, 0.0]
    """

    power: float

    def __init__(
        self,
        peak_lr: float,
        total_steps: int,
        warmup_steps: int = 0,
        end_lr: float = 1e-4,
        power: float = 2.0,
        start_lr: float = 0.0,
    ) -> None:
        self._set(peak_lr, total_steps, warmup_steps, end_lr, start_lr)
        vars(self)["power"] = _real("power", power, positive=True)

    def _left(self, decayed: Any, xp: Any) -> Any:
        return (1.0 - decayed) ** self.power


def _real(name: str, value: Any, positive: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a real number, got {shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not 0.0 <= number < math.inf or (positive and number == 0.0):
        raise ValueError(f"{name} must be finite and {'more than' if positive else 'at least'} 0, got {shown(value)}")
    return number


def _count(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {shown(value)}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {shown(value)}")
    if int(value) > sys.maxsize:
        raise ValueError(f"{name} must be at most {sys.maxsize}, got {shown(value)}")
    return int(value)
