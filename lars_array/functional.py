"""The optimizer as two pure functions, for arrays that can't be written to, and for tracing."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace

from lars_array.arrays import asarray, check_buffer, check_gradient
from lars_array.core import apply, plan, prepare, sums
from lars_array.dtypes import accumulation_dtype, compute_dtype, is_half
from lars_array.gradients import given_order, match_gradients
from lars_array.hyper import at_step, needs_buffer
from lars_array.nonfinite import finite, largest, most_squares, refuse_nonfinite
from lars_array.parameters import Layout, read_parameters
from lars_array.rows import joined_rows, labels_of, row_labels, stacks_of

__all__ = ["State", "init", "update"]


class State(NamedTuple):
    """What `update` carries from step to step: a pytree of arrays.

    Parameters
    ----------
    step : integer array of shape ()
        Steps taken.
    momentum_buffers : dict of str to array
        By name of parameter, of its shape; float32 for half precision, else of its dtype.
    first : bool array of shape (layers,)
        In the order of sorted names: true where the buffer was not used yet.
    previous_lr : array of shape (layers,)
        In the order of sorted names: the learning rate of a layer's last step, 0 before the first.
    """

    step: Any
    momentum_buffers: dict[str, Any]
    first: Any
    previous_lr: Any


def init(params: Any) -> State:
    """Return the state before the first step.

    Parameters
    ----------
    params : iterable of arrays, mapping of name to array, iterable of (name, array), or iterable of groups
        As `LARS` takes them; not modified.

    Returns
    -------
    State
        Buffers of zeros.

    Raises
    ------
    ValueError, TypeError
        If `params` has none of these forms.
    """
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
    params: Any, grads: Any, state: State, *, nonfinite: str | None = None, layer_of: Any = None, **hyper: Any
) -> tuple[Any, State]:
    """Return the parameters and the state after a step, as new arrays.

    Parameters
    ----------
    params : iterable of arrays, mapping of name to array, iterable of (name, array), or iterable of groups
        As given to `init`; not modified.
    grads : mapping of name to array, or iterable of arrays
        As for `LARS.step`; not modified. A parameter whose entry is None is skipped and keeps its state.
    state : State
        From `init` or `update`; not modified.
    nonfinite : {"raise", "skip", "propagate"}, optional
        As for `LARS`. By default "raise", but where values are traced and nothing can be raised, "propagate".
    layer_of : mapping or callable, optional
        As for `LARS`.
    **hyper
        The arguments of `LARS`, `lr` among them; numbers may be arrays of shape (), traced ones too. `lr` may be a
        function of the step. `master_weights` is refused for parameters of half precision: keep these in float32.

    Returns
    -------
    tuple (params, state)
        The parameters in the form given.

    Raises
    ------
    ValueError, TypeError
        As `LARS` and `LARS.step` do.

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
    layout = read_parameters(params)
    if "lr" not in hyper and not all("lr" in group.overrides for group in layout.groups):
        raise TypeError("update needs lr")
    names, arrays = _flat(layout)
    gradients = match_gradients(grads, names, given_order(names))
    layers = [i for i, g in enumerate(gradients) if g is not None]
    for i in layers:
        check_gradient(names[i], gradients[i], arrays[i])
    _check_state(state, names, arrays)
    given = hyper | {"nonfinite": "raise" if nonfinite is None else nonfinite}
    groups = [at_step(given | group.overrides, state.step) for group in layout.groups]
    _refuse_masters(layout, groups)
    if not layers:
        return params, state._replace(step=state.step + 1)

    xp, like = array_namespace(*arrays), arrays[0]
    group_of_layer = [k for k, group in enumerate(layout.groups) for _ in group.names]
    group_of = [group_of_layer[i] for i in layers]
    keeps = [needs_buffer(groups[k]) for k in group_of]
    own, labels = [names[i] for i in layers], labels_of(layer_of, names)
    stacks = stacks_of(own, [arrays[i] for i in layers], [groups[k]["layer_axes"] for k in group_of])
    joined = joined_rows(row_labels([labels[i] for i in layers], stacks))
    owner = [k for k, stack in enumerate(stacks) for _ in range(stack.rows)]
    leads = [stack.lead for stack in stacks] if len(owner) > len(stacks) else None
    chosen, grads = [arrays[i] for i in layers], [gradients[i] for i in layers]
    buffers = [state.momentum_buffers[names[i]] if keep else None for i, keep in zip(layers, keeps, strict=True)]
    # By name, since jax.jit hands out a mapping in the order of its keys.
    ranked = sorted(range(len(names)), key=names.__getitem__)
    rank = {i: r for r, i in enumerate(ranked)}
    index = asarray([rank[layers[k]] for k in owner], like=like, xp=xp)

    def measure(operand: Any) -> Any:
        return sums(chosen, grads, buffers, operand, xp=xp, leads=leads)

    with np.errstate(all="ignore"):  # what is not finite is dealt with by name
        first, previous_lr = xp.take(state.first, index), xp.take(state.previous_lr, index)
        of_rows = [group_of[k] for k in owner]
        prepared = prepare(groups, of_rows, first=first, previous_lr=previous_lr, like=like, xp=xp)
        step = plan(prepared, measure, xp=xp, joined=joined)
        results = [
            apply(p, g, v, stack.coefficients(step.C, xp=xp), xp=xp)
            for stack, p, g, v in zip(stacks, chosen, grads, buffers, strict=True)
        ]

    policies = [groups[k]["nonfinite"] for k in of_rows]
    of_owners = [chosen[k] for k in owner]
    most = most_squares(of_owners, [grads[k].dtype for k in owner], like=like, xp=xp)
    ok = finite(step.S, step.C, largest(of_owners, like=like, xp=xp), most, xp=xp)
    ok = ok | asarray([p == "propagate" for p in policies], like=like, xp=xp)
    if "raise" in policies:
        spread = ([x[k] for k in owner] for x in (own, chosen, grads))
        _refuse(ok, policies, *spread, explicit=nonfinite is not None, xp=xp)
    taken = xp.all(ok) if "skip" in policies else None

    def chosen_of(new: Any, old: Any) -> Any:
        return new if taken is None else xp.where(taken, new, old)

    new_arrays, new_buffers = list(arrays), dict(state.momentum_buffers)
    for i, (new_p, new_v) in zip(layers, results, strict=True):
        new_arrays[i] = chosen_of(new_p, arrays[i])
        if new_v is not None:
            new_buffers[names[i]] = chosen_of(new_v, state.momentum_buffers[names[i]])
    # Back from the layers that have gradients to all of them.
    place = {i: k for k, i in enumerate(layers)}
    row = asarray([stacks[place.get(i, 0)].start for i in ranked], like=like, xp=xp)
    kept = asarray([i in place and keeps[place[i]] for i in ranked], like=like, xp=xp)
    stepped = asarray([i in place for i in ranked], like=like, xp=xp)
    lr_of = xp.where(stepped, xp.take(step.hyper.lr, row), state.previous_lr)
    new_state = State(
        step=chosen_of(state.step + 1, state.step),
        momentum_buffers=new_buffers,
        first=chosen_of(state.first & ~kept, state.first),
        previous_lr=chosen_of(lr_of, state.previous_lr),
    )
    return layout.rebuild(new_arrays), new_state


