"""LARS as a gradient transformation of optax: `lars_array.core` on ``jax.numpy``, traced or not."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from lars_array.arrays import check_buffer, check_gradient, check_parameter
from lars_array.core import displacement, plan, prepare, sums
from lars_array.dtypes import accumulation_dtype, compute_dtype
from lars_array.hyper import DEFAULTS, at_step, needs_buffer
from lars_array.nonfinite import finite, largest
from lars_array.presets import PRESETS
from lars_array.registry import Rule
from lars_array.rows import LayerOf, joined_rows, labels_of, row_labels, stacks_of
from lars_jax.collective import mapped_axes, summed_over
from lars_jax.trees import as_jax, is_bool, is_count, leaves_as, named_leaves, spread

__all__ = ["LarsState", "Said", "groups_of", "lars", "said_by"]


class LarsState(NamedTuple):
    """What `lars` carries from step to step.

    Parameters
    ----------
    count : int32 array of shape ()
        Steps taken.
    trace : pytree, or None
        The momentum buffers, in the structure of the parameters: float32 for half precision, else of the parameter's
        dtype. None where none is kept.
    first : bool array of shape (leaves,)
        True where a leaf's buffer was not used yet.
    previous_lr : array of shape (leaves,)
        The learning rate of a leaf's last step, 0 before the first.
    """

    count: Any
    trace: Any
    first: Any
    previous_lr: Any


def lars(
    learning_rate: Any,
    momentum: Any = 0.9,
    weight_decay: Any = 0.0,
    *,
    dampening: Any = 0.0,
    nesterov: bool = False,
    trust_coefficient: Any = 0.001,
    eps: Any = None,
    rule: str | Rule | Callable[..., Any] = "flash",
    trust_clip: bool = False,
    trust_bounds: tuple[float, float] | None = None,
    always_adapt: bool = False,
    maximize: bool = False,
    rescale_grad: Any = 1.0,
    max_grad_norm: Any = None,
    nonfinite: str = "propagate",
    weight_decay_mask: Any = True,
    trust_ratio_mask: Any = True,
    layer_axes: Any = None,
    layer_of: LayerOf = None,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Layer-wise adaptive rate scaling (You et al. 2017), each leaf a layer.

    By default the step is that of ``flash.core.optimizers.LARS``; ``lars(lr, rule="optax")`` is ``optax.lars(lr)``.
    Numbers may be traced arrays, and functions of the number of steps taken.

    Parameters
    ----------
    learning_rate : float, array of shape (), or schedule
        The learning rate. It is part of the step: nothing more is to be scaled by it.
    momentum : float
        :math:`\mu`.
    weight_decay : float
        w, the L2 penalty. With 0, flash's rule adapts nothing: this is SGD.
    dampening : float
        As in `lars_array.LARS`.
    nesterov : bool
        Nesterov's form of momentum.
    trust_coefficient : float
        :math:`\eta`.
    eps : float, optional
        :math:`\epsilon`; by default that of the implementation that `rule` names, 1e-8 for flash and 0 for optax.
    rule : str, callable or Rule
        The variant of LARS, as in `lars_array.LARS`.
    trust_clip : bool
        As in `lars_array.LARS`.
    trust_bounds : pair of float, optional
        As in `lars_array.LARS`.
    always_adapt, maximize : bool
        As in `lars_array.LARS`.
    rescale_grad, max_grad_norm : float
        As in `lars_array.LARS`; the second may be None.
    nonfinite : {"propagate", "skip"}
        What becomes of a step whose sums or coefficients are not finite: it is taken; or the updates are zeros and the
        state stays as it is.
    weight_decay_mask, trust_ratio_mask : bool, pytree of bool, or callable
        Which leaves are decayed, and which are adapted: one value for all; a tree of the parameters' structure, or a
        prefix of it; or a function that returns one of these, given the parameters. A leaf that is adapted and alone
        is not decayed is adapted by rules, too, that leave out what is not decayed.
    layer_axes : int, pytree of int, or callable, optional
        How many leading axes of a leaf say which layer it is, none by default: with 1 each ``p[i]`` is a layer, as in
        the stacked parameters of scanned layers.
    layer_of : mapping or callable, optional
        Which layer a leaf is a part of, by its path with dots, "attention.query" say; as in `lars_array.LARS`.
    axis_name : hashable, tuple of hashable, pytree of these, or callable, optional
        Under ``jax.shard_map`` or ``jax.pmap``, the mapped axes that a leaf is split over; None or () for a leaf that
        every device has whole. One collective sums the norms of the whole model. A stacked leaf must not be split along
        its `layer_axes` there. None of this is needed for arrays that are sharded under ``jax.jit``.

    Returns
    -------
    optax.GradientTransformationExtraArgs
        Its ``update`` needs the parameters. Updates have the parameters' dtypes, and are None where a gradient is;
        extra arguments are ignored.

    Raises
    ------
    ValueError, TypeError
        As for `lars_array.LARS`, from ``lars`` for what it can check, else from ``init`` or ``update``.

    Notes
    -----
    float16 and bfloat16 are computed on in float32, with a float32 buffer. Sums are in float64 with
    ``jax_enable_x64``, else in float32, where a norm beyond 1.8e19 has no square.

    References
    ----------
    You, Gitman, Ginsburg 2017, arXiv 1708.03888; optax 0.2.8, optax/_src/alias.py.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, optax
    >>> solver = lars(0.5, weight_decay=1e-4, trust_coefficient=0.1)
    >>> params = jnp.array([1.0, 2.0, 3.0])
    >>> state = solver.init(params)
    >>> for _ in range(5):
    ...     loss, grads = jax.value_and_grad(lambda x: jnp.sum(x**2))(params)
    ...     updates, state = solver.update(grads, state, params)
    ...     params = optax.apply_updates(params, updates)
    ...     print(f"{loss:.3f}")
    14.000
    12.635
    10.294
    7.489
    4.731
    """
    said = _said(locals())
    given = said.given
    keeps = needs_buffer(given)

    def init(params: Any) -> LarsState:
        names, leaves, structure = named_leaves(params)
        leaves = list(map(as_jax, leaves))
        for name, p in zip(names, leaves):
            check_parameter(name, p)
        trace = [jnp.zeros_like(p, dtype=compute_dtype(p, jnp)) for p in leaves]
        return LarsState(
            count=jnp.zeros((), jnp.int32),
            trace=structure.unflatten(trace) if keeps else None,
            first=jnp.ones(len(leaves), jnp.bool),
            previous_lr=jnp.zeros(len(leaves), accumulation_dtype(jnp)),
        )

    def update(updates: Any, state: LarsState, params: Any = None, **extra: Any) -> tuple[Any, LarsState]:
        del extra
        if params is None:
            raise ValueError("update of lars needs params: update(grads, state, params)")
        if not isinstance(state, LarsState):
            raise TypeError(f"state must be what init or update of lars returned; got {type(state).__name__}")
        names, leaves, structure = named_leaves(params)
        leaves = list(map(as_jax, leaves))
        grads = list(map(as_jax, leaves_as(structure, updates, "updates")))
        trace = leaves_as(structure, state.trace, "the trace of state") if keeps else [None] * len(leaves)
        index = [i for i, g in enumerate(grads) if g is not None]
        _check(state, names, leaves, grads, trace)
        if not index:
            return updates, state._replace(count=optax.safe_increment(state.count))

        numbers = {name: x(state.count) if callable(x) and name != "rule" else x for name, x in given.items()}
        groups, group_of = groups_of(at_step(numbers, state.count), params, said)
        labels = labels_of(layer_of, names)
        lists: Any = (leaves, grads, trace)
        ps, gs, vs = ([x[i] for i in index] for x in lists)
        stacks = stacks_of([names[i] for i in index], ps, [groups[group_of[i]]["layer_axes"] for i in index])
        joined = joined_rows(row_labels([labels[i] for i in index], stacks))
        owner = [k for k, stack in enumerate(stacks) for _ in range(stack.rows)]
        over = mapped_axes(axis_name, params)

        def measure(operand: Any) -> Any:
            S = sums(ps, gs, vs, operand, xp=jnp, leads=[stack.lead for stack in stacks])
            return summed_over(S, [over[index[k]] for k in owner])

        place = jnp.asarray(index)
        of_rows = jnp.asarray([index[k] for k in owner])
        prepared = prepare(
            groups,
            [group_of[index[k]] for k in owner],
            first=state.first[of_rows],
            previous_lr=state.previous_lr[of_rows],
            like=ps[0],
            xp=jnp,
        )
        step = plan(prepared, measure, xp=jnp, joined=joined)
        taken = None
        if nonfinite == "skip":
            taken = jnp.all(finite(step.S, step.C, largest([ps[k] for k in owner], like=ps[0], xp=jnp), xp=jnp))

        def chosen(new: Any, old: Any) -> Any:
            return new if taken is None else jnp.where(taken, new, old)

        new_updates, new_trace = list(grads), list(trace)
        for i, stack, p, g, v in zip(index, stacks, ps, gs, vs, strict=True):
            d, new_v = displacement(p, g, v, stack.coefficients(step.C, xp=jnp), xp=jnp)
            new_updates[i] = chosen(-d, jnp.zeros_like(d)).astype(p.dtype)
            new_trace[i] = None if v is None else chosen(new_v, v)
        rates = step.hyper.lr[jnp.asarray([stack.start for stack in stacks])].astype(state.previous_lr.dtype)
        new_state = LarsState(
            count=chosen(optax.safe_increment(state.count), state.count),
            trace=structure.unflatten(new_trace) if keeps else None,
            first=chosen(state.first.at[place].set(False), state.first) if keeps else state.first,
            previous_lr=chosen(state.previous_lr.at[place].set(rates), state.previous_lr),
        )
        return structure.unflatten(new_updates), new_state

    return optax.GradientTransformationExtraArgs(init, update)


