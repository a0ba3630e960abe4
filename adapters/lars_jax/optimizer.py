"""LARS for JAX without tracing: the kernels of `lars_array` step memory that JAX arrays are views of."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

import lars_array
from lars_array.arrays import check_gradient, check_parameter
from lars_array.kernels.threads import thread_count, together
from lars_array.registry import Rule
from lars_array.rows import LayerOf
from lars_array.telemetry import Norms
from lars_jax.checkpoint import regrouped
from lars_jax.memory import Lent, own_copy, room_for, view
from lars_jax.transformation import Said, groups_of
from lars_jax.trees import leaves_as, named_leaves

__all__ = ["LARS"]

_PATIENCE = 0.005  # seconds: how long what is computed already may take to let go of its parameters


class LARS:
    r"""Layer-wise adaptive rate scaling for trees of JAX arrays, outside of jit, in the kernels of `lars_array`.

    Gradients are read where they are. The parameters live in memory of the optimizer, and arrays on it are handed out:
    no array that anybody can see is ever written to.

    Parameters
    ----------
    params : pytree
        The parameters, on one CPU device: a dict, a list, a dataclass, a module of Flax or Equinox. Copied, not
        modified. Leaves that are no floating-point arrays are returned as they are.
    lr : float or callable
        Learning rate; or a function of the step, counted from 0, such as those of `lars_array.schedules` and of optax.
    momentum, dampening, weight_decay : float
        As in `lars_array.LARS`.
    nesterov : bool
        As in `lars_array.LARS`.
    trust_coefficient, eps : float
        As in `lars_array.LARS`.
    rule : str, callable or Rule
        As in `lars_array.LARS`.
    trust_clip : bool
        As in `lars_array.LARS`.
    trust_bounds : pair of float, optional
        As in `lars_array.LARS`.
    always_adapt, maximize : bool
        As in `lars_array.LARS`.
    rescale_grad, max_grad_norm : float
        As in `lars_array.LARS`; the second may be None.
    nonfinite : {"raise", "skip", "propagate"}
        As in `lars_array.LARS`.
    master_weights : bool
        As in `lars_array.LARS`.
    weight_decay_mask, trust_ratio_mask : bool, pytree of bool, or callable
        As in `lars_jax.lars`.
    layer_axes : int, pytree of int, or callable
        As in `lars_jax.lars`.
    layer_of : mapping or callable, optional
        As in `lars_jax.lars`.
    donate : bool
        Whether parameters are handed over: those given here and those that a step has returned are deleted by the next
        step, which writes in place. Else a step costs a copy of the parameters.
    kernel : str, optional
        As in `lars_array.LARS`.

    Attributes
    ----------
    params : pytree
        The parameters as they are now.
    param_groups : list of dict
        Hyper-parameters, to be read and, between steps, changed, as those of `lars_array.LARS`.
    steps, skipped_steps : int
        How many steps were taken, and skipped.

    Raises
    ------
    ValueError, TypeError
        As for `lars_array.LARS`; and for traced arrays, which `lars_jax.lars` is for.

    References
    ----------
    You, Gitman, Ginsburg 2017, arXiv 1708.03888; lightning-flash 0.8.2, flash/core/optimizers/lars.py.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> params = {"w": jnp.array([3.0, 4.0]), "b": jnp.zeros(1)}
    >>> optimizer = LARS(params, lr=0.1, momentum=0.9, weight_decay=1e-4)
    >>> params = optimizer.step({"w": jnp.array([0.6, 0.8]), "b": jnp.ones(1)})
    >>> params["w"]
    Array([2.9997, 3.9996], dtype=float32)
    """

    def __init__(
        self,
        params: Any,
        lr: Any,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        trust_coefficient: float = 0.001,
        eps: float = 1e-8,
        *,
        rule: str | Rule | Callable[..., Any] = "flash",
        trust_clip: bool = False,
        trust_bounds: tuple[float, float] | None = None,
        always_adapt: bool = False,
        maximize: bool = False,
        rescale_grad: float = 1.0,
        max_grad_norm: float | None = None,
        nonfinite: str = "raise",
        master_weights: bool = False,
        weight_decay_mask: Any = True,
        trust_ratio_mask: Any = True,
        layer_axes: Any = 0,
        layer_of: LayerOf = None,
        donate: bool = False,
        kernel: str | None = None,
    ) -> None:
        options = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
            "rule": rule,
            "trust_clip": trust_clip,
            "trust_bounds": trust_bounds,
            "always_adapt": always_adapt,
            "maximize": maximize,
            "rescale_grad": rescale_grad,
            "max_grad_norm": max_grad_norm,
            "nonfinite": nonfinite,
            "master_weights": master_weights,
        }
        names, leaves, self._structure = named_leaves(params)
        self._places = [i for i, (name, leaf) in enumerate(zip(names, leaves)) if _is_parameter(name, leaf)]
        self._names = [names[i] for i in self._places]
        given = [leaves[i] for i in self._places]
        for name, leaf in zip(self._names, given):
            check_parameter(name, leaf)
        said = Said(options, weight_decay_mask, trust_ratio_mask, layer_axes)
        groups, group_of = groups_of(options, params, said)
        self._group_of = [group_of[i] for i in self._places]
        self._layer_of, self._kernel, self._donate = layer_of, kernel, donate
        self._memory = [own_copy(leaf) for leaf in given]
        present = sorted(set(self._group_of))
        self._group_of = [present.index(k) for k in self._group_of]
        groups = [groups[k] for k in present]
        self._inner = self._made(groups)
        self._others = {i: leaf for i, leaf in enumerate(leaves) if i not in set(self._places)}
        self._lent: list[list[Lent]] = [[] for _ in self._memory]
        self._tree = self._shown()
        if donate:
            for leaf in given:
                if isinstance(leaf, jax.Array) and not leaf.is_deleted():
                    leaf.delete()

    @property
    def params(self) -> Any:
        """The parameters as they are now."""
        return self._tree

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Hyper-parameters of each group of leaves."""
        return self._inner.param_groups

    @property
    def steps(self) -> int:
        """How many steps were taken."""
        return self._inner.steps

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped."""
        return self._inner.skipped_steps

    def step(self, grads: Any, *, found_inf: Any = None) -> Any:
        """Take a step, and return the new parameters.

        Parameters
        ----------
        grads : pytree
            In the structure of the parameters; None for a leaf that is to stay what it is. Not modified.
        found_inf : number or array of shape (), optional
            The step is skipped where it isn't zero.

        Returns
        -------
        pytree
            The parameters, in the structure in which they were given. With ``donate=True`` all that were handed out
            before are deleted; also if the step is refused for what is not finite, and then `params` has them anew.

        Raises
        ------
        ValueError, TypeError
            If `grads` does not fit the parameters. Then nothing was changed.
        NonFiniteError
            As `lars_array.LARS.step` does.
        """
        given = leaves_as(self._structure, grads, "grads")
        seen: dict[str, Any] = {}
        for name, p, i in zip(self._names, self._memory, self._places):
            seen[name] = None if given[i] is None else _gradient(name, given[i], p)
        if found_inf is not None:
            found_inf = bool(_there("found_inf", found_inf))
        if self._donate:
            self._take_back()
        before = self._inner.steps
        try:
            self._inner.step(seen, found_inf=found_inf)
        finally:
            if self._donate or self._inner.steps > before:
                self._tree = self._shown()
        return self._tree

    def replace_params(self, params: Any) -> None:
        """Go on from other parameters, of the same structure, shapes and dtypes: clipped ones, or an average.

        Parameters
        ----------
        params : pytree
            Copied, not modified.

        Raises
        ------
        ValueError, TypeError
            If they do not fit. Then nothing was changed.
        """
        given = leaves_as(self._structure, params, "params")
        new = []
        for name, p, i in zip(self._names, self._memory, self._places):
            found = _there(f"parameter {name!r}", given[i])
            if found.shape != p.shape or found.dtype != p.dtype:
                raise ValueError(
                    f"parameter {name!r} must keep its shape {p.shape!r} and dtype {p.dtype!r}; "
                    f"got {found.shape!r} and {found.dtype!r}"
                )
            new.append(found)
        if self._donate:
            self._take_back()
        for p, x in zip(self._memory, new):
            p[...] = x
        self._tree = self._shown()

    def norms(self) -> dict[str, Norms]:
        """Return the norms that the last step was taken with; see `lars_array.LARS.norms`.

        Returns
        -------
        dict of str to Norms
            By name of leaf.
        """
        return self._inner.norms()

    def trust_ratios(self) -> dict[str, float]:
        """Return the trust ratios that the last step was taken with; see `lars_array.LARS.trust_ratios`.

        Returns
        -------
        dict of str to float
            By name of leaf.
        """
        return self._inner.trust_ratios()

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of all that a step depends on beside the parameters, as `lars_array.LARS.state_dict` does.

        Returns
        -------
        dict
            By the names of the leaves: their paths with dots. Arrays are NumPy's.
        """
        return self._inner.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state of this class, of `lars_array.LARS` or of `lars_jax.to_state_dict`.

        Parameters
        ----------
        state_dict : mapping
            Not modified. Names may come in another order, and in other groups where these agree on what they say.

        Raises
        ------
        ValueError, TypeError
            If it does not fit these parameters; then nothing was changed.
        """
        names = [list(group["names"]) for group in self._inner.param_groups]
        self._inner.load_state_dict(regrouped(state_dict, names))

    def __repr__(self) -> str:
        return f"lars_jax.{self._inner!r}"

    def _made(self, groups: list[dict[str, Any]]) -> lars_array.LARS:
        found = []
        for number, group in enumerate(groups):
            mine = zip(self._names, self._memory, self._group_of, strict=True)
            found.append(group | {"params": {name: p for name, p, k in mine if k == number}})
        return lars_array.LARS(found, layer_of=self._layer_of, kernel=self._kernel)

    def _shown(self) -> Any:
        """Return the parameters as a tree of JAX arrays: of our memory, or of copies of it."""
        memory = self._memory if self._donate else self._rooms()
        lent: list[Lent] = []
        copies = iter([] if self._donate else list(zip(memory, self._memory, strict=True)))
        here = threading.get_ident()

        def work() -> None:
            if threading.get_ident() == here:  # what JAX is set to is a thread's own
                lent.extend(map(Lent, memory))
            for target, source in copies:
                np.copyto(target, source)

        together(work, 1 if self._donate else thread_count(2))
        leaves: list[Any] = [self._others.get(i) for i in range(self._structure.num_leaves)]
        for i, known, one in zip(self._places, self._lent, lent, strict=True):
            leaves[i] = one.array
            known[:] = [one] if self._donate else [*known[-1:], one]  # what is older is its owner's business
            if not self._donate:
                one.forget()
        return self._structure.unflatten(leaves)

    def _rooms(self) -> list[Any]:
        """Return memory that nobody sees, for a copy of each parameter."""
        rooms = []
        for known, p in zip(self._lent, self._memory):
            free = next((lent for lent in known if not lent.is_seen()), None)
            rooms.append(room_for(p) if free is None else free.memory)
            if free is not None:
                known.remove(free)
        return rooms

    def _take_back(self) -> None:
        """Delete what was lent. Memory that is looked at all the same is left to whoever does."""
        lent = [known[0] for known in self._lent]
        for one in lent:
            one.array.delete()
            one.forget()
        deadline = time.monotonic() + _PATIENCE
        while any(one.is_seen() for one in lent) and time.monotonic() < deadline:
            time.sleep(0)
        seen = [k for k, one in enumerate(lent) if one.is_seen()]
        if seen:
            for k in seen:
                self._memory[k] = own_copy(self._memory[k])
            self._inner = self._moved()

    def _moved(self) -> lars_array.LARS:
        """Return the inner optimizer, on the memory as it is now."""
        old = self._inner
        options = [{key: x for key, x in group.items() if key not in ("params", "names")} for group in old.param_groups]
        new = self._made(options)
        new.attach_state(old.state_views())
        new.steps, new.skipped_steps = old.steps, old.skipped_steps
        for group, mine in zip(old.param_groups, new.param_groups, strict=True):
            group["params"] = mine["params"]
        new.param_groups = old.param_groups  # which the user may hold
        return new

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_lent": [[] for _ in self._memory], "_tree": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._memory = [own_copy(p) for p in self._memory]
        self._inner = self._moved()
        self._tree = self._shown()


def _is_parameter(name: str, leaf: Any) -> bool:
    if isinstance(leaf, jax.core.Tracer):
        raise TypeError(_traced(f"parameter {name!r}"))
    if not isinstance(leaf, (jax.Array, np.ndarray)) or not jax.numpy.issubdtype(leaf.dtype, jax.numpy.inexact):
        return False
    _there(f"parameter {name!r}", leaf)
    return True


def _traced(what: str) -> str:
    return f"{what} must be an array with values, which a traced one has not; under jit use lars_jax.lars"


def _there(what: str, array: Any) -> Any:
    """Return a NumPy view of an array, or of a number, that lies where the optimizer's memory does.

    Raises
    ------
    TypeError
        If it is traced, or lies elsewhere.
    """
    if isinstance(array, jax.core.Tracer):
        raise TypeError(_traced(what))
    if isinstance(array, jax.Array):
        if array.is_deleted():
            raise ValueError(f"{what} was deleted: it was donated to an earlier step")
        if len(array.devices()) != 1 or next(iter(array.devices())) != jax.local_devices(backend="cpu")[0]:
            places = ", ".join(sorted(map(str, array.devices())))
            raise TypeError(f"{what} must lie on the first CPU device, under jit use lars_jax.lars; got {places}")
    return view(array)


def _gradient(name: str, g: Any, p: Any) -> Any:
    if not isinstance(g, (jax.Array, np.ndarray)):
        raise TypeError(f"the gradient of {name!r} must be an array; got {g!r}")
    found = _there(f"the gradient of {name!r}", g)
    check_gradient(name, found, p)
    return found
