r"""LARS, defined once, on Array API arrays.

A step is three stages, and data flows one way through them::

    sums            read p, g          S, shape (layers, 3)
    coefficients    tiny maths on S    C, shape (layers, 6)
    apply           read p, g, v       v' = m v + alpha g + beta p
                                       p' = p - (kappa v' + lambda g + mu p)

p is a layer's parameters, g its gradient, v its momentum buffer. Every published variant of LARS is this affine map;
the variants differ in six scalars a layer, which a *rule* computes from three sums over the layer. The default rule,
flash's, stands here; `lars_array.rules` holds the others and `lars_array.blocks` what all are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from array_api_compat import array_namespace

from lars_array.arrays import asarray, check_buffer, check_gradient, check_parameter, of_dtype
from lars_array.blocks import momentum_form, norms, trust_ratio, update_weights
from lars_array.dtypes import accumulation_dtype, compute_dtype, is_half, real_parts
from lars_array.hyper import Hyper, at_step, needs_buffer, vectors
from lars_array.nonfinite import finite, largest, most_squares, refuse_nonfinite
from lars_array.registry import Rule, evaluate, register, resolve
from lars_array.rows import stack_of, together

__all__ = [
    "Plan",
    "Prepared",
    "apply",
    "coefficients",
    "difference",
    "difference_without_buffer",
    "displacement",
    "flash",
    "gradient_factor",
    "lars_step",
    "over_slices",
    "plan",
    "prepare",
    "prepare_from",
    "sums",
]

Array = Any
Namespace = Any
Operand = tuple[Array, Array, Array | None]


def sums(
    params: Sequence[Array],
    grads: Sequence[Array],
    buffers: Sequence[Array | None],
    operand: Operand | None = None,
    *,
    xp: Namespace,
    leads: Sequence[tuple[int, ...]] | None = None,
) -> Array:
    r"""First stage: three sums of squares a layer.

    Parameters
    ----------
    params, grads, buffers : sequences of arrays
        One entry a layer, the arrays of a layer of one shape; a buffer may be None. Nothing is modified.
    operand : tuple (gamma, w, h) of arrays of shape (layers,), optional
        The weights of the third sum; h may be None. Without them it repeats the second.
    xp : Array API namespace
        Namespace of the arrays.
    leads : sequence of tuple of int, optional
        An entry that isn't () says that the slices along these leading axes are layers, and have a row each.

    Returns
    -------
    array of shape (layers, 3)
        :math:`\sum p^2`, :math:`\sum g^2` and :math:`\sum (\gamma g + w p + h v)^2` (of complex arrays: over real and
        imaginary parts), in float64 where the namespace has it, else in float32. In float64 the square of any finite
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
            gamma, w, h = (None if x is None else over_slices(x[rows], lead, p.ndim, xp) for x in operand)
            d_parts = [gamma * g_part + w * p_part for g_part, p_part in zip(g_parts, p_parts)]
            if h is not None and v is not None:
                v_parts = real_parts(v, wide, xp)
                d_parts = [d_part + h * v_part for d_part, v_part in zip(d_parts, v_parts)]
        squares = [sum(_sum_of_squares(part, lead, xp) for part in parts) for parts in (p_parts, g_parts, d_parts)]
        tables.append(xp.reshape(xp.stack(squares, axis=-1), (-1, 3)) if leads else xp.stack(squares))
        row += prod(lead)
    return xp.concat(tables, axis=0) if leads else xp.stack(tables)


def over_slices(x: Array, lead: tuple[int, ...], ndim: int, xp: Namespace) -> Array:
    """Return one number for each slice along leading axes in a shape that goes with arrays of `ndim` axes."""
    return xp.reshape(x, (*lead, *[1] * (ndim - len(lead)))) if lead else x


def _sum_of_squares(x: Array, lead: tuple[int, ...], xp: Namespace) -> Array:
    if not lead:
        return xp.sum(x * x)
    return xp.sum(x * x, axis=tuple(range(len(lead), x.ndim))) if x.ndim > len(lead) else x * x


