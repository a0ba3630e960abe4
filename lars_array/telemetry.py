"""Norms and trust ratios of a step, from the results of its stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from array_api_compat import array_namespace

from lars_array._arrays import device_context, to_floats
from lars_array.core import Hyper, Rule, coefficients

__all__ = ["Norms", "StepResult"]


class Norms(NamedTuple):
    """The norms of a layer at its last step.

    Parameters
    ----------
    parameter : float
        Of its parameters, before the step.
    gradient : float
        Of its gradient as it was given.
    """

    parameter: float
    gradient: float


class StepResult(NamedTuple):
    """A step that was taken, or queued on a device.

    Parameters
    ----------
    names : sequence of str
        The names of its rows.
    S : array of shape (rows, 3)
        Its sums.
    inputs : callable
        Returns gradient factors, hyper-parameters and rules, one a row: only telemetry needs them.
    """

    names: Sequence[str]
    S: Any
    inputs: Callable[[], tuple[Any, Hyper, Sequence[Rule]]]

    @classmethod
    def of_nothing(cls) -> StepResult:
        """Return the result of a step in which no parameter had a gradient."""
        return cls((), None, partial(tuple, ()))

    def norms(self) -> dict[str, Norms]:
        """Return the norms of each row by name; waits for a device."""
        with device_context(self.S):
            p_squares, g_squares = (to_floats(self.S[:, i]) for i in (0, 1))
        return dict(zip(self.names, [Norms(p**0.5, g**0.5) for p, g in zip(p_squares, g_squares)]))

    def trust_ratios(self) -> dict[str, float]:
        r"""Return the trust ratio of each row by name: its first-order step along the gradient, relative to SGD's.

        Taken from the coefficients, :math:`(\kappa\alpha + \lambda)` over the same of SGD, so any rule has one; 1
        where a layer was not adapted. Waits for a device.
        """
        xp = array_namespace(self.S)
        with device_context(self.S):
            gamma, hyper, rules = self.inputs()
            # A warm-up may start at lr = 0 and dampening 1 leave nothing in a buffer: the ratio is the limit.
            lr = xp.where(hyper.lr == 0, float(xp.finfo(hyper.lr.dtype).smallest_normal) ** 0.5, hyper.lr)
            hyper = hyper._replace(lr=lr, dampening=0 * hyper.dampening)
            S = xp.stack([self.S[:, 0], gamma**2 * self.S[:, 1], self.S[:, 2]], axis=1)
            C = coefficients(S, hyper, rules, xp.ones_like(gamma), xp=xp)
            alpha, kappa, lam = C[:, 1], C[:, 3], C[:, 4]
            ratios = (kappa * alpha + lam) / (hyper.lr * xp.where(hyper.nesterov, 1 + hyper.momentum, 1.0))
            return dict(zip(self.names, to_floats(ratios)))

    def settled(self) -> StepResult:
        """Return the result with its inputs evaluated, which can be pickled."""
        return self._replace(inputs=partial(tuple, self.inputs()))
