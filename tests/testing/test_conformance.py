"""The kit accepts what is right, and names the term that is wrong in small wrong implementations."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from lars_array import RULES, lars_step
from lars_array.core import norms
from lars_array.testing import assert_conforms, layer_step


def assert_says(step: Any, message: str, *arguments: Any, **options: Any) -> None:
    """The kit refuses the step, and its message begins so."""
    with pytest.raises(AssertionError) as caught:
        assert_conforms(step, *arguments, **options)
    assert str(caught.value).startswith(message), str(caught.value)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("rule", sorted(RULES))
def test_the_steps_of_a_rule_conform_to_it(rule: str, dtype: str) -> None:
    def step(p: Any, g: Any, state: Any, *, lr: float, **hyper: Any) -> Any:
        v, before = state or (None, None)
        p, v = lars_step(p, g, v, lr=lr, previous_lr=before, rule=rule, **{"eps": 0.0} | hyper)
        return p, (v, lr)

    assert_conforms(layer_step(step), rule, dtype=dtype)


# ------------------------------------------------------------------------- an implementation with a place for mistakes


class Flash:
    """LARS of lightning-flash for one layer, from its documentation; subclasses have one mistake each."""

    def __call__(self, p: Any, g: Any, v: Any, *, lr: float, momentum: float, nesterov: bool, **hyper: Any) -> Any:
        d = self.scaled(p, g, **{name: x for name, x in hyper.items() if name != "dampening"})
        if momentum == 0:
            return p - lr * d, None
        v = self.start(g, d, momentum, hyper["dampening"]) if v is None else momentum * v + (1 - hyper["dampening"]) * d
        return self.move(p, d + momentum * v if nesterov else v, lr, v)

    def scaled(self, p: Any, g: Any, *, weight_decay: float, trust_coefficient: float, eps: float) -> Any:
        p_norm, g_norm = self.norm(p), self.norm(g)
        if weight_decay == 0 or p_norm == 0 or g_norm == 0:
            return self.unscaled(p, g, weight_decay)
        ratio = trust_coefficient * p_norm / (g_norm + weight_decay * p_norm + eps)
        return ratio * (g + weight_decay * p)

    def norm(self, x: Any) -> Any:
        return np.linalg.norm(x)

    def unscaled(self, p: Any, g: Any, weight_decay: float) -> Any:
        return g

    def start(self, g: Any, d: Any, momentum: float, dampening: float) -> Any:
        return d.copy()

    def move(self, p: Any, update: Any, lr: float, v: Any) -> Any:
        return p - lr * update, v


def test_flash_written_from_its_documentation_conforms() -> None:
    assert_conforms(layer_step(Flash()))
    assert_conforms(layer_step(Flash()), "flash", dtype="float32")


class BufferStartsRaw(Flash):
    """As zij 0.1.1 did, but for the addition."""

    def start(self, g: Any, d: Any, momentum: float, dampening: float) -> Any:
        return g.copy()


class BufferStartsRawAndAdds(Flash):
    """As zij 0.1.1."""

    def start(self, g: Any, d: Any, momentum: float, dampening: float) -> Any:
        return momentum * g + d


class FirstBufferDoubled(Flash):
    """As pytorch-optimizer 3.5."""

    def start(self, g: Any, d: Any, momentum: float, dampening: float) -> Any:
        return momentum * d + (1 - dampening) * d


class NeverDecayed(Flash):
    """As the first version of lightning-bolts, which called add instead of add_."""

    def scaled(self, p: Any, g: Any, **hyper: Any) -> Any:
        return super().scaled(p, g, **hyper) * 1.0 if not hyper["weight_decay"] else self._ratio(p, g, **hyper) * g

    def _ratio(self, p: Any, g: Any, *, weight_decay: float, trust_coefficient: float, eps: float) -> Any:
        p_norm, g_norm = self.norm(p), self.norm(g)
        if p_norm == 0 or g_norm == 0:
            return 1.0
        return trust_coefficient * p_norm / (g_norm + weight_decay * p_norm + eps)


class DecayedAtZeroGradients(Flash):
    def unscaled(self, p: Any, g: Any, weight_decay: float) -> Any:
        return g + weight_decay * p


class RateInside(Flash):
    """The buffer of the paper."""

    def __call__(self, p: Any, g: Any, v: Any, *, lr: float, momentum: float, nesterov: bool, **hyper: Any) -> Any:
        dampening = hyper.pop("dampening")
        d = lr * self.scaled(p, g, **hyper)
        v = d if v is None or momentum == 0 else momentum * v + (1 - dampening) * d
        return p - (d + momentum * v if nesterov else v), v


class WithoutEps(Flash):
    def scaled(self, p: Any, g: Any, **hyper: Any) -> Any:
        return super().scaled(p, g, **hyper | {"eps": 0.0})


class WithoutTrustCoefficient(Flash):
    def scaled(self, p: Any, g: Any, **hyper: Any) -> Any:
        return super().scaled(p, g, **hyper | {"trust_coefficient": 1.0})


class VectorsExcluded(Flash):
    def scaled(self, p: Any, g: Any, **hyper: Any) -> Any:
        return super().scaled(p, g, **hyper) if p.ndim > 1 else g


WRONG = {
    BufferStartsRaw: "wrong momentum buffer: it starts as the raw gradient, not as the scaled one",
    BufferStartsRawAndAdds: "wrong momentum buffer: it starts as the raw gradient, to which the first step adds the",
    FirstBufferDoubled: "wrong momentum buffer: it starts as the scaled gradient, which the first step adds once more",
    NeverDecayed: "wrong weight decay: the weights are never decayed",
    DecayedAtZeroGradients: "wrong weight decay: it still acts where the gradient is zero\nits steps are those of rule "
    "'timm'",
    RateInside: "wrong learning rate: it is inside the momentum buffer, not outside",
    WithoutEps: "wrong eps: it is missing",
    WithoutTrustCoefficient: "wrong trust coefficient: it is ignored",
    VectorsExcluded: "wrong layers with one axis: they are neither decayed nor adapted",
}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("wrong", WRONG, ids=lambda cls: cls.__name__)
def test_a_mistake_is_named(wrong: type, dtype: str) -> None:
    assert_says(layer_step(wrong()), f"step does not conform to rule 'flash'; {WRONG[wrong]}", "flash", dtype=dtype)


def paper(p: Any, g: Any, v: Any, *, lr: float, momentum: float, weight_decay: float, trust_coefficient: float) -> Any:
    """Algorithm 1 of the paper, with a mistake: zero gradients are not decayed."""
    p_norm, g_norm, d = np.linalg.norm(p), np.linalg.norm(g), g
    if g_norm > 0:
        d = g + weight_decay * p
    ratio = trust_coefficient * p_norm / (g_norm + weight_decay * p_norm) if p_norm > 0 and g_norm > 0 else 1.0
    v = lr * ratio * d if v is None else momentum * v + lr * ratio * d
    return p - v, v


def test_decay_that_is_dropped_at_zero_gradients_is_named() -> None:
    message = "step does not conform to rule 'paper'; wrong weight decay: it is dropped where the gradient is zero"
    assert_says(layer_step(paper), message, "paper")


def of_the_whole_network(params: Any, grads: Any, state: Any, **hyper: Any) -> Any:
    """Flash's step with norms of all layers together."""

    class Joined(Flash):
        def norm(self, x: Any) -> Any:
            arrays = params if any(x is p for p in params.values()) else grads
            return np.sqrt(sum(np.sum(y * y) for y in arrays.values()))

    return layer_step(Joined())(params, grads, state, **hyper)