def coefficients(S: Array, hyper: Hyper, rules: Sequence[Rule], gamma: Array, *, xp: Namespace) -> Array:
    r"""Second stage: from the sums of all layers to the six scalars of each.

    Parameters
    ----------
    S : array of shape (layers, 3)
        What `sums` returned.
    hyper : Hyper
        Hyper-parameters, arrays of shape (layers,).
    rules : sequence of Rule
        The variant of LARS of each layer.
    gamma : array of shape (layers,)
        What a layer's gradient is multiplied by first, see `gradient_factor`; rules do not see it.
    xp : Array API namespace
        Namespace of the arrays.

    Returns
    -------
    array of shape (layers, 6)
        Columns :math:`m, \alpha, \beta, \kappa, \lambda, \mu` of the affine map, of the dtype of S.

    Raises
    ------
    ValueError
        If a rule returns an array of another shape.
    """
    seen = xp.stack([S[:, 0], gamma**2 * S[:, 1], S[:, 2]], axis=1)
    C = evaluate(rules, seen, hyper, xp)
    m, alpha, beta, kappa, lam, mu = (C[:, i] for i in range(6))
    return xp.stack([m, gamma * alpha, beta, kappa, gamma * lam, mu], axis=1)


@register("flash", "bolts", "lightly", "torch-optimizer")
def flash(S: Array, hyper: Hyper, xp: Namespace) -> Array:
    r"""Return the coefficients of ``flash.core.optimizers.LARS`` (lightning-flash 0.8.2), the default.

    .. math::
        r = \eta \frac{\|p\|}{\|g\| + w\|p\| + \epsilon}, \qquad d = r\,(g + w p), \qquad
        v' = \mu v + (1 - \tau)\,d, \qquad p' = p - \text{lr}\,v'

    Layers with w = 0 are not adapted (unless ``always_adapt``). Where a norm is zero, :math:`d = g`: neither ratio nor
    decay. Also lightning-bolts 0.7.0, lightly 1.6, torch_optimizer 0.3.0.
    """
    p_norm, g_norm, _ = norms(S, xp)
    w = hyper.weight_decay
    defined = (p_norm > 0) & (g_norm > 0)
    adapted = defined & ((w != 0) | hyper.always_adapt)
    ratio = xp.where(adapted, trust_ratio(p_norm, g_norm + w * p_norm, adapted, hyper, xp), 1.0)
    decay = xp.where(defined | ~hyper.adapt, w, 0.0)
    return momentum_form(ratio, hyper.lr, decay, hyper, xp)


def difference(p: Any, g: Any, v: Any, m: Any, alpha: Any, beta: Any, kappa: Any, lam: Any, mu: Any) -> tuple[Any, Any]:
    """Return p - p' and v' as plain arithmetic, of one element or of many: the whole update."""
    v = m * v + alpha * g + beta * p
    return kappa * v + lam * g + mu * p, v


def difference_without_buffer(p: Any, g: Any, alpha: Any, beta: Any, kappa: Any, lam: Any, mu: Any) -> Any:
    """Return p - p' where v is zero and not kept: `difference` with alpha g + beta p in the place of v'."""
    return (lam + kappa * alpha) * g + (mu + kappa * beta) * p


def displacement(p: Array, g: Array, v: Array | None, c: Array, *, xp: Namespace) -> tuple[Array, Array | None]:
    r"""Do all of the third stage but its last subtraction, for one layer.

    Parameters
    ----------
    p, g, v, c : arrays
        As for `apply`; not modified.
    xp : Array API namespace
        Namespace of the arrays.

    Returns
    -------
    tuple (d, v')
        :math:`d = p - p'`, of the dtype that p is computed in, and what `apply` returns beside p'.
    """
    kind = compute_dtype(p, xp)
    c, lead = xp.astype(c, kind, copy=False), tuple(c.shape[:-1])
    m, alpha, beta, kappa, lam, mu = (over_slices(c[..., i], lead, p.ndim, xp) for i in range(6))
    wide_p, wide_g = xp.astype(p, kind, copy=False), xp.astype(g, kind, copy=False)
    if v is None:
        return of_dtype(difference_without_buffer(wide_p, wide_g, alpha, beta, kappa, lam, mu), kind, xp), None
    d, new_v = difference(wide_p, wide_g, v, m, alpha, beta, kappa, lam, mu)
    return of_dtype(d, kind, xp), of_dtype(new_v, v.dtype, xp)


