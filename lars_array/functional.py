"""LARS as pure functions, for immutable arrays and for tracing: one step of one layer or of a whole model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace

from lars_array._arrays import (
    accumulation_dtype,
    asarray,
    check_buffer,
    check_gradient,
    check_parameter,
    compute_dtype,
    is_half,
)
from lars_array._messages import located, shown
from lars_array.core import step as core_step
from lars_array.hyperparams import at_step, check, inputs_of, needs_buffer
from lars_array.layers import LayerOf, LayerRows, labels_of
from lars_array.nonfinite import finite_layers, max_finite, refuse_entries, refuse_nonfinite
from lars_array.state.inputs import Layout, gradient_order, match_gradients, read_parameters
from lars_array.state.shards import AllReduce, SkippedError, checked_all_reduce
from lars_array.state.sharing import SharedUpdate, sharing

if TYPE_CHECKING:
    from lars_array.state.exchange import Exchange

__all__ = ["State", "init", "lars_step", "update"]

Array = Any


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
    """Take one step of one layer, as a pure function of arrays of any Array API namespace, also under `jax.jit`.

    Parameters
    ----------
    p, g : arrays of one shape and device
        Parameters and gradient; not modified. Both real, of any two floating-point types, or both complex, of one type.
    v : array of the shape of p, or None
        Momentum buffer, float32 for half precision, else with the dtype of p; not modified. None: the first step.
    lr, momentum, dampening, weight_decay : float or 0-d array
        Hyper-parameters, as in `LARS`.
    nesterov : bool
        Whether to use Nesterov momentum.
    trust_coefficient, eps : float or 0-d array
        Hyper-parameters, as in `LARS`.
    previous_lr : float or 0-d array, optional
        Learning rate of the previous step, for rules with momentum correction. None: unchanged.
    nonfinite : {"propagate", "skip", "raise"}
        Policy for non-finite sums. "propagate": no check. "skip": p and v are returned unchanged (v None: as zeros).
        "raise": `NonFiniteError`, which needs concrete values and cannot be traced.
    **options
        The other options of `LARS`: rule, trust_clip, trust_bounds, always_adapt, adapt, maximize, rescale_grad,
        max_grad_norm, layer_axes.

    Returns
    -------
    tuple (p', v')
        New arrays; but v' is v itself if neither momentum nor the rule needs a buffer.

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
    with located("previous_lr"):
        check(group | {"lr": before})
    rows = LayerRows.of(["p"], [p], [group["layer_axes"]], [None])
    count = len(rows.owner)
    limit = max_finite([p] * count, like=p, xp=xp)
    inputs = inputs_of([group], [0] * count, [v is None] * count, [before] * count, limit, like=p, xp=xp)
    # The third stage runs before the check: its overflows are part of a step that is rejected or skipped.
    with np.errstate(all=None if nonfinite == "propagate" else "ignore"):
        (new_p,), (new_v,), outputs = core_step([p], [g], [buffer], inputs, rows, xp=xp)
    if nonfinite != "propagate":
        ok = xp.all(finite_layers(outputs.S, outputs.C, [p] * count, [g.dtype] * count, xp=xp))
        if nonfinite == "raise" and not bool(ok):
            refuse_nonfinite([0], ["p"], [p], [g], xp=xp)
        new_p, new_v = xp.where(ok, new_p, p), None if buffer is None else xp.where(ok, new_v, buffer)
    return new_p, v if buffer is None else new_v


class State(NamedTuple):
    """The state of `update` between steps: a pytree of arrays.

    Parameters
    ----------
    step : integer array of shape ()
        Number of steps taken.
    momentum_buffers : dict of str to array
        By name of parameter, with its shape; float32 for half precision, else with its dtype.
    first : bool array of shape (parameters,)
        In the order of sorted names: true where the buffer has not been used yet.
    previous_lr : array of shape (parameters,)
        In the order of sorted names: the learning rate of a parameter's last step, 0 before the first.
    """

    step: Any
    momentum_buffers: dict[str, Any]
    first: Any
    previous_lr: Any


def init(params: Any, *, all_reduce: AllReduce | None = None) -> State:
    """Return the state before the first step.

    Parameters
    ----------
    params : iterable of arrays, mapping of name to array, iterable of (name, array), or iterable of groups
        As for `LARS`; not modified.
    all_reduce : callable, optional
        As for `update`, to which the same is given. The state is that of the pieces which are here: nothing is added.

    Returns
    -------
    State
        With buffers of zeros.

    Raises
    ------
    ValueError, TypeError
        If `params` has none of these forms.
    """
    checked_all_reduce(all_reduce)
    names, arrays = _flat(read_parameters(params))
    xp, like = array_namespace(*arrays), arrays[0]
    return State(
        step=asarray(0, like=like, xp=xp),
        momentum_buffers={
            name: xp.zeros_like(p, dtype=compute_dtype(p, xp)) for name, p in zip(names, arrays, strict=True)
        },
        first=asarray([True] * len(arrays), like=like, xp=xp),
        previous_lr=asarray([0.0] * len(arrays), accumulation_dtype(xp), like=like, xp=xp),
    )


