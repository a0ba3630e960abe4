"""LARS as functions on Array API arrays.

A step has three stages, and data flows through them in one direction::

    sums            read p, g          S, shape (layers, 3)
    coefficients    small maths on S   C, shape (layers, 6)
    apply           read p, g, v       v' = m v + alpha g + beta p
                                       p' = p - (kappa v' + lambda g + mu p)

p are a layer's parameters, g is its gradient and v its momentum buffer. Every published variant of LARS is this affine
map; the variants differ in six scalars per layer, which a *rule* computes from three sums over the layer. This module
contains the default rule, flash's; `lars_array.rules` contains the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf, prod
from sys import float_info
from typing import Any, NamedTuple

from array_api_compat import is_jax_array, is_torch_array

from lars_array._arrays import accumulation_dtype, asarray, compute_dtype, of_dtype, real_parts
from lars_array._messages import listed, near, shown
from lars_array.layers import LayerRows

__all__ = [
    "BOOLEANS",
    "NORM_OF",
    "RULES",
    "Exchange",
    "Hyper",
    "Rule",
    "RuleInputs",
    "StageOutputs",
    "apply",
    "clip_gradients",
    "coefficients",
    "difference",
    "difference_without_buffer",
    "displacement",
    "flash",
    "gradient_factor",
    "momentum_form",
    "norms",
    "plan",
    "register",
    "resolve",
    "rule_inputs",
    "scaled_sums",
    "step",
    "sum_over_parts",
    "sums",
    "trust_ratio",
    "update_weights",
    "with_max_ratio",
]

Array = Any
Namespace = Any
Operand = tuple[Array, Array, Array | None]
Exchange = Callable[[Array, Array], tuple[Array, Array]]


# -------------------------------------------------------------------------------------------------- first stage: sums


def sums(
    params: Sequence[Array],
    grads: Sequence[Array],
    buffers: Sequence[Array | None],
    operand: Operand | None = None,
    *,
    xp: Namespace,
    leads: Sequence[tuple[int, ...]] | None = None,
) -> Array:
    r"""First stage: three sums of squares per layer.

    Parameters
    ----------
    params, grads, buffers : sequences of arrays
        One entry per parameter, its arrays of equal shape; a buffer may be None. Not modified.
    operand : tuple (gamma, w, h) of arrays of shape (layers,), optional
        The weights of the third sum; h may be None. Without them the third sum repeats the second.
    xp : Array API namespace
        Namespace of the arrays.
    leads : sequence of tuple of int, optional
        For an entry other than (), the slices along these leading axes are layers with a row each.

    Returns
    -------
    array of shape (layers, 3)
        :math:`\sum p^2`, :math:`\sum g^2` and :math:`\sum (\gamma g + w p + h v)^2` (for complex arrays over real and
        imaginary parts), in float64 if the namespace has it, else in float32. In float64 the square of any finite
        float32, float16 or bfloat16 number is exact, and no sum of them overflows.
    """
    wide = accumulation_dtype(xp)
    tables: list[Array] = []
    row = 0
    for p, g, v, lead in zip(params, grads, buffers, leads or [()] * len(params), strict=True):
        rows = row if not lead else slice(row, row + prod(lead))
        p_parts, g_parts = real_parts(p, wide, xp), real_parts(g, wide, xp)
        d_parts = g_parts
        if operand is not None:
            gamma, w, h = (None if x is None else _over_slices(x[rows], lead, p.ndim, xp) for x in operand)
            d_parts = [gamma * g_part + w * p_part for g_part, p_part in zip(g_parts, p_parts)]
            if h is not None and v is not None:
                v_parts = real_parts(v, wide, xp)
                d_parts = [d_part + h * v_part for d_part, v_part in zip(d_parts, v_parts)]
        squares = [sum(_sum_of_squares(part, lead, xp) for part in parts) for parts in (p_parts, g_parts, d_parts)]
        tables.append(xp.reshape(xp.stack(squares, axis=-1), (-1, 3)) if leads else xp.stack(squares))
        row += prod(lead)
    return xp.concat(tables, axis=0) if leads else xp.stack(tables)


def _over_slices(x: Array, lead: tuple[int, ...], ndim: int, xp: Namespace) -> Array:
    """Return one number per slice along leading axes in a shape that broadcasts over arrays of `ndim` axes."""
    return xp.reshape(x, (*lead, *[1] * (ndim - len(lead)))) if lead else x


def _sum_of_squares(x: Array, lead: tuple[int, ...], xp: Namespace) -> Array:
    if not lead:
        return xp.sum(x * x)
    return xp.sum(x * x, axis=tuple(range(len(lead), x.ndim))) if x.ndim > len(lead) else x * x


def sum_over_parts(S: Array, joined: Sequence[Sequence[int]], xp: Namespace) -> Array:
    """Return the sums, where each row of a layer with several rows holds the total over these rows."""
    if not joined:
        return S
    place = list(range(S.shape[0]))
    totals = []
    for k, rows in enumerate(joined, S.shape[0]):
        totals.append(xp.sum(xp.take(S, asarray(list(rows), like=S, xp=xp), axis=0), axis=0, keepdims=True))
        for row in rows:
            place[row] = k
    return xp.take(xp.concat([S, *totals], axis=0), asarray(place, like=S, xp=xp), axis=0)


# ------------------------------------------------------------------------------------- second stage: hyper-parameters


class Hyper(NamedTuple):
    """The hyper-parameters of one step, each an array of shape ``(layers,)``.

    `trust_lower` and `trust_upper` are the two `trust_bounds`; `first` is true where the layer has no momentum buffer
    yet; `previous_lr` is the learning rate of the layer's last step, 0 before the first; `max_ratio_root` is the square
    root of the largest trust ratio that its type can hold. The sums that a rule receives already include the effects of
    `maximize`, `rescale_grad` and `max_grad_norm`.
    """

    lr: Any
    momentum: Any
    dampening: Any
    weight_decay: Any
    nesterov: Any
    trust_coefficient: Any
    eps: Any
    trust_clip: Any
    trust_lower: Any
    trust_upper: Any
    always_adapt: Any
    adapt: Any
    maximize: Any
    rescale_grad: Any
    max_grad_norm: Any
    first: Any
    previous_lr: Any
    max_ratio_root: Any = float_info.max**0.5


BOOLEANS = ("nesterov", "trust_clip", "always_adapt", "adapt", "maximize")


def with_max_ratio(hyper: Hyper, limit: Any, *, xp: Namespace) -> Hyper:
    """Return the hyper-parameters with the largest trust ratio of which no product with them exceeds `limit`.

    `limit` is the largest number of the compute dtype. It is the largest ratio where the hyper-parameters alone exceed
    it.
    """
    most = limit
    for x in (hyper.lr, hyper.weight_decay, hyper.momentum, xp.abs(1 - hyper.dampening), hyper.rescale_grad):
        most = most / xp.where(x > 1, x, 1.0)
    return hyper._replace(max_ratio_root=xp.sqrt(xp.where(hyper.trust_coefficient < most, most, limit)))


def gradient_factor(hyper: Hyper, S: Array | None, *, xp: Namespace, squares: Array | None = None) -> Array:
    r"""Return :math:`\gamma`, the factor of each layer's gradient, an array of shape (layers,).

    .. math::
        \gamma = \pm s \cdot \min\Bigl(1, \frac{\mathrm{max\_grad\_norm}}{\|s\,g\|_{\text{all layers}}}\Bigr),
        \qquad s = \mathrm{rescale\_grad}

    with minus for ``maximize``. It depends on the sums S only, so clipping by the global norm needs no extra pass; if S
    is None, gradients are not clipped. If a gradient holds a NaN, gamma is NaN for all layers that are clipped.
    `squares` is the square of the norm where S does not hold all layers.
    """
    gamma = xp.where(hyper.maximize, -hyper.rescale_grad, hyper.rescale_grad)
    if S is None:
        return gamma
    norm = _root(xp.sum(hyper.rescale_grad**2 * S[:, 1]) if squares is None else squares, xp)
    clipped = ~(norm <= hyper.max_grad_norm) & (hyper.max_grad_norm < inf)
    return gamma * xp.where(clipped, hyper.max_grad_norm / xp.where(clipped, norm, 1.0), 1.0)


# --------------------------------------------------------------------------------------------- second stage: the rule

RuleFunction = Callable[[Any, Any, Any], Any]
NORM_OF = ("gradient", "decayed gradient", "update")


class Rule(NamedTuple):
    """A variant of LARS: a function from sums to coefficients, and its requirements for the other stages.

    Parameters
    ----------
    function : callable
        ``function(S, hyper, xp) -> C`` on Array API arrays. It must be pure: kernels may call it once with symbols and
        replay the recorded operations at every step. S of shape (layers, 3) holds the sums of p², of g² and of the
        vector in `norm_of`; hyper is a `Hyper`; C of shape (layers, 6) is stacked from the columns m, alpha, beta,
        kappa, lambda and mu. Branch on values with ``xp.where``.
    norm_of : str
        The vector of the third sum: "gradient", g, for rules that do not use it; "decayed gradient", g + w p; or
        "update", g + w p + h v, with the h that makes it the step direction of SGD with momentum.
    keeps_buffer : bool
        Whether the momentum buffer is kept even if momentum is 0, as in some originals.
    damped_nesterov : bool
        Whether nesterov may be combined with dampening.
    trust_bounds : pair of float, optional
        The default for `trust_bounds`.
    """

    function: RuleFunction
    norm_of: str = "gradient"
    keeps_buffer: bool = False
    damped_nesterov: bool = False
    trust_bounds: tuple[float, float] | None = None


RULES: dict[str, Rule] = {}


def register(*names: str, **properties: Any) -> Callable[[RuleFunction], RuleFunction]:
    """Return a decorator that registers a function as a rule under each of `names`.

    Parameters
    ----------
    *names : str
        New names.
    **properties
        The fields of `Rule` other than `function`.

    Returns
    -------
    callable
        The decorator; it returns the function unchanged.

    Raises
    ------
    ValueError
        If a name is already in use, or there is none.
    TypeError
        If a name is not a string, or what is decorated not a function.
    """
    if not names:
        raise ValueError("register needs a name: @register('my-rule')")
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"rule names must be strings; got {shown(name)}; write @register('my-rule')")

    def decorate(function: RuleFunction) -> RuleFunction:
        if not callable(function):
            raise TypeError(f"a rule must be a function; got {shown(function)}")
        rule = resolve(Rule(function, **properties))
        for name in names:
            if name in RULES:
                raise ValueError(f"rule names must be new; {shown(name)} is taken")
        RULES.update(dict.fromkeys(names, rule))
        return function

    return decorate


def resolve(rule: Any) -> Rule:
    """Return the `Rule` for a name, a function or a `Rule`; a function gets the norm of the decayed gradient.

    Raises ValueError for an unknown name or `norm_of`, and TypeError for any other type.
    """
    if isinstance(rule, Rule):
        if rule.norm_of not in NORM_OF:
            raise ValueError(f"norm_of must be one of {', '.join(map(repr, NORM_OF))}; got {shown(rule.norm_of)}")
        return rule
    if isinstance(rule, str):
        if rule not in RULES:
            question = near(rule, RULES)
            known = "lars_array.RULES" if question else listed(sorted(RULES))
            raise ValueError(f"rule must be one of {known}, or a function; got {shown(rule)}{question}")
        return RULES[rule]
    if callable(rule):
        return Rule(rule, norm_of="decayed gradient")
    raise TypeError(f"rule must be a name, a function or a Rule; got {shown(rule)}")


def coefficients(S: Array, hyper: Hyper, rules: Sequence[Rule], gamma: Array, *, xp: Namespace) -> Array:
    r"""Second stage: from the sums of all layers to six scalars per layer.

    Parameters
    ----------
    S : array of shape (layers, 3)
        The result of `sums`.
    hyper : Hyper
        Hyper-parameters, arrays of shape (layers,).
    rules : sequence of Rule
        The rule of each layer.
    gamma : array of shape (layers,)
        The factor of each layer's gradient; it is applied outside of the rules.
    xp : Array API namespace
        Namespace of the arrays.

    Returns
    -------
    array of shape (layers, 6)
        Columns :math:`m, \alpha, \beta, \kappa, \lambda, \mu` of the affine map, with the dtype of S.

    Raises
    ------
    ValueError
        If a rule returns an array of another shape.
    """
    C = _evaluate(rules, scaled_sums(S, gamma, xp=xp), hyper, xp)
    m, alpha, beta, kappa, lam, mu = (C[:, i] for i in range(6))
    return xp.stack([m, gamma * alpha, beta, kappa, gamma * lam, mu], axis=1)


def scaled_sums(S: Array, gamma: Array, *, xp: Namespace) -> Array:
    """Return the sums that a rule receives, those of gradients times gamma.

    gamma is 0 where gradients are clipped and their sum overflows.
    """
    return xp.stack([S[:, 0], xp.where(gamma == 0, 0.0, gamma**2 * S[:, 1]), S[:, 2]], axis=1)


def _evaluate(rules: Sequence[Rule], S: Array, hyper: Hyper, xp: Namespace) -> Array:
    """Return the coefficients of each layer, computed by its own rule."""
    layers_of: dict[int, list[int]] = {}
    for layer, rule in enumerate(rules):
        layers_of.setdefault(id(rule), []).append(layer)
    if len(layers_of) == 1:
        return _evaluate_one(rules[0], S, hyper, xp)
    rows = []
    for layers in layers_of.values():
        index = asarray(layers, like=S, xp=xp)
        own = Hyper(*(x if isinstance(x, float) else xp.take(x, index, axis=0) for x in hyper))
        rows.append(_evaluate_one(rules[layers[0]], xp.take(S, index, axis=0), own, xp))
    place = {layer: row for row, layer in enumerate(layer for layers in layers_of.values() for layer in layers)}
    order = asarray([place[layer] for layer in range(len(rules))], like=S, xp=xp)
    return xp.take(xp.concat(rows, axis=0), order, axis=0)


def _evaluate_one(rule: Rule, S: Array, hyper: Hyper, xp: Namespace) -> Array:
    C = rule.function(S, hyper, xp)
    if tuple(C.shape) != (S.shape[0], 6):
        raise ValueError(f"a rule must return an array of shape ({S.shape[0]}, 6); got shape {shown(tuple(C.shape))}")
    return C if C.dtype == S.dtype else xp.astype(C, S.dtype)


# ------------------------------------------------------------------------------------------ building blocks for rules


def norms(S: Array, xp: Namespace) -> tuple[Array, Array, Array]:
    """Return three norms per layer: of p, of g and of the vector in the rule's `norm_of`.

    Parameters
    ----------
    S : array of shape (layers, 3)
        The result of `sums`.
    xp : Array API namespace
        Namespace of the arrays.

    Returns
    -------
    tuple of three arrays of shape (layers,)
        Square roots of the columns of S.
    """
    roots = _root(S, xp)
    return roots[:, 0], roots[:, 1], roots[:, 2]


def _root(x: Array, xp: Namespace) -> Array:
    """Return the square root; where arrays have derivatives, with a finite one at 0."""
    if not (is_jax_array(x) or is_torch_array(x)):
        return xp.sqrt(x)
    is_zero = x == 0
    return xp.where(is_zero, x, xp.sqrt(xp.where(is_zero, 1.0, x)))


def trust_ratio(p_norm: Array, denominator: Array, defined: Array, hyper: Hyper, xp: Namespace) -> Array:
    r"""Return each layer's trust ratio, :math:`\eta \|p\| / (\text{denominator} + \epsilon)`.

    The ratio is 1 where `defined` is false, and where the type cannot hold it: such a denominator counts as zero. Then
    `trust_bounds` are applied, then `trust_clip` (LARC), :math:`\min(\text{ratio} / \text{lr}, 1)`; finally the ratio
    of layers with ``adapt=False`` is set to 1. A norm that is NaN makes the ratio NaN.

    Parameters
    ----------
    p_norm, denominator : arrays of shape (layers,)
        Norm of the parameters, and the rule's denominator without eps.
    defined : bool array of shape (layers,)
        Where the ratio is defined; usually where neither norm is zero, ``(p_norm != 0) & (g_norm != 0)``, which is true
        for NaN.
    hyper : Hyper
        Hyper-parameters, arrays of shape (layers,).
    xp : Array API namespace
        Namespace of the arrays.

    Returns
    -------
    array of shape (layers,)
        The ratios.
    """
    denominator = denominator + hyper.eps
    numerator = hyper.trust_coefficient * p_norm
    # By the root on both sides, neither of which overflows or underflows where norms are usual.
    too_small = denominator * hyper.max_ratio_root < numerator / hyper.max_ratio_root
    defined = xp.where(too_small, False, defined)
    ratio = numerator / xp.where(defined, denominator, 1.0)
    ratio = xp.where(defined, ratio, 1.0)
    ratio = xp.where(ratio < hyper.trust_lower, hyper.trust_lower, ratio)
    ratio = xp.where(ratio > hyper.trust_upper, hyper.trust_upper, ratio)
    beyond_lr = ratio >= hyper.lr
    larc = xp.where(beyond_lr, 1.0, ratio / xp.where(beyond_lr, 1.0, hyper.lr))
    return xp.where(hyper.adapt, xp.where(hyper.trust_clip, larc, ratio), 1.0)


def momentum_form(
    grad_scale: Array,
    step_scale: Array,
    weight_decay: Array,
    hyper: Hyper,
    xp: Namespace,
    *,
    momentum: Array | None = None,
    dampen_first_step: bool = False,
) -> Array:
    r"""Return the coefficients of SGD with momentum applied to a scaled gradient, :math:`d = g + w p`.

    .. math::
        v' = \mu v + (1 - \tau)\,\mathrm{grad\_scale}\,d, \qquad
        p' = p - \mathrm{step\_scale}\,v' \quad\text{or, with nesterov,}\quad
        p' = p - \mathrm{step\_scale}\,(\mathrm{grad\_scale}\,d + \mu v')

    Implementations differ in the factor that contains the learning rate and the trust ratio. Without momentum,
    :math:`p' = p - \mathrm{step\_scale}\,\mathrm{grad\_scale}\,d`.

    Parameters
    ----------
    grad_scale, step_scale, weight_decay : arrays of shape (layers,)
        The two factors, and w.
    hyper : Hyper
        Hyper-parameters, arrays of shape (layers,).
    xp : Array API namespace
        Namespace of the arrays.
    momentum : array of shape (layers,), optional
        The factor of v; by default ``hyper.momentum``.
    dampen_first_step : bool
        Whether dampening also applies to a layer's first step, which torch's SGD exempts.

    Returns
    -------
    array of shape (layers, 6)
        The coefficients.
    """
    m = hyper.momentum if momentum is None else momentum
    alpha = grad_scale * (1 - hyper.dampening if dampen_first_step else _undamped(hyper, xp))
    direct = _direct(hyper)
    kappa = xp.where(direct, step_scale * hyper.momentum, step_scale)
    lam = xp.where(direct, step_scale * grad_scale, 0.0)
    return xp.stack([m, alpha, alpha * weight_decay, kappa, lam, lam * weight_decay], axis=1)


def update_weights(hyper: Hyper, xp: Namespace) -> tuple[Array, Array]:
    """Return a and h for which a d + h v is the update of SGD with momentum, before any ratio."""
    undamped = _undamped(hyper, xp)
    direct = _direct(hyper)
    a = xp.where(direct, 1 + hyper.momentum * undamped, undamped)
    return a, xp.where(direct, hyper.momentum**2, hyper.momentum)


def _undamped(hyper: Hyper, xp: Namespace) -> Array:
    return xp.where(hyper.first, 1.0, 1 - hyper.dampening)


def _direct(hyper: Hyper) -> Array:
    """Return where the gradient also acts on p directly, not only through v: with nesterov, or without momentum."""
    return hyper.nesterov | (hyper.momentum == 0)


@register("flash", "bolts", "lightly", "torch-optimizer")
def flash(S: Array, hyper: Hyper, xp: Namespace) -> Array:
    r"""Return the coefficients of ``flash.core.optimizers.LARS`` (lightning-flash 0.8.2), the default.

    .. math::
        r = \eta \frac{\|p\|}{\|g\| + w\|p\| + \epsilon}, \qquad d = r\,(g + w p), \qquad
        v' = \mu v + (1 - \tau)\,d, \qquad p' = p - \text{lr}\,v'

    Layers with w = 0 are not adapted (unless ``always_adapt``). Where a norm is zero, :math:`d = g`, without ratio and
    weight decay. Also lightning-bolts 0.7.0, lightly 1.6, torch_optimizer 0.3.0.
    """
    p_norm, g_norm, _ = norms(S, xp)
    w = hyper.weight_decay
    is_zero = (p_norm == 0) | (g_norm == 0)
    adapted = xp.where(is_zero, False, (w != 0) | hyper.always_adapt)
    ratio = xp.where(adapted, trust_ratio(p_norm, g_norm + w * p_norm, adapted, hyper, xp), 1.0)
    decay = xp.where(hyper.adapt, xp.where(is_zero, 0.0, w), w)
    return momentum_form(ratio, hyper.lr, decay, hyper, xp)


# ------------------------------------------------------------------------------------------------- third stage: apply


def difference(p: Any, g: Any, v: Any, m: Any, alpha: Any, beta: Any, kappa: Any, lam: Any, mu: Any) -> tuple[Any, Any]:
    """Return p - p' and v' as plain arithmetic on scalars or arrays: the whole update."""
    v = m * v + alpha * g + beta * p
    return kappa * v + lam * g + mu * p, v


def difference_without_buffer(p: Any, g: Any, alpha: Any, beta: Any, kappa: Any, lam: Any, mu: Any) -> Any:
    """Return p - p' where v is zero and not kept: `difference` with alpha g + beta p as v'."""
    return (lam + kappa * alpha) * g + (mu + kappa * beta) * p


def displacement(p: Array, g: Array, v: Array | None, c: Array, *, xp: Namespace) -> tuple[Array, Array | None]:
    """Return :math:`d = p - p'`, in the compute dtype of p, and v'; arguments as for `apply`, not modified."""
    kind = compute_dtype(p, xp)
    c, lead = xp.astype(c, kind, copy=False), tuple(c.shape[:-1])
    m, alpha, beta, kappa, lam, mu = (_over_slices(c[..., i], lead, p.ndim, xp) for i in range(6))
    wide_p, wide_g = xp.astype(p, kind, copy=False), xp.astype(g, kind, copy=False)
    if v is None:
        return of_dtype(difference_without_buffer(wide_p, wide_g, alpha, beta, kappa, lam, mu), kind, xp), None
    d, new_v = difference(wide_p, wide_g, v, m, alpha, beta, kappa, lam, mu)
    return of_dtype(d, kind, xp), of_dtype(new_v, v.dtype, xp)