def apply(p: Array, g: Array, v: Array | None, c: Array, *, xp: Namespace) -> tuple[Array, Array | None]:
    r"""Third stage, for one layer: :math:`v' = m v + \alpha g + \beta p, p' = p - (\kappa v' + \lambda g + \mu p)`.

    Parameters
    ----------
    p, g : arrays of one shape
        Parameters and gradient; not modified. They are cast to the type that p is computed in, float32 for half
        precision, else its own.
    v : array or None
        Momentum buffer, of the shape of p and the dtype computed in; not modified. None where none is kept.
    c : array of shape (6,), or (\*lead, 6)
        The layer's row of the coefficients; or a row for each slice of p along leading axes.
    xp : Array API namespace
        Namespace of the arrays.

    Returns
    -------
    tuple (p', v')
        Arrays of the dtypes of p and v; v' is None where v is.
    """
    d, new_v = displacement(p, g, v, c, xp=xp)
    return of_dtype(xp.astype(p, compute_dtype(p, xp), copy=False) - d, p.dtype, xp), new_v


# ------------------------------------------------------------------------------------------- the stages, put together


def gradient_factor(hyper: Hyper, S: Array | None, *, xp: Namespace) -> Array:
    r"""Return :math:`\gamma`, what a layer's gradient is multiplied by before anything else is done with it.

    .. math::
        \gamma = \pm s \cdot \min\Bigl(1, \frac{\text{max\_grad\_norm}}{\|s\,g\|_{\text{all layers}}}\Bigr),
        \qquad s = \text{rescale\_grad}

    with minus for ``maximize``: a function of the sums, so that clipping by the global norm needs no pass of its own.

    Parameters
    ----------
    hyper : Hyper
        Hyper-parameters, arrays of shape (layers,).
    S : array of shape (layers, 3), or None
        What `sums` returned. None: nothing is clipped.
    xp : Array API namespace
        Namespace of the arrays.

    Returns
    -------
    array of shape (layers,)
        The factor of each layer.
    """
    gamma = xp.where(hyper.maximize, -hyper.rescale_grad, hyper.rescale_grad)
    if S is None:
        return gamma
    norm = xp.sqrt(xp.sum(hyper.rescale_grad**2 * S[:, 1]))
    clipped = norm > hyper.max_grad_norm
    return gamma * xp.where(clipped, hyper.max_grad_norm / xp.where(clipped, norm, 1.0), 1.0)


class Prepared(NamedTuple):
    """What is known of a step before memory is looked at; a row a layer, or a row for several that are alike.

    Parameters
    ----------
    hyper : Hyper
        Hyper-parameters, arrays of shape (rows,).
    rules : sequence of Rule
        One a row.
    gamma : array of shape (rows,)
        What gradients are multiplied by, before any clipping.
    operand : tuple of arrays, or None
        The weights of the third sum, if a rule reads it.
    clips : bool
        Whether gradients are clipped by their global norm, so that gamma and operand depend on the sums.
    """

    hyper: Hyper
    rules: Sequence[Rule]
    gamma: Array
    operand: Operand | None
    clips: bool


class Plan(NamedTuple):
    """A step about to be taken: sums, factors of the gradients, coefficients, and what they were made with.

    Of a step that was taken the coefficients, the most of it, are not kept.
    """

    S: Array
    gamma: Array
    C: Array | None
    hyper: Hyper
    rules: Sequence[Rule]