def _refuse(
    ok: Any, policies: list[str], names: list[str], params: list[Any], grads: list[Any], *, explicit: bool, xp: Any
) -> None:
    """Raise for the first layer that is not ok and whose policy is "raise", if values can be read."""
    raises = asarray([policy != "raise" for policy in policies], like=ok, xp=xp)
    try:
        if bool(xp.all(ok | raises)):
            return
    except TypeError:  # traced by JAX
        if explicit:
            raise TypeError("nonfinite='raise' can't be traced; give 'skip' or 'propagate'") from None
        return
    bad = next(i for i, policy in enumerate(policies) if policy == "raise" and not bool(ok[i]))
    refuse_nonfinite(names[bad], params[bad], grads[bad], xp=xp)


def _refuse_masters(layout: Layout, groups: list[dict[str, Any]]) -> None:
    for group, given in zip(layout.groups, groups, strict=True):
        half = next((name for name, p in zip(group.names, group.arrays, strict=True) if is_half(p)), None)
        if given["master_weights"] and half is not None:
            raise ValueError(f"master_weights must be False in update, whose state has none for {half!r}")


def _flat(layout: Layout) -> tuple[list[str], list[Any]]:
    return [name for group in layout.groups for name in group.names], [
        p for group in layout.groups for p in group.arrays
    ]


def _check_state(state: Any, names: list[str], arrays: list[Any]) -> None:
    if not isinstance(state, State):
        raise TypeError(f"state must be what init or update returned; got {type(state).__name__}")
    if set(state.momentum_buffers) != set(names):
        raise ValueError(f"state must be of parameters named {names!r}; got {list(state.momentum_buffers)!r}")
    for field in ("first", "previous_lr"):
        if tuple(getattr(state, field).shape) != (len(names),):
            shapes = f"({len(names)},); got {tuple(getattr(state, field).shape)!r}"
            raise ValueError(f"{field} of state must have the shape {shapes}")
    for name, p in zip(names, arrays, strict=True):
        check_buffer(name, state.momentum_buffers[name], p)