def test_the_norm_of_the_whole_network_is_named() -> None:
    message = "step does not conform to rule 'flash'; wrong trust ratio: its norms are those of the whole network"
    assert_says(of_the_whole_network, message)


def test_a_rate_outside_of_the_buffer_is_named_where_the_rule_has_it_inside() -> None:
    def step(p: Any, g: Any, v: Any, **hyper: Any) -> Any:
        return lars_step(p, g, v, rule="barlow", **hyper)

    message = (
        "step does not conform to rule 'optax'; wrong learning rate: it is outside the momentum buffer, not inside\n"
        "its steps are those of rule 'barlow' or 'vicreg', ..."
    )
    assert_says(layer_step(step), message, "optax")


class RawAndUndecayed(BufferStartsRaw, WithoutEps):
    """Two mistakes."""


def test_two_mistakes_are_both_named() -> None:
    message = (
        "step does not conform to rule 'flash'; wrong momentum buffer: it starts as the raw gradient, not as the "
        "scaled one\nwrong eps: it is missing"
    )
    assert_says(layer_step(RawAndUndecayed()), message)


# -------------------------------------------------------------------------------------- what is not a known mistake


class HalfMomentum(Flash):
    def __call__(self, p: Any, g: Any, v: Any, *, momentum: float, **hyper: Any) -> Any:
        return super().__call__(p, g, v, momentum=momentum / 2, **hyper)