def prepare(
    groups: Sequence[Mapping[str, Any]],
    group_of: Sequence[int],
    *,
    first: Any,
    previous_lr: Any,
    like: Array,
    xp: Namespace,
) -> Prepared:
    """All that comes before the first stage.

    Parameters
    ----------
    groups : sequence of mappings
        Complete and checked hyper-parameters, one mapping a group.
    group_of : sequence of int
        The group of each row.
    first, previous_lr : sequences or arrays of shape (rows,)
        As in `Hyper`.
    like : array
        An array on the device where the tiny maths shall be done.
    xp : Array API namespace
        Its namespace.

    Returns
    -------
    Prepared
        What `plan` starts from.
    """
    hyper = vectors(groups, group_of, first, previous_lr, like=like, xp=xp)
    return prepare_from(hyper, groups, group_of, xp=xp)


def prepare_from(
    hyper: Hyper, groups: Sequence[Mapping[str, Any]], group_of: Sequence[int], *, xp: Namespace
) -> Prepared:
    """Do what `prepare` does once the hyper-parameters are spread over the rows.

    Parameters
    ----------
    hyper : Hyper
        Hyper-parameters, arrays of shape (rows,).
    groups, group_of : sequences
        As for `prepare`.
    xp : Array API namespace
        Namespace of the arrays.

    Returns
    -------
    Prepared
        What `plan` starts from.
    """
    rule_of_group = [resolve(group["rule"]) for group in groups]
    rules = [rule_of_group[k] for k in group_of]
    gamma = gradient_factor(hyper, None, xp=xp)
    reads_third_sum = any(rule.norm_of != "gradient" for rule in rules)
    operand = _operand(hyper, rules, gamma, xp) if reads_third_sum else None
    clips = any(group["max_grad_norm"] is not None for group in groups)
    return Prepared(hyper, rules, gamma, operand, clips)


def clipped(prepared: Prepared, S: Array, *, xp: Namespace) -> Prepared:
    """Return what is known once the gradients' norms are.

    The third sum is over clipped gradients: if there is an operand, all sums are to be taken again with it.

    Parameters
    ----------
    prepared : Prepared
        A row a layer, or one for several that are alike.
    S : array of shape (rows, 3)
        What `sums` returned; of layers that are alike the sum.
    xp : Array API namespace
        Namespace of the arrays.

    Returns
    -------
    Prepared
        With nothing left to be clipped.
    """
    hyper, rules, _, operand, _ = prepared
    gamma = gradient_factor(hyper, S, xp=xp)
    operand = None if operand is None else _operand(hyper, rules, gamma, xp)
    return Prepared(hyper, rules, gamma, operand, False)


def plan(
    prepared: Prepared,
    measure: Callable[[Operand | None], Array],
    *,
    xp: Namespace,
    joined: Sequence[Sequence[int]] = (),
) -> Plan:
    """First and second stage, whoever visits memory.

    Parameters
    ----------
    prepared : Prepared
        A row a layer.
    measure : callable
        ``measure(operand) -> S``: the first stage over all layers, as `sums` does it.
    xp : Array API namespace
        Namespace of the arrays.
    joined : sequence of sequences of int
        Rows that are one layer, and have its sums.

    Returns
    -------
    Plan
        All that `apply` and telemetry need.
    """
    S = measure(None if prepared.clips else prepared.operand)
    if prepared.clips:
        prepared = clipped(prepared, S, xp=xp)
        if prepared.operand is not None:
            S = measure(prepared.operand)
    S = together(S, joined, xp=xp)
    hyper, rules, gamma, *_ = prepared
    return Plan(S, gamma, coefficients(S, hyper, rules, gamma, xp=xp), hyper, rules)