def apply(p: Array, g: Array, v: Array | None, c: Array, *, xp: Namespace) -> tuple[Array, Array | None]:
    r"""Third stage, for one parameter: :math:`v' = m v + \alpha g + \beta p, p' = p - (\kappa v' + \lambda g + \mu p)`.

    Parameters
    ----------
    p, g : arrays of one shape
        Parameters and gradient; not modified. They are cast to the compute dtype of p: float32 for half precision, else
        the dtype of p.
    v : array or None
        Momentum buffer, with the shape of p and its compute dtype; not modified. None: no buffer is kept.
    c : array of shape (6,), or (\*lead, 6)
        The layer's row of the coefficients, or one row for each slice of p along leading axes.
    xp : Array API namespace
        Namespace of the arrays.

    Returns
    -------
    tuple (p', v')
        New arrays with the dtypes of p and v; v' is None if v is.
    """
    d, new_v = displacement(p, g, v, c, xp=xp)
    return of_dtype(xp.astype(p, compute_dtype(p, xp), copy=False) - d, p.dtype, xp), new_v


# -------------------------------------------------------------------------------------------- all stages of a step


class RuleInputs(NamedTuple):
    """The inputs of the first two stages: arrays of shape (rows,), with one rule per row.

    A row stands for one layer, or for several layers that differ only in their sums. `gamma` does not include clipping
    by the global norm; if `clips`, gamma and operand depend on the sums. `operand` is None if no rule uses the third
    sum.
    """

    hyper: Hyper
    rules: Sequence[Rule]
    gamma: Array
    operand: Operand | None
    clips: bool


