"""LARS as a gradient transformation of optax: `lars_array.core` on ``jax.numpy``, traced or not."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

import lars_array
from lars_array import core
from lars_array._arrays import accumulation_dtype, check_buffer, check_gradient, check_parameter, compute_dtype
from lars_array._stepper import finite_layers, max_finite
from lars_array.core import Rule
from lars_array.hyperparams import DEFAULTS, at_step, defaults_from, inputs_of, needs_buffer
from lars_array.layers import LayerOf, LayerRows, labels_of
from lars_jax._collective import mapped_axes, sum_over_devices
from lars_jax._trees import as_jax, is_bool, is_count, leaves_as, named_leaves, spread

__all__ = ["LarsArguments", "LarsState", "bind_arguments", "groups_of", "lars"]


class LarsState(NamedTuple):
    """The state of `lars` between steps.

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
    Arguments as for `lars_array.LARS`, except: numbers may be traced arrays and functions of the number of steps taken;
    momentum is 0.9 by default; there are no groups, `adapt`, `master_weights` and `kernel`; and those below.

    Parameters
    ----------
    learning_rate : float, array of shape (), or schedule
        `lr`. It is part of the step: do not add ``optax.scale(-lr)`` after it.
    eps : float, optional
        By default that of the implementation that `rule` names, 1e-8 for flash and 0 for optax.
    nonfinite : {"propagate", "skip"}
        A traced step can't raise. With "skip", updates that are not finite become zeros and the state does not change.
    weight_decay_mask, trust_ratio_mask : bool, pytree of bool, or callable
        Which leaves are decayed, and which are adapted: one value for all; a tree of the parameters' structure, or a
        prefix of it; or a function that returns one of these, given the parameters. A leaf that is adapted but excluded
        from decay is adapted by all rules, also by those that leave out layers without decay.
    layer_axes : int, pytree of int, or callable, optional
        The number of leading axes of a leaf along which slices are layers, as in the stacked parameters of scanned
        layers; in the forms of the masks, 0 by default.
    layer_of : mapping or callable, optional
        By the paths of leaves with dots, such as "attention.query".
    axis_name : hashable, tuple of hashable, pytree of these, or callable, optional
        Under ``jax.shard_map`` or ``jax.pmap``, the mapped axes that a leaf is split over; None or () for a leaf that
        every device has whole. One collective sums the norms of the whole model. A stacked leaf must not be split along
        its `layer_axes`. Arrays that are sharded under ``jax.jit`` do not need this.

    Returns
    -------
    optax.GradientTransformationExtraArgs
        Its ``update`` needs the parameters. Updates have the parameters' dtypes, and are None where a gradient is;
        extra arguments are ignored.

    Raises
    ------
    ValueError, TypeError
        As for `lars_array.LARS`, from ``lars`` for everything that it can check, else from ``init`` or ``update``.

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
    arguments = _arguments_of(locals())
    keeps = needs_buffer(arguments.hyper)

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
        _check(state, names, leaves, grads, trace)
        index = [i for i, g in enumerate(grads) if g is not None]
        if not index:
            return updates, state._replace(count=optax.safe_increment(state.count))

        hyper = {name: x(state.count) if _is_schedule(name, x) else x for name, x in arguments.hyper.items()}
        groups, groups_of_leaves = groups_of(at_step(hyper, state.count), params, arguments)
        lists: Any = names, leaves, grads, trace, groups_of_leaves, labels_of(layer_of, names)
        own, ps, gs, vs, group_of, labels = ([x[i] for i in index] for x in lists)
        rows = LayerRows.of(own, ps, [groups[k]["layer_axes"] for k in group_of], labels)
        of_rows, of_leaves = jnp.asarray(rows.spread(index)), jnp.asarray(index)
        first, previous_lr = state.first[of_rows], state.previous_lr[of_rows]
        limit = max_finite(rows.spread(ps), like=ps[0], xp=jnp)
        inputs = inputs_of(groups, rows.spread(group_of), first, previous_lr, limit, like=ps[0], xp=jnp)
        axes = mapped_axes(axis_name, params)
        reduce = partial(sum_over_devices, axes=[axes[i] for i in rows.spread(index)])
        stages: dict[str, Any] = {"xp": jnp, "reduce": reduce, "third": core.displacement}
        differences, new_vs, outputs = core.step(ps, gs, vs, inputs, rows, **stages)
        taken = None
        if nonfinite == "skip":
            dtypes = rows.spread([g.dtype for g in gs])
            taken = jnp.all(finite_layers(outputs.S, outputs.C, rows.spread(ps), dtypes, xp=jnp))

        def chosen(new: Any, old: Any) -> Any:
            return new if taken is None else jnp.where(taken, new, old)

        new_updates, new_trace = list(grads), list(trace)
        for i, p, d, v, new_v in zip(index, ps, differences, vs, new_vs, strict=True):
            new_updates[i] = chosen(-d, jnp.zeros_like(d)).astype(p.dtype)
            new_trace[i] = None if v is None else chosen(new_v, v)
        rates = outputs.hyper.lr[jnp.asarray([own.start for own in rows.slices])].astype(state.previous_lr.dtype)
        new_state = LarsState(
            count=chosen(optax.safe_increment(state.count), state.count),
            trace=structure.unflatten(new_trace) if keeps else None,
            first=chosen(state.first.at[of_leaves].set(False), state.first) if keeps else state.first,
            previous_lr=chosen(state.previous_lr.at[of_leaves].set(rates), state.previous_lr),
        )
        return structure.unflatten(new_updates), new_state

    return optax.GradientTransformationExtraArgs(init, update)