class Clamped(Flash):
    def scaled(self, p: Any, g: Any, **hyper: Any) -> Any:
        return super().scaled(p, np.clip(g, -0.5, 0.5), **hyper)


class TwiceDecayed(Flash):
    def scaled(self, p: Any, g: Any, **hyper: Any) -> Any:
        return super().scaled(p, g, **hyper) + hyper["weight_decay"] * p


UNKNOWN = "none of the known mistakes, nor another rule, gives its numbers"
OTHER = {
    HalfMomentum: r"case 'momentum, constant learning rate', step 2 of 5, layer 'conv' \(lr=0.5, .*momentum=0.9\): "
    r"p - p' = \S+ g \+ \S+ p \+ 0.225 v, expected \S+ g \+ \S+ p \+ 0.45 v; wrong: momentum",
    TwiceDecayed: r"case 'no momentum', step 1 of 5, layer 'conv' .*: p - p' = \S+ g \+ \S+ p, expected .*; "
    "wrong: weight decay",
    Clamped: r"case 'no momentum', step 1 of 5, .*: p - p' is not a sum of multiples of g, p; it is off by \S+ of the "
    "expected step",
}


@pytest.mark.parametrize("wrong", OTHER, ids=lambda cls: cls.__name__)
def test_another_mistake_is_located(wrong: type) -> None:
    with pytest.raises(AssertionError) as caught:
        assert_conforms(layer_step(wrong()))
    first = re.escape(f"step does not conform to rule 'flash'; {UNKNOWN}\nfirst difference: ")
    assert re.fullmatch(first + OTHER[wrong], str(caught.value)), str(caught.value)


def test_steps_that_are_not_finite_are_located() -> None:
    class Unguarded(Flash):
        def scaled(self, p: Any, g: Any, *, weight_decay: float, trust_coefficient: float, eps: float) -> Any:
            return trust_coefficient * self.norm(p) / (self.norm(g) * weight_decay) * (g + weight_decay * p)

    with pytest.raises(AssertionError, match=r"case 'no momentum, no weight decay', step 1 .*: p' is not finite$"):
        with np.errstate(all="ignore"):
            assert_conforms(layer_step(Unguarded()), tolerance=1e6)


def test_nan_does_not_conform() -> None:
    def step(p: Any, g: Any, v: Any, **hyper: Any) -> Any:
        return np.full_like(p, np.nan), None

    with pytest.raises(AssertionError, match=r"case 'no momentum', step 1 .*: p' is not finite$"):
        assert_conforms(layer_step(step))


def test_steps_that_differ_in_late_digits_are_shown_with_these() -> None:
    def step(p: Any, g: Any, v: Any, *, lr: float, **hyper: Any) -> Any:
        return lars_step(p, g, v, lr=lr * (1 + 1e-8), **hyper)

    shown = r"p - p' = 0.01\d{9,} g \+ 0.00\d{9,} p, expected 0.01\d{9,} g \+ 0.00\d{9,} p; wrong: learning rate times"
    with pytest.raises(AssertionError, match=shown):
        assert_conforms(layer_step(step), options=["eps"])


def test_a_step_in_float32_is_told_apart_from_a_wrong_one() -> None:
    def narrow(p: Any, g: Any, v: Any, **hyper: Any) -> Any:
        return Flash()(p.astype("float32"), g.astype("float32"), v, **hyper)

    message = "step does not conform to rule 'flash'; it computes in less than float64; compare it with dtype='float32'"
    assert_says(layer_step(narrow), message)
    message = "step does not conform to rule 'apex'; wrong trust ratio: layers without weight decay are not adapted"
    assert_says(layer_step(narrow), message, "apex")


