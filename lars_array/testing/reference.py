"""The trajectories that a step is compared with: those of a rule of `lars_array`, and of the rule with deviations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import inf
from typing import Any, NamedTuple

import numpy as np

from lars_array.core import Hyper, Rule
from lars_array.functional import init, update
from lars_array.testing.cases import Case

__all__ = ["Coefficients", "Deviation", "Form", "LayerNorms", "Model", "Moment"]

LayerOptions = Callable[[str, tuple[int, ...]], Mapping[str, Any]]


class Coefficients(NamedTuple):
    """The columns of C, each an array of shape (layers,)."""

    m: Any
    alpha: Any
    beta: Any
    kappa: Any
    lam: Any
    mu: Any


class LayerNorms(NamedTuple):
    """The norms of p, of g and of g + w p (for rules that divide by the norm of the update, of this), arrays."""

    p: Any
    g: Any
    d: Any


class Form(NamedTuple):
    """Whether a rule has the learning rate in the momentum buffer, and whether its ratio scales the whole buffer."""

    rate_inside: bool
    scales_buffer: bool

    @classmethod
    def of(cls, rule: Rule) -> Form:
        """Return the form of a rule by trying what its first coefficient depends on."""

        def alpha(lr: float, trust_coefficient: float) -> float:
            values = Hyper(
                *(lr, 0.9, 0.0, 0.1, False, trust_coefficient, 0.0, False, 0.0, inf, True, True, False, 1.0, inf),
                *(False, lr, 1e150),
            )
            hyper = Hyper(*(np.asarray([x]) for x in values))
            return float(rule.function(np.asarray([[4.0, 9.0, 11.0]]), hyper, np)[0, 1])

        return cls(alpha(1.0, 1e-3) != alpha(2.0, 1e-3), alpha(1.0, 1e-3) == alpha(1.0, 2e-3))


class Deviation(NamedTuple):
    """A mistake that a LARS may have, as a change to a correct rule.

    Parameters
    ----------
    term : str
        The term that is wrong.
    says : str
        The mistake, as the end of a sentence.
    options : mapping
        Hyper-parameters of all layers, or, with `of_vectors`, of those with one axis, in place of the given ones.
    of_vectors : bool
        Whether `options` are those of layers with one axis only.
    before : callable, optional
        ``before(norms, hyper) -> hyper``, the hyper-parameters that the rule receives.
    after : callable, optional
        ``after(C, norms, hyper, form) -> C``, the coefficients that replace those of the rule.
    joins : bool
        Whether all layers have the norms of the whole network.
    """

    term: str
    says: str
    options: Mapping[str, Any] = {}
    of_vectors: bool = False
    before: Callable[[LayerNorms, Hyper], Hyper] | None = None
    after: Callable[[Coefficients, LayerNorms, Hyper, Form], Coefficients] | None = None
    joins: bool = False


class Moment(NamedTuple):
    """A step of a trajectory: the parameters after it, and the momentum buffers before it; arrays by layer."""

    params: dict[str, Any]
    buffers: dict[str, Any]


class Model(NamedTuple):
    """A rule with deviations, as a source of trajectories.

    Parameters
    ----------
    rule : Rule
        The rule.
    fixed : mapping
        Hyper-parameters that are the same in all cases.
    layer_options : callable, optional
        As for `assert_conforms`.
    deviations : sequence of Deviation
        None for the rule itself.
    """

    rule: Rule
    fixed: Mapping[str, Any]
    layer_options: LayerOptions | None
    deviations: Sequence[Deviation] = ()

    def trajectory(self, case: Case) -> Iterator[Moment]:
        """Yield the steps of a case one by one, in float64."""
        params = {name: np.asarray(p, np.float64) for name, p in case.params.items()}
        state = init(params)
        own = {name: self._options(name, p.shape) for name, p in params.items()}
        layer_of = (lambda name: "network") if any(x.joins for x in self.deviations) else None
        given = {**case.hyper, **self.fixed, "rule": self._deviating(), "layer_of": layer_of}
        for lr, grads in zip(case.rates, case.grads, strict=True):
            groups = [{"params": {name: p}, **own[name]} for name, p in params.items()]
            wide = {name: np.asarray(g, np.float64) for name, g in grads.items()}
            buffers = state.momentum_buffers
            groups, state = update(groups, wide, state, lr=lr, nonfinite="propagate", **given)
            params = {name: p for group in groups for name, p in group["params"].items()}
            yield Moment(params, buffers)

    def _options(self, name: str, shape: tuple[int, ...]) -> dict[str, Any]:
        """Return the hyper-parameters that a layer has of its own."""
        found = {} if self.layer_options is None else dict(self.layer_options(name, shape))
        for deviation in self.deviations:
            if len(shape) <= 1 or not deviation.of_vectors:
                found |= deviation.options
        return found

    def _deviating(self) -> Rule:
        """Return the rule with the deviations."""
        rule, form = self.rule, Form.of(self.rule)
        deviations = [x for x in self.deviations if x.before or x.after]
        if not deviations:
            return rule

        def function(S: Any, hyper: Hyper, xp: Any) -> Any:
            norms = LayerNorms(*np.sqrt(S).T)
            for deviation in deviations:
                hyper = hyper if deviation.before is None else deviation.before(norms, hyper)
            C = Coefficients(*rule.function(S, hyper, xp).T)
            for deviation in deviations:
                C = C if deviation.after is None else deviation.after(C, norms, hyper, form)
            return np.stack([*C], axis=1)

        # Rules that do not read the third sum leave it to the deviations.
        norm_of = "decayed gradient" if rule.norm_of == "gradient" else rule.norm_of
        return rule._replace(function=function, norm_of=norm_of)
