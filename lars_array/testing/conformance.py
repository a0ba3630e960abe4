"""The comparison of a step with a rule, and the message that says what is wrong with it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from lars_array._messages import listed, shown
from lars_array.core import resolve
from lars_array.testing.cases import OPTIONS, Case, cases, options_of
from lars_array.testing.diagnosis import Bound, Difference, Run, first_difference, reasons
from lars_array.testing.reference import LayerOptions, Model
from lars_array.testing.wrappers import Step

__all__ = ["assert_conforms"]

# Of the step's length. Rounding of the parameters themselves is allowed for besides.
TOLERANCES = {"float64": 1e-9, "float32": 1e-4}


def assert_conforms(
    step: Step,
    rule: Any = "flash",
    *,
    options: Collection[str] | None = None,
    layer_options: LayerOptions | None = None,
    dtype: str = "float64",
    tolerance: float | None = None,
    **fixed: Any,
) -> None:
    """Raise an error that says which term is wrong, unless a LARS takes the steps of a rule.

    The step is run on up to 15 small cases of five steps on a network of three layers: without and with momentum,
    weight decay, eps, dampening and nesterov, with gradients and parameters of zeros, with tiny and with huge norms.
    The learning rate changes in all but one. The expected parameters are computed by `lars_array.update` in float64.
    A step that differs is compared with the rule with each of some 35 known mistakes, with the other rules, and with
    pairs of mistakes. If none of them gives its numbers, the error names the first case, step and layer that differ,
    and writes both steps as sums of the momentum buffer, the gradient and the parameters.

    Parameters
    ----------
    step : callable
        ``step(params, grads, state, *, lr, **hyper) -> (params, state)``, one step of the whole network. `params` and
        `grads` are dicts of NumPy arrays by layer, of which each call gets its own; the new parameters are returned in
        the same form. `state` is whatever the step returned last, None at the first step of a case. The
        hyper-parameters are momentum, weight_decay, trust_coefficient and `options`, under the names of `LARS`.
        `layer_step`, `torch_step` and `optax_step` make such a step.
    rule : str, Rule or callable
        The rule to conform to, as in `LARS`.
    options : collection of str, optional
        Those of "eps", "dampening" and "nesterov" that the step takes. Default: those that the original of the rule
        has.
    layer_options : callable, optional
        ``layer_options(name, shape) -> dict``, the hyper-parameters of `LARS` by which the step treats a layer
        differently by itself, such as ``{"weight_decay": 0.0, "adapt": False}`` for layers with one axis.
    dtype : {"float64", "float32"}
        The type of the arrays that the step is given.
    tolerance : float, optional
        The largest difference relative to the length of the step. Default: 1e-9, or 1e-4 in float32.
    **fixed
        Hyper-parameters of `LARS` that are built into the step, such as ``eps=0.0`` or ``trust_clip=True``. They are
        not passed to it.

    Raises
    ------
    AssertionError
        If the step differs from the rule.
    TypeError, ValueError
        If an argument, or what the step returned, has another form.

    Examples
    --------
    >>> import numpy as np
    >>> from lars_array.testing import layer_step
    >>> def raw_gradient_first(p, g, v, *, lr, momentum, weight_decay, trust_coefficient):
    ...     d = g + weight_decay * p
    ...     p_norm, d_norm = np.linalg.norm(p), np.linalg.norm(d)
    ...     ratio = trust_coefficient * p_norm / d_norm if p_norm > 0 and d_norm > 0 else 1.0
    ...     v = g if v is None else momentum * v + ratio * d
    ...     return p - lr * v, v
    >>> assert_conforms(layer_step(raw_gradient_first), "barlow", eps=0.0)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    AssertionError: step does not conform to rule 'barlow'; wrong momentum buffer: it starts as the raw gradient, ...
    """
    given = [x for x in (options_of(rule) if options is None else options) if x not in fixed]
    if unknown := set(given) - {*OPTIONS}:
        raise ValueError(f"options must be among {', '.join(map(repr, OPTIONS))}; got {shown(min(unknown))}")
    if dtype not in TOLERANCES:
        raise ValueError(f"dtype must be one of {', '.join(map(repr, TOLERANCES))}; got {shown(dtype)}")
    if not callable(step):
        raise TypeError(f"step must be a function; got {shown(step)}")
    built_in = fixed if "eps" in given else {"eps": 0.0} | fixed
    model = Model(resolve(rule), built_in, layer_options)
    runs = [Run(case, _results(step, case, fixed)) for case in cases(given, dtype)]
    bound = Bound.of(TOLERANCES[dtype] if tolerance is None else tolerance, dtype)
    difference = first_difference(model, runs, bound)
    if difference is None:
        return
    name = f"rule {shown(rule)}" if isinstance(rule, str) else "the rule given"
    found = _reasons(model, difference, runs, bound, dtype)
    lines = [f"step does not conform to {name}; {found[0]}", *found[1:], f"first difference: {difference}"]
    raise AssertionError("\n".join(lines))


def _reasons(model: Model, difference: Difference, runs: list[Run], bound: Bound, dtype: str) -> list[str]:
    """Return the parts of the message before the first difference."""
    coarse = Bound.of(TOLERANCES["float32"], "float32")
    hint = "it computes in less than float64; compare it with dtype='float32'"
    if dtype == "float64" and first_difference(model, runs, coarse) is None:
        return [hint]
    hints = [hint] if any(str(p.dtype) != dtype for run in runs for p in run.params[0].values()) else []
    found = reasons(model, difference, runs, coarse if hints else bound)
    if not found:
        return ["none of the known mistakes, nor another rule, gives its numbers", *hints]
    return [*found, f"this explains all {len(runs)} cases", *hints]


def _results(step: Step, case: Case, fixed: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the parameters after each step of a case."""
    hyper = {name: value for name, value in case.hyper.items() if name not in fixed}
    params, state, found = case.params, None, []
    for t, (lr, grads) in enumerate(zip(case.rates, case.grads, strict=True)):
        result = step(_copies(params), _copies(grads), state, lr=lr, **hyper)
        if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], Mapping):
            raise TypeError(f"step must return a pair of a dict of parameters and a state; got {type(result).__name__}")
        new, state = result
        if new.keys() != params.keys():
            raise ValueError(f"step must return parameters named {listed(params)}; got {listed(new)}")
        arrays = {name: np.array(new[name], copy=True) for name in params}
        for name, p in params.items():
            if arrays[name].shape != p.shape:
                shapes = f"{p.shape}; got {arrays[name].shape}"
                raise ValueError(
                    f"step must return {shown(name)} with shape {shapes} (case {shown(case.name)}, step {t + 1})"
                )
        params = arrays
        found.append(params)
    return found


def _copies(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {name: x.copy() for name, x in arrays.items()}