def update(
    params: Any,
    grads: Any,
    state: State,
    *,
    nonfinite: str | None = None,
    layer_of: LayerOf = None,
    all_reduce: AllReduce | None = None,
    layers: Sequence[str] | None = None,
    **hyper: Any,
) -> tuple[Any, State]:
    """Return the parameters and the state after a step, as new arrays.

    Parameters
    ----------
    params : iterable of arrays, mapping of name to array, iterable of (name, array), or iterable of groups
        In the form passed to `init`; not modified.
    grads : mapping of name to array, or iterable of arrays
        As for `LARS.step`; not modified. A parameter whose entry is None does not take part and keeps its state.
    state : State
        From `init` or `update`; not modified.
    nonfinite : {"raise", "skip", "propagate"}, optional
        As for `LARS`. The default is "raise", or "propagate" if values are traced and no error can be raised.
    layer_of : mapping or callable, optional
        As for `LARS`.
    all_reduce, layers : callable and sequence of str, optional
        As for `LARS`: the parameters are pieces of layers that are spread over processes. It adds tables on the device
        of the parameters, NumPy arrays if these are JAX arrays, and the host waits for the sums. Give the same function
        in each update, since its processes compare their layers when it is new. Updates that are traced can't call it:
        use `lars_jax.lars`.
    **hyper
        The arguments of `LARS`, including `lr`; numbers may be arrays of shape (), including traced ones, or
        functions of the step. `master_weights` raises an error for half-precision parameters: keep these in float32.

    Returns
    -------
    tuple (params, state)
        The parameters in the form given.

    Raises
    ------
    ValueError, TypeError
        As `LARS` and `LARS.step` do.
    RefusedElsewhereError
        With `all_reduce`, if another process has refused the update.

    Examples
    --------
    >>> import numpy as np
    >>> params = {"w": np.array([3.0, 4.0])}
    >>> state = init(params)
    >>> for _ in range(3):
    ...     params, state = update(params, {"w": params["w"]}, state, lr=1.0, momentum=0.9, weight_decay=0.1)
    >>> params["w"].round(4)
    array([2.9832, 3.9776])
    """
    with sharing(all_reduce) as shared:
        if isinstance(params, State) or isinstance(grads, State):
            raise TypeError("update takes params, grads and state in this order; got the state before")
        layout = read_parameters(params)
        shared.read(layout, hyper, layer_of, layers)
        if "lr" not in hyper and not all("lr" in group.overrides for group in layout.groups):
            raise TypeError("update needs lr")
        given = hyper | {"nonfinite": "raise" if nonfinite is None else nonfinite}
        try:
            updated, new_state = _update(layout, grads, state, given, layer_of, shared, explicit=nonfinite is not None)
        except SkippedError:
            return params, state
        return params if updated is None else updated, new_state