class StageOutputs(NamedTuple):
    """The results of the first two stages, and the inputs that telemetry needs to interpret them."""

    S: Array
    gamma: Array
    C: Array
    hyper: Hyper
    rules: Sequence[Rule]


def rule_inputs(hyper: Hyper, rules: Sequence[Rule], *, clips: bool, xp: Namespace) -> RuleInputs:
    """Return the inputs of the stages for hyper-parameters of shape (rows,)."""
    gamma = gradient_factor(hyper, None, xp=xp)
    reads_third_sum = any(rule.norm_of != "gradient" for rule in rules)
    operand = _operand(hyper, rules, gamma, xp) if reads_third_sum else None
    return RuleInputs(hyper, rules, gamma, operand, clips)


def clip_gradients(inputs: RuleInputs, S: Array, *, xp: Namespace, squares: Array | None = None) -> RuleInputs:
    """Return the inputs, with `clips` False, for gradients clipped by their global norm.

    S holds the sums of each row; for a row of several layers, their total. `squares` is that of `gradient_factor`. The
    third sum is over clipped gradients: if `operand` is not None, the caller has to compute the sums again with it.
    """
    hyper, rules, _, operand, _ = inputs
    gamma = gradient_factor(hyper, S, xp=xp, squares=squares)
    operand = None if operand is None else _operand(hyper, rules, gamma, xp)
    return RuleInputs(hyper, rules, gamma, operand, False)


