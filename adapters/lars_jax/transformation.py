"""LARS as a gradient transformation of optax: `lars_array.core` on `jax.numpy`, traced or not."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import lars_array
from lars_array import core
from lars_array._arrays import accumulation_dtype, check_buffer, check_gradient, compute_dtype
from lars_array._stepper import finite_layers, max_finite, shown
from lars_array.core import Rule
from lars_array.hyperparams import (
    DEFAULTS,
    NUMBERS,
    at_step,
    defaults_from,
    inputs_of,
    named_options,
    needs_buffer,
    scheduled,
    warn_of_sgd,
)
from lars_array.layers import LayerOf, LayerRows, labels_of
from lars_jax._arguments import LarsArguments, check_rate
from lars_jax._collective import NAMESPACE, mapped_axes, sum_over_devices
from lars_jax._trees import Leaves, as_jax

__all__ = ["LarsState", "bind_arguments", "lars", "momentum_buffers"]


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


@named_options
def lars(
    learning_rate: Any,
    *,
    momentum: Any = 0.9,
    weight_decay: Any = 0.0,
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
    all but the first are given by name; momentum is 0.9 by default; there are no groups, `adapt`, `master_weights` and
    `kernel`; and those below.

    Parameters
    ----------
    learning_rate : float, array of shape (), or schedule
        `lr`. It is part of the step: do not add ``optax.scale(-lr)`` after it.
    eps : float, optional
        By default that of the implementation that `rule` names, 1e-8 for flash and 0 for optax.
    nonfinite : {"propagate", "skip"}
        A traced step can't raise. With "skip", updates that are not finite become zeros and the state does not change.
    weight_decay_mask, trust_ratio_mask : bool, pytree of bool, or callable
        Which leaves are decayed, and which are adapted: one value for all; a tree with the names of the parameters', or
        a prefix of it; or a function that returns one of these, given the parameters. Types of dicts and modules do not
        count, and a module with ``__call__`` is a tree. A leaf that is adapted but excluded from decay is adapted by
        all rules, also by those that leave out layers without decay, in all steps in which others are decayed.
    layer_axes : int, pytree of int, or callable, optional
        The number of leading axes of a leaf along which slices are layers, as in the stacked parameters of scanned
        layers; in the forms of the masks, 0 by default. `optax.inject_hyperparams` needs it in its `static_args`.
    layer_of : mapping or callable, optional
        By the paths of leaves with dots, such as "attention.query".
    axis_name : hashable, tuple of hashable, pytree of these, or callable, optional
        Under `jax.shard_map` or `jax.pmap`, the mapped axes that a leaf is split over; None or () for a leaf that
        every device has whole. A tuple is a tree where the parameters are a tuple or list as long. One collective sums
        the norms of the whole model. A stacked leaf must not be split along its `layer_axes`. Arrays that are sharded
        under `jax.jit` do not need this.

    Returns
    -------
    optax.GradientTransformationExtraArgs
        Its ``init`` takes abstract parameters too, and its ``update``, which needs the parameters, states with arrays
        of NumPy. Updates have the parameters' dtypes, and are None where a gradient is;
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
    has_warned = False

    def init(params: Any) -> LarsState:
        tree = Leaves.of_arrays(params)
        trace = [jnp.zeros_like(p, dtype=compute_dtype(p, jnp)) for p in tree.values]
        return LarsState(
            count=jnp.zeros((), jnp.int32),
            trace=tree.structure.unflatten(trace) if keeps else None,
            first=jnp.ones(len(trace), jnp.bool),
            previous_lr=jnp.zeros(len(trace), accumulation_dtype(jnp)),
        )

    def update(updates: Any, state: LarsState, params: Any = None, **extra: Any) -> tuple[Any, LarsState]:
        del extra
        _check_order(updates, state, params)
        tree = Leaves.of_arrays(params)
        grads = list(map(as_jax, tree.match(updates, "updates")))
        trace = momentum_buffers(state, tree) if keeps else [None] * len(grads)
        for name, p, g, v in zip(tree.names, tree.values, grads, trace):
            if g is not None:
                check_gradient(name, g, p)
            if keeps:
                check_buffer(name, v, p)
        small = {name: jnp.asarray(getattr(state, name)) for name in ("count", "first", "previous_lr")}
        state = state._replace(**small)
        index = [i for i, g in enumerate(grads) if g is not None]
        if not index:
            return updates, state._replace(count=optax.safe_increment(state.count))

        lists: Any = tree.names, tree.values, grads, trace, arguments.of_leaves(tree), labels_of(layer_of, tree.names)
        own, ps, gs, vs, options, labels = ([x[i] for i in index] for x in lists)
        rows = LayerRows.of(own, ps, [axes for _, _, axes in options], labels)
        of_rows, of_leaves = jnp.asarray(rows.spread(index)), jnp.asarray(index)
        first, previous_lr = state.first[of_rows], state.previous_lr[of_rows]
        now = scheduled(arguments.hyper, state.count)
        check_rate("learning_rate", now["lr"])
        group = at_step(now, state.count)
        nonlocal has_warned
        if not has_warned:
            has_warned = True
            warn_of_sgd({**group, "adapt": adapts is True} for _, adapts, _ in options)
        limit = max_finite(rows.spread(ps), like=ps[0], xp=jnp)
        inputs = _inputs(group, rows.spread(options), first, previous_lr, limit, like=ps[0])
        axes = mapped_axes(axis_name, tree)
        reduce = partial(sum_over_devices, axes=[axes[i] for i in rows.spread(index)])
        stages: dict[str, Any] = {"xp": NAMESPACE, "reduce": reduce, "third": core.displacement}
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
            trace=tree.structure.unflatten(new_trace) if keeps else None,
            first=chosen(state.first.at[of_leaves].set(False), state.first) if keeps else state.first,
            previous_lr=chosen(state.previous_lr.at[of_leaves].set(rates), state.previous_lr),
        )
        return tree.structure.unflatten(new_updates), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def bind_arguments(learning_rate: Any, **options: Any) -> LarsArguments:
    """Return the arguments of a call of `lars`."""
    bound = inspect.signature(lars).bind(learning_rate, **options)
    bound.apply_defaults()
    return _arguments_of(bound.arguments)


def _arguments_of(given: Mapping[str, Any]) -> LarsArguments:
    """Return the arguments of `lars`, checked, from those that it was called with."""
    check_rate("learning_rate", given["learning_rate"])
    hyper = defaults_from({**given, "lr": given["learning_rate"]})
    axes = hyper.pop("layer_axes")
    if isinstance(axes, jax.Array):
        way_out = "give a number, and with optax.inject_hyperparams list it in static_args"
        raise TypeError(f"layer_axes must be known when a step is traced: {way_out}; got {shown(axes)}")
    if hyper["eps"] is None:
        rule = hyper["rule"]
        named = isinstance(rule, str) and rule in lars_array.RULES
        hyper["eps"] = (DEFAULTS | (lars_array.preset(rule) if named else {}))["eps"]
    if hyper["nonfinite"] == "raise":
        raise ValueError("nonfinite must be 'propagate' or 'skip', since a traced step can't raise; got 'raise'")
    for name in ("weight_decay_mask", "trust_ratio_mask"):
        if given[name] is None:
            raise TypeError(f"{name} must be a bool, a pytree of bool, or a function; got None")
    # Schedules are first evaluated by a step; until then numbers stand in that are valid together.
    stand_ins = dict.fromkeys(NUMBERS, 1.0) | {"dampening": 0.0}
    at_step({name: stand_ins.get(name, x) if callable(x) else x for name, x in hyper.items()}, 0)
    return LarsArguments(hyper, given["weight_decay_mask"], given["trust_ratio_mask"], 0 if axes is None else axes)


def _inputs(
    group: dict[str, Any],
    options: Sequence[tuple[Any, Any, int]],
    first: Any,
    previous_lr: Any,
    limit: Any,
    *,
    like: Any,
) -> core.RuleInputs:
    """Return the inputs of a step with hyper-parameters that only the masks make differ between rows."""
    most = float(jnp.finfo(accumulation_dtype(jnp)).max)  # an infinite constant would stop jax_debug_infs
    bounds = group["trust_bounds"] or core.resolve(group["rule"]).trust_bounds or (0.0, most)
    norm = group["max_grad_norm"]
    finite = {"trust_bounds": tuple(min(x, most) for x in bounds), "max_grad_norm": most if norm is None else norm}
    inputs = inputs_of([group | finite], [0] * len(options), first, previous_lr, limit, like=like, xp=jnp)
    decayed, adapted = (_booleans([row[k] for row in options]) for k in (0, 1))
    w, always = inputs.hyper.weight_decay, inputs.hyper.always_adapt
    hyper = inputs.hyper._replace(
        weight_decay=jnp.where(decayed, w, 0.0), always_adapt=always | (~decayed & (w != 0)), adapt=adapted
    )
    return core.rule_inputs(hyper, inputs.rules, clips=norm is not None, xp=jnp)


def _booleans(values: list[Any]) -> Any:
    """Return an array of True, False and traced numbers."""
    traced = any(isinstance(x, jax.Array) for x in values)
    return jnp.stack([jnp.asarray(x, jnp.bool) for x in values]) if traced else jnp.asarray(values)


def _check_order(updates: Any, state: Any, params: Any) -> None:
    """Raise for arguments of `update` that are missing or stand in each other's place."""
    if not isinstance(state, LarsState):
        place = next((n for n, x in (("first", updates), ("third", params)) if isinstance(x, LarsState)), None)
        got = shown(state) if place is None else f"it as the {place} argument"
        raise TypeError(
            f"state must be what init or update of lars returned, in update(grads, state, params); got {got}"
        )
    if params is None:
        raise ValueError("update of lars needs params: update(grads, state, params)")


def momentum_buffers(state: LarsState, tree: Leaves) -> list[Any]:
    """Return the momentum buffer of each leaf; raise ValueError if the state is of other leaves."""
    found = list(map(as_jax, tree.match(state.trace, "the trace of state")))
    if state.first.shape != (len(found),):
        raise ValueError(f"state must be of as many leaves as the parameters, {len(found)}; got {state.first.shape[0]}")
    return found