class LarsArguments(NamedTuple):
    """The arguments of `lars`: hyper-parameters by the names of `lars_array`, and those that differ by leaf."""

    hyper: dict[str, Any]
    weight_decay_mask: Any
    trust_ratio_mask: Any
    layer_axes: Any


def bind_arguments(*arguments: Any, **options: Any) -> LarsArguments:
    """Return the arguments of a call of `lars`."""
    bound = inspect.signature(lars).bind(*arguments, **options)
    bound.apply_defaults()
    return _arguments_of(bound.arguments)


def _arguments_of(given: Mapping[str, Any]) -> LarsArguments:
    """Return the arguments of `lars`, checked, from those that it was called with."""
    hyper = defaults_from({**given, "lr": given["learning_rate"]})
    axes = hyper.pop("layer_axes")
    if hyper["eps"] is None:
        rule = hyper["rule"]
        named = isinstance(rule, str) and rule in lars_array.RULES
        hyper["eps"] = (DEFAULTS | (lars_array.preset(rule) if named else {}))["eps"]
    if hyper["nonfinite"] == "raise":
        raise ValueError("nonfinite must be 'propagate' or 'skip', since a traced step can't raise; got 'raise'")
    for name in ("weight_decay_mask", "trust_ratio_mask"):
        if given[name] is None:
            raise TypeError(f"{name} must be a bool, a pytree of bool, or a function; got None")
    at_step({name: 0.0 if _is_schedule(name, x) else x for name, x in hyper.items()}, 0)
    return LarsArguments(hyper, given["weight_decay_mask"], given["trust_ratio_mask"], 0 if axes is None else axes)


def _is_schedule(name: str, value: Any) -> bool:
    return callable(value) and name != "rule"


def groups_of(
    hyper: Mapping[str, Any], params: Any, arguments: LarsArguments
) -> tuple[list[dict[str, Any]], list[int]]:
    """Return groups of hyper-parameters, and the group of each leaf."""
    decayed = spread("weight_decay_mask", arguments.weight_decay_mask, params, is_bool, "True or False")
    adapted = spread("trust_ratio_mask", arguments.trust_ratio_mask, params, is_bool, "True or False")
    axes = spread("layer_axes", arguments.layer_axes, params, is_count, "integers of at least 0")
    of_leaves = list(zip(map(bool, decayed), map(bool, adapted), axes))
    kinds = list(dict.fromkeys(of_leaves))
    decay = hyper["weight_decay"]
    excluded = {} if isinstance(decay, int | float) and decay == 0 else {"weight_decay": 0.0, "always_adapt": True}
    groups = [
        {**hyper, "adapt": adapts, "layer_axes": count, **({} if decays else excluded)}
        for decays, adapts, count in kinds
    ]
    return groups, [kinds.index(kind) for kind in of_leaves]


def _check(state: LarsState, names: list[str], leaves: list[Any], grads: list[Any], trace: list[Any]) -> None:
    """Raise for arrays that do not fit, naming the leaf."""
    if state.first.shape != (len(names),):
        raise ValueError(f"state must be of as many leaves as the parameters, {len(names)}; got {state.first.shape[0]}")
    for name, p, g, v in zip(names, leaves, grads, trace, strict=True):
        check_parameter(name, p)
        if g is not None:
            check_gradient(name, g, p)
        if v is not None:
            check_buffer(name, v, p)