def plan(
    inputs: RuleInputs,
    measure: Callable[[Operand | None], Array],
    *,
    xp: Namespace,
    joined: Sequence[Sequence[int]] = (),
    exchange: Exchange | None = None,
) -> StageOutputs:
    """Run the first two stages, given ``measure(operand) -> S``, which computes the sums as `sums` does.

    `joined` lists the rows of each layer that has several; such rows share their sums. Where processes hold pieces of
    layers, ``exchange(S, rescale_grad) -> (S, squares)`` adds the sums over parts and processes instead.
    """
    own, factors = measure(None if inputs.clips else inputs.operand), inputs.hyper.rescale_grad
    S, squares = (own, None) if exchange is None else exchange(own, factors)
    if inputs.clips:
        inputs = clip_gradients(inputs, S, xp=xp, squares=squares)
        if inputs.operand is not None:
            own = measure(inputs.operand)
            S = own if exchange is None else exchange(own, factors)[0]
    S = sum_over_parts(S, joined, xp) if exchange is None else S
    hyper, rules, gamma, *_ = inputs
    return StageOutputs(S, gamma, coefficients(S, hyper, rules, gamma, xp=xp), hyper, rules)


def step(
    params: Sequence[Array],
    grads: Sequence[Array],
    buffers: Sequence[Array | None],
    inputs: RuleInputs,
    rows: LayerRows,
    *,
    xp: Namespace,
    reduce: Callable[[Array], Array] | None = None,
    exchange: Exchange | None = None,
    third: Callable[..., tuple[Array, Array | None]] = apply,
) -> tuple[list[Array], list[Array | None], StageOutputs]:
    """Run all three stages on many parameters, as a pure function.

    Parameters
    ----------
    params, grads, buffers : sequences of arrays
        As for `sums`; not modified.
    inputs : RuleInputs
        One row per layer.
    rows : LayerRows
        The layers of the parameters.
    xp : Array API namespace
        Namespace of the arrays.
    reduce : callable, optional
        Applied to each table of sums, shape (layers, 3), to add the sums of parts on other devices.
    exchange : callable, optional
        See `plan`.
    third : callable
        `apply`, or `displacement` for differences instead of new parameters.

    Returns
    -------
    tuple (results, buffers, StageOutputs)
        The two results of `third` for each parameter; sums and coefficients.
    """
    leads = [own.lead for own in rows.slices] if rows.is_stacked else None

    def measure(operand: Operand | None) -> Array:
        S = sums(params, grads, buffers, operand, xp=xp, leads=leads)
        return S if reduce is None else reduce(S)

    outputs = plan(inputs, measure, xp=xp, joined=rows.joined, exchange=exchange)
    arrays = zip(params, grads, buffers, rows.slices, strict=True)
    results = [third(p, g, v, own.coefficients(outputs.C, xp=xp), xp=xp) for p, g, v, own in arrays]
    return [new_p for new_p, _ in results], [new_v for _, new_v in results], outputs


def _operand(hyper: Hyper, rules: Sequence[Rule], gamma: Array, xp: Namespace) -> Operand:
    """Return the weights of the third sum that each layer's rule requires."""

    def where_norm_of(names: tuple[str, ...], x: Array, y: float) -> Array:
        concerned = [rule.norm_of in names for rule in rules]
        if all(concerned):  # no copy to a device is needed
            return x
        return xp.where(asarray(concerned, xp.bool, like=gamma, xp=xp), x, y)

    w = where_norm_of(("decayed gradient", "update"), hyper.weight_decay, 0.0)
    if all(rule.norm_of != "update" for rule in rules):
        return gamma, w, None
    a, h = update_weights(hyper, xp)
    a, h = where_norm_of(("update",), a, 1.0), where_norm_of(("update",), h, 0.0)
    return a * gamma, a * w, h