class Said(NamedTuple):
    """What `lars` was called with: hyper-parameters as `lars_array` names them, and what is said of each leaf."""

    given: dict[str, Any]
    weight_decay_mask: Any
    trust_ratio_mask: Any
    layer_axes: Any


def said_by(*arguments: Any, **options: Any) -> Said:
    """Return what `lars` would be told by a call with these arguments."""
    bound = inspect.signature(lars).bind(*arguments, **options)
    bound.apply_defaults()
    return _said(bound.arguments)


def _said(arguments: Mapping[str, Any]) -> Said:
    given = {name: arguments[name] for name in DEFAULTS if name in arguments} | {"lr": arguments["learning_rate"]}
    rule = given["rule"]
    if given["eps"] is None:
        given["eps"] = PRESETS.get(rule, {}).get("eps", DEFAULTS["eps"]) if isinstance(rule, str) else DEFAULTS["eps"]
    if given["nonfinite"] == "raise":
        raise ValueError("nonfinite must be 'propagate' or 'skip', since a traced step can't raise; got 'raise'")
    for name in ("weight_decay_mask", "trust_ratio_mask"):
        if arguments[name] is None:
            raise TypeError(f"{name} must be a bool, a pytree of bool, or a function; got None")
    del given["layer_axes"]
    at_step({name: 0.0 if callable(x) and name != "rule" else x for name, x in given.items()}, 0)
    axes = 0 if arguments["layer_axes"] is None else arguments["layer_axes"]
    return Said(given, arguments["weight_decay_mask"], arguments["trust_ratio_mask"], axes)