# ---------------------------------------------------------------------------------------------------------- arguments


def test_the_step_is_given_the_options_that_the_original_has() -> None:
    names = {}
    for rule in ("flash", "kozistr", "optax", "barlow"):

        def step(params: Any, grads: Any, state: Any, **hyper: Any) -> Any:
            names[rule] = set(hyper) - {"lr", "momentum", "weight_decay", "trust_coefficient"}  # noqa: B023
            return params, None

        with pytest.raises(AssertionError):
            assert_conforms(step, rule)
    assert names == {
        "flash": {"eps", "dampening", "nesterov"},
        "kozistr": {"dampening", "nesterov"},
        "optax": {"eps", "nesterov"},
        "barlow": set(),
    }


def test_what_is_built_into_a_step_is_not_passed() -> None:
    def step(p: Any, g: Any, v: Any, *, lr: float, momentum: float, weight_decay: float, nesterov: bool) -> Any:
        built_in = {"trust_coefficient": 0.01, "eps": 0.1, "trust_clip": True}
        return lars_step(p, g, v, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, **built_in)

    built_in = {"trust_coefficient": 0.01, "eps": 0.1, "trust_clip": True}
    assert_conforms(layer_step(step), "flash", options=["nesterov"], **built_in)
    with pytest.raises(AssertionError, match=r"LARC"):
        assert_conforms(layer_step(step), "flash", options=["nesterov"], trust_coefficient=0.01, eps=0.1)


def test_layers_with_options_of_their_own() -> None:
    def own(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
        return {"weight_decay": 0.0, "adapt": False} if len(shape) <= 1 else {}

    assert_conforms(layer_step(VectorsExcluded()), layer_options=own)


def test_a_rule_of_ones_own() -> None:
    def rule(S: Any, hyper: Any, xp: Any) -> Any:
        p_norm, g_norm, _ = norms(S, xp)
        C = xp.zeros((S.shape[0], 6), dtype=S.dtype)
        C[:, 4] = hyper.lr * p_norm / (g_norm + 1)
        return C

    def step(p: Any, g: Any, v: Any, *, lr: float, **hyper: Any) -> Any:
        return p - lr * np.linalg.norm(p) / (np.linalg.norm(g) + 1) * g, None

    assert_conforms(layer_step(step), rule)
    message = f"step does not conform to the rule given; {UNKNOWN}"
    assert_says(layer_step(lambda p, g, v, *, lr, **h: step(p, g, v, lr=2 * lr)), message, rule)


ERRORS = {
    "no function": (3, {}, TypeError, "step must be a function; got 3"),
    "no pair": (
        lambda params, grads, state, **hyper: params,
        {},
        TypeError,
        "step must return a pair of a dict of parameters and a state; got dict",
    ),
    "other names": (
        lambda params, grads, state, **hyper: ({"w": 1.0}, None),
        {},
        ValueError,
        "step must return parameters named conv, weight, bias; got w",
    ),
    "other shapes": (
        lambda params, grads, state, **hyper: ({name: p[0] for name, p in params.items()}, None),
        {},
        ValueError,
        "step must return 'conv' with shape (3, 2, 2); got (2, 2) (case 'no momentum', step 1)",
    ),
    "options": (
        paper,
        {"options": ["eta"]},
        ValueError,
        "options must be among 'eps', 'dampening', 'nesterov'; got 'eta'",
    ),
    "dtype": (paper, {"dtype": "float16"}, ValueError, "dtype must be one of 'float64', 'float32'; got 'float16'"),
    "rule": (
        paper,
        {"rule": "flsh"},
        ValueError,
        "rule must be one of lars_array.RULES, or a function; got 'flsh'; did you mean 'flash'?",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_is_not_understood_is_refused(case: str) -> None:
    step, options, kind, message = ERRORS[case]
    with pytest.raises(kind) as caught:
        assert_conforms(step, **options)
    assert type(caught.value) is kind
    assert str(caught.value) == message
