"""Norms and trust ratios of a step, from the results of its stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace

from lars_array._arrays import device_context, to_floats
from lars_array.core import Hyper, Rule, coefficients, scaled_sums

__all__ = ["Norms", "StepResult"]


class Norms(NamedTuple):
    """The norms of a layer at its last step.

    Parameters
    ----------
    parameter : float
        Norm of its parameters before the step.
    gradient : float
        Norm of its gradient as passed to the step, before any scaling.
    """

    parameter: float
    gradient: float


class StepResult(NamedTuple):
    """The result of a step that was taken, or queued on a device.

    Parameters
    ----------
    names : sequence of str
        The names of the rows.
    S : array of shape (rows, 3)
        The sums.
    inputs : callable
        Given `arrays`, returns gradient factors, hyper-parameters and rules, one per row; only telemetry needs them. It
        must hold neither parameters nor gradients.
    arrays : tuple of arrays
        On a device those that the next step overwrites, besides S.
    device : DeviceState or None
        Decides whether the step is taken; None: it was taken.
    """

    names: Sequence[str]
    S: Any
    inputs: Callable[..., tuple[Any, Hyper, Sequence[Rule]]]
    arrays: tuple[Any, ...] = ()
    device: Any = None

    @classmethod
    def of_nothing(cls) -> StepResult:
        """Return the result of a step in which no parameter had a gradient."""
        return cls((), None, partial(tuple, ()))

    def norms(self) -> dict[str, Norms]:
        """Return the norms of each row by name; waits for the device."""
        return dict(zip(self.names, map(Norms, *self._norms())))

    def trust_ratios(self) -> dict[str, float]:
        r"""Return the trust ratio of each row by name; waits for the device.

        The ratio is the first-order step along the gradient relative to that of SGD. It is computed from the
        coefficients, :math:`(\kappa\alpha + \lambda)` divided by the same of SGD, so every rule has one; 1 where a
        layer was not adapted.
        """
        return dict(zip(self.names, self._ratios()))

    def table(self) -> Any:
        """Return the norms and the trust ratio of each row, float64, shape (rows, 3); waits for the device."""
        return np.column_stack([*self._norms(), self._ratios()])

    def copied(self) -> StepResult:
        """Return the result with copies of what the next step overwrites; does not wait for the device."""
        if self.device is None:
            return self
        with device_context(self.S):
            S, *arrays = (array_namespace(x).asarray(x, copy=True) for x in (self.S, *self.arrays))
        return self._replace(S=S, arrays=tuple(arrays), device=None)

    def settled(self) -> StepResult:
        """Return the result with its inputs evaluated, so that it can be pickled."""
        return self._replace(inputs=partial(tuple, self.inputs(*self.arrays)), arrays=(), device=None)

    def _norms(self) -> list[list[float]]:
        with device_context(self.S):
            return [[x**0.5 for x in to_floats(self.S[:, i])] for i in (0, 1)]

    def _ratios(self) -> list[float]:
        xp = array_namespace(self.S)
        with device_context(self.S):
            gamma, hyper, rules = self.inputs(*self.arrays)
            # With lr = 0 or dampening 1 the quotient is 0 / 0; the ratio is its limit.
            lr = xp.where(hyper.lr == 0, float(xp.finfo(hyper.lr.dtype).smallest_normal) ** 0.5, hyper.lr)
            hyper = hyper._replace(lr=lr, dampening=0 * hyper.dampening)
            C = coefficients(scaled_sums(self.S, gamma, xp=xp), hyper, rules, xp.ones_like(gamma), xp=xp)
            alpha, kappa, lam = C[:, 1], C[:, 3], C[:, 4]
            ratios = (kappa * alpha + lam) / (hyper.lr * xp.where(hyper.nesterov, 1 + hyper.momentum, 1.0))
            return to_floats(ratios)