def lars_step(
    p: Array,
    g: Array,
    v: Array | None = None,
    *,
    lr: Any,
    momentum: Any = 0,
    dampening: Any = 0,
    weight_decay: Any = 0,
    nesterov: bool = False,
    trust_coefficient: Any = 1e-3,
    eps: Any = 1e-8,
    previous_lr: Any = None,
    nonfinite: str = "propagate",
    **options: Any,
) -> tuple[Array, Array | None]:
    r"""One step of one layer, as a pure function of arrays of any Array API namespace, also under ``jax.jit``.

    Parameters
    ----------
    p, g : arrays of one shape and device
        Parameters and gradient; not modified. Both are real, of any two types, or complex, of one.
    v : array of the shape of p, or None
        Momentum buffer, float32 for half precision, else of the dtype of p; not modified. None: the first step.
    lr, momentum, dampening, weight_decay : float or 0-d array
        Hyper-parameters, as in `LARS`.
    nesterov : bool
        Nesterov's form of momentum.
    trust_coefficient, eps : float or 0-d array
        Hyper-parameters, as in `LARS`.
    previous_lr : float or 0-d array, optional
        Learning rate of the step before, which rules with momentum correction need. None: no change.
    nonfinite : {"propagate", "skip", "raise"}
        What becomes of non-finite sums: they go through; p and v are returned as they were (v None: as zeros); or
        `NonFiniteError`, which reads a value and so cannot be traced.
    **options
        The other options of `LARS`: rule, trust_clip, trust_bounds, always_adapt, adapt, maximize, rescale_grad,
        max_grad_norm, layer_axes.

    Returns
    -------
    tuple (p', v')
        New arrays; but v' is v as it is where neither momentum nor the rule asks for a buffer.

    Raises
    ------
    ValueError, TypeError
        As for `LARS`.

    References
    ----------
    You, Gitman, Ginsburg 2017, arXiv 1708.03888.

    Examples
    --------
    >>> import numpy as np
    >>> p, g = np.array([3.0, 4.0]), np.array([0.6, 0.8])
    >>> p, v = lars_step(p, g, None, lr=0.1, momentum=0.9, weight_decay=1e-4)
    >>> p
    array([2.9997, 3.9996])
    """
    given = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov}
    given |= {"trust_coefficient": trust_coefficient, "eps": eps, "nonfinite": nonfinite}
    group = at_step(given | options, 0)
    check_parameter("p", p)
    check_gradient("p", g, p)
    if group["master_weights"] and is_half(p):
        raise ValueError("master_weights must be False in lars_step; give the master, of float32, as p")
    if v is not None:
        check_buffer("p", v, p)
    xp = array_namespace(p)
    buffer = v
    if not needs_buffer(group):
        buffer = None
    elif v is None:
        buffer = xp.zeros_like(p, dtype=compute_dtype(p, xp))
    before = group["lr"] if previous_lr is None else previous_lr
    stack = stack_of("p", p, group["layer_axes"], 0)

    def measure(operand: Operand | None) -> Array:
        return sums([p], [g], [buffer], operand, xp=xp, leads=[stack.lead])

    first = [v is None] * stack.rows
    prepared = prepare([group], [0] * stack.rows, first=first, previous_lr=[before] * stack.rows, like=p, xp=xp)
    step = plan(prepared, measure, xp=xp)
    if nonfinite != "propagate":
        most = most_squares([p], [g.dtype], like=p, xp=xp)
        ok = xp.all(finite(step.S, step.C, largest([p], like=p, xp=xp), most, xp=xp))
        if nonfinite == "raise" and not bool(ok):
            refuse_nonfinite("p", p, g, xp=xp)
    new_p, new_v = apply(p, g, buffer, stack.coefficients(step.C, xp=xp), xp=xp)
    if nonfinite != "propagate":
        new_p, new_v = xp.where(ok, new_p, p), None if buffer is None else xp.where(ok, new_v, buffer)
    return new_p, v if buffer is None else new_v


def _operand(hyper: Hyper, rules: Sequence[Rule], gamma: Array, xp: Namespace) -> Operand:
    """Return the weights of the third sum that each layer's rule asks for."""

    def where_norm_of(names: tuple[str, ...], x: Array, y: float) -> Array:
        concerned = [rule.norm_of in names for rule in rules]
        if all(concerned):  # nothing has to be brought to a device
            return x
        return xp.where(asarray(concerned, xp.bool, like=gamma, xp=xp), x, y)

    w = where_norm_of(("decayed gradient", "update"), hyper.weight_decay, 0.0)
    if all(rule.norm_of != "update" for rule in rules):
        return gamma, w, None
    a, h = update_weights(hyper, xp)
    a, h = where_norm_of(("update",), a, 1.0), where_norm_of(("update",), h, 0.0)
    return a * gamma, a * w, h