def groups_of(options: Mapping[str, Any], params: Any, said: Said) -> tuple[list[dict[str, Any]], list[int]]:
    """Return groups of hyper-parameters, and the group of each leaf."""
    decayed = spread("weight_decay_mask", said.weight_decay_mask, params, is_bool, "True or False")
    adapted = spread("trust_ratio_mask", said.trust_ratio_mask, params, is_bool, "True or False")
    axes = spread("layer_axes", said.layer_axes, params, is_count, "integers of at least 0")
    of_leaves = list(zip(map(bool, decayed), map(bool, adapted), axes))
    kinds = list(dict.fromkeys(of_leaves))
    groups = []
    for decays, adapts, count in kinds:
        excluded = {} if decays or _is_zero(options["weight_decay"]) else {"weight_decay": 0.0, "always_adapt": True}
        groups.append({**options, "adapt": adapts, "layer_axes": count, **excluded})
    return groups, [kinds.index(kind) for kind in of_leaves]


def _is_zero(x: Any) -> bool:
    return isinstance(x, int | float) and x == 0


def _check(state: LarsState, names: list[str], leaves: list[Any], grads: list[Any], trace: list[Any]) -> None:
    """Refuse what does not fit, naming the leaf."""
    if state.first.shape != (len(names),):
        raise ValueError(f"state must be of as many leaves as the parameters, {len(names)}; got {state.first.shape[0]}")
    for name, p, g, v in zip(names, leaves, grads, trace, strict=True):
        check_parameter(name, p)
        if g is not None:
            check_gradient(name, g, p)
        if v is not None:
            check_buffer(name, v, p)