def _update(
    layout: Layout,
    grads: Any,
    state: State,
    given: dict[str, Any],
    layer_of: LayerOf,
    shared: SharedUpdate,
    *,
    explicit: bool,
) -> tuple[Any, State]:
    """Return the results of `update`, None for parameters that stay the same."""
    names, arrays = _flat(layout)
    gradients = match_gradients(grads, names, gradient_order(names))
    index = [i for i, g in enumerate(gradients) if g is not None]
    for i in index:
        check_gradient(names[i], gradients[i], arrays[i])
    _check_state(state, names, arrays)
    shared.refuse_traced(*arrays, *(gradients[i] for i in index), state.step, *given.values())
    groups = []
    for number, group in enumerate(layout.groups):
        with located(f"parameter group {number}" if len(layout.groups) > 1 else ""):
            own_options = {key: x for key, x in group.overrides.items() if key != "all_reduce"}
            groups.append(at_step(given | own_options, state.step))
    _refuse_masters(layout, groups)
    if not index:
        is_skipped = shared.is_skipped_without_rows(groups)
        return None, state if is_skipped else state._replace(step=state.step + 1)

    xp, like = array_namespace(*arrays), arrays[0]
    group_of_all = [k for k, group in enumerate(layout.groups) for _ in group.names]
    labels = labels_of(layer_of, names)
    lists: tuple[list[Any], ...] = (names, arrays, gradients, group_of_all, labels)
    own, ps, gs, group_of, labels = ([x[i] for i in index] for x in lists)
    keeps = [needs_buffer(groups[k]) for k in group_of]
    vs = [state.momentum_buffers[name] if keep else None for name, keep in zip(own, keeps, strict=True)]
    rows = LayerRows.of(own, ps, [groups[k]["layer_axes"] for k in group_of], labels)
    # By name, because jax.jit returns a mapping in the order of its keys.
    ranked = sorted(range(len(names)), key=names.__getitem__)
    rank = {i: r for r, i in enumerate(ranked)}
    of_rows = asarray([rank[index[k]] for k in rows.owner], like=like, xp=xp)
    with np.errstate(all="ignore"):  # non-finite numbers are reported by name
        first, previous_lr = xp.take(state.first, of_rows), xp.take(state.previous_lr, of_rows)
        limit = max_finite(rows.spread(ps), like=like, xp=xp)
        inputs = inputs_of(groups, rows.spread(group_of), first, previous_lr, limit, like=like, xp=xp)
        exchange = shared.exchange(index, rows.joined, groups)
        new_ps, new_vs, outputs = core_step(ps, gs, vs, inputs, rows, xp=xp, exchange=exchange)
        if exchange is not None:
            exchange.complete()

    policies = [groups[k]["nonfinite"] for k in rows.spread(group_of)]
    ok = finite_layers(outputs.S, outputs.C, rows.spread(ps), rows.spread([g.dtype for g in gs]), xp=xp)
    ok = ok | asarray([policy == "propagate" for policy in policies], like=like, xp=xp)
    if "raise" in policies:
        own_rows = [rows.spread(x) for x in (own, ps, gs)]
        _refuse(ok, policies, own_rows, outputs.S, exchange, explicit=explicit, xp=xp)
    if exchange is not None and exchange.check_finite():
        return None, state
    taken = xp.all(ok) if "skip" in policies else None

    def chosen(new: Any, old: Any) -> Any:
        return new if taken is None else xp.where(taken, new, old)

    new_arrays, new_buffers = list(arrays), dict(state.momentum_buffers)
    for i, new_p, new_v in zip(index, new_ps, new_vs, strict=True):
        new_arrays[i] = chosen(new_p, arrays[i])
        if new_v is not None:
            new_buffers[names[i]] = chosen(new_v, state.momentum_buffers[names[i]])
    # From the parameters that have gradients back to all parameters.
    place = {i: k for k, i in enumerate(index)}
    row = asarray([rows.slices[place.get(i, 0)].start for i in ranked], like=like, xp=xp)
    kept = asarray([i in place and keeps[place[i]] for i in ranked], like=like, xp=xp)
    stepped = asarray([i in place for i in ranked], like=like, xp=xp)
    lr_of = xp.where(stepped, xp.take(outputs.hyper.lr, row), state.previous_lr)
    new_state = State(
        step=chosen(state.step + 1, state.step),
        momentum_buffers=new_buffers,
        first=chosen(state.first & ~kept, state.first),
        previous_lr=chosen(lr_of, state.previous_lr),
    )
    return layout.rebuild(new_arrays), new_state


def _refuse(
    ok: Any,
    policies: list[str],
    rows: list[list[Any]],
    S: Any,
    exchange: Exchange | None,
    *,
    explicit: bool,
    xp: Any,
) -> None:
    """Raise if a layer that is not ok has the policy "raise", if values can be read; names, p and g are in `rows`."""
    raises = asarray([policy != "raise" for policy in policies], like=ok, xp=xp)
    try:
        if bool(xp.all(ok | raises)):
            return
    except TypeError:  # traced by JAX
        if explicit:
            raise TypeError("nonfinite='raise' can't be traced; give 'skip' or 'propagate'") from None
        return
    bad = [i for i in range(len(policies)) if not bool(ok[i])]
    bad.sort(key=lambda i: policies[i] != "raise")
    if exchange is not None:
        refuse_entries(bad, *rows, S=S, xp=xp)
        exchange.check_finite()
    refuse_nonfinite(bad, *rows, xp=xp)


def _refuse_masters(layout: Layout, groups: list[dict[str, Any]]) -> None:
    for group, given in zip(layout.groups, groups, strict=True):
        half = next((name for name, p in zip(group.names, group.arrays, strict=True) if is_half(p)), None)
        if given["master_weights"] and half is not None:
            raise ValueError(f"master_weights must be False in update, whose state has none for {shown(half)}")


def _flat(layout: Layout) -> tuple[list[str], list[Any]]:
    return [name for group in layout.groups for name in group.names], [
        p for group in layout.groups for p in group.arrays
    ]


def _check_state(state: Any, names: list[str], arrays: list[Any]) -> None:
    if not isinstance(state, State):
        raise TypeError(f"state must be what init or update returned; got {type(state).__name__}")
    if set(state.momentum_buffers) != set(names):
        raise ValueError(f"state must be of parameters named {shown(names)}; got {shown(list(state.momentum_buffers))}")
    for field in ("first", "previous_lr"):
        if tuple(getattr(state, field).shape) != (len(names),):
            shapes = f"({len(names)},); got {shown(tuple(getattr(state, field).shape))}"
            raise ValueError(f"{field} of state must have the shape {shapes}")
    for name, p in zip(names, arrays, strict=True):
        check_buffer(name, state.momentum_buffers[name], p)
