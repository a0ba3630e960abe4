"""LARS for JAX without tracing: the kernels of `lars_array` step the memory of JAX arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

import lars_array
from lars_array.arrays import check_gradient, check_parameter
from lars_array.registry import Rule
from lars_array.rows import LayerOf
from lars_array.telemetry import Norms
from lars_jax.checkpoint import regrouped
from lars_jax.places import place_of
from lars_jax.transformation import Said, groups_of
from lars_jax.trees import leaves_as, named_leaves
from lars_jax.values import check_has_values

__all__ = ["LARS"]


class LARS:
    r"""Layer-wise adaptive rate scaling for trees of JAX arrays, outside of jit, in the kernels of `lars_array`.

    Gradients are read where they are, and no array that anybody can see is ever written to. On a CUDA device, which
    needs CuPy, the host waits for nothing.

    Parameters
    ----------
    params : pytree
        The parameters, on the first CPU device or on one CUDA device: a dict, a list, a dataclass, a module of Flax or
        Equinox. Copied, not modified. Leaves that are no floating-point arrays are returned as they are; arrays of
        NumPy go where the others are.
    lr : float or callable
        Learning rate; or a function of the step, counted from 0, such as those of `lars_array.schedules` and of optax.
        On a CUDA device this, and the other numbers below, may be arrays of shape () there, which are not checked.
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
        Whether parameters are handed over: those given here are deleted, and so are, by the next step, those that a
        step has returned; it writes in place, and needs them to be there. Else a step costs a copy of the parameters.
    kernel : str, optional
        As in `lars_array.LARS`.

    Attributes
    ----------
    params : pytree
        The parameters as they are now.
    param_groups : list of dict
        Hyper-parameters, to be read and, between steps, changed, as those of `lars_array.LARS`.
    steps, skipped_steps : int
        How many steps were taken, and skipped. On a CUDA device, as in `lars_array.LARS`, a step counts as taken until
        it is known that it was not.

    Raises
    ------
    ValueError, TypeError
        As for `lars_array.LARS`; and for arrays that are traced, or lie on several devices, which `lars_jax.lars` is
        for.
    ImportError
        If parameters lie on a CUDA device and CuPy is not installed.

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
        present = sorted({group_of[i] for i in self._places})
        self._group_of = [present.index(group_of[i]) for i in self._places]
        self._order = sorted(range(len(given)), key=self._group_of.__getitem__)  # of the parameters of all groups
        self._layer_of, self._kernel, self._donate = layer_of, kernel, donate
        self._place = place_of(self._names, given, donate)
        self._others = {i: leaf for i, leaf in enumerate(leaves) if i not in set(self._places)}
        with self._place.here():
            self._inner = self._made([groups[k] for k in present])
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
            If `grads` does not fit the parameters, or parameters that were handed over are gone. Then nothing was
            changed.
        NonFiniteError
            As `lars_array.LARS.step` does. On a CUDA device the step that is refused returns the parameters as they
            were; a later call raises, before it does anything.
        """
        given = leaves_as(self._structure, grads, "grads")
        given = [given[i] for i in self._places]
        if not self._place.fits(given):
            for name, g, p in zip(self._names, given, self._place.memory):
                if g is not None:
                    self._check_gradient(name, g, p)
        if found_inf is not None:
            check_has_values("found_inf", found_inf)
        with self._place.here():
            views = self._begin(given)
            skipped, refused = self._inner.skipped_steps, True
            try:
                with self._place.numbers(self._inner.param_groups, found_inf) as found:
                    self._inner.step([views[k] for k in self._order], found_inf=found)
                refused = False
            finally:
                same = refused or (self._place.knows and self._inner.skipped_steps > skipped)
                if self._donate or not same or self._is_gone():
                    self._tree = self._shown()
        return self._tree

    def synchronize(self) -> None:
        """Wait for the device until all steps are done, and then know what became of them.

        Raises
        ------
        NonFiniteError
            As `lars_array.LARS.synchronize` does.
        """
        self._inner.synchronize()

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
        new = [given[i] for i in self._places]
        for name, x, p in zip(self._names, new, self._place.memory):
            self._check_array(f"parameter {name!r}", x)
            if x.shape != p.shape or x.dtype != p.dtype:
                raise ValueError(
                    f"parameter {name!r} must keep its shape {p.shape!r} and dtype {p.dtype!r}; "
                    f"got {x.shape!r} and {x.dtype!r}"
                )
        with self._place.here():
            has_masters = any("master" in own for own in self._inner.state_views(wait=False).values())
            if has_masters:
                self._inner.synchronize()  # what it has to say comes before anything is changed
            if self._place.refill(new):
                self._follow()
            if has_masters:
                self._forget_masters()
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
        with self._place.here():
            return self._place.outside(self._inner.state_dict())

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
        given = regrouped(state_dict, names)
        with self._place.here():
            if _is_state(given.get("state")):
                given["state"] = self._place.inside(given["state"])
            self._inner.load_state_dict(given)

    def __repr__(self) -> str:
        return f"lars_jax.{self._inner!r}"

    def _check_array(self, what: str, x: Any) -> None:
        check_has_values(what, x)
        if not isinstance(x, (jax.Array, np.ndarray)):
            raise TypeError(f"{what} must be an array; got {x!r}")
        self._place.check(what, x)

    def _check_gradient(self, name: str, g: Any, p: Any) -> None:
        self._check_array(f"the gradient of {name!r}", g)
        if g.shape != p.shape or g.dtype != p.dtype:
            check_gradient(name, *(np.broadcast_to(np.zeros((), x.dtype), x.shape) for x in (g, p)))

    def _made(self, groups: list[dict[str, Any]]) -> lars_array.LARS:
        found = []
        for number, group in enumerate(groups):
            mine = zip(self._names, self._place.memory, self._group_of, strict=True)
            found.append(group | {"params": {name: p for name, p, k in mine if k == number}})
        return lars_array.LARS(found, layer_of=self._layer_of, kernel=self._kernel)

    def _begin(self, given: list[Any]) -> list[Any]:
        """Return what is given as arrays that the inner optimizer takes, whose parameters nobody sees any more."""
        views, moved = self._place.begin(given)
        if moved:
            self._follow()
        return views

    def _follow(self) -> None:
        """Step the memory where it is now, once a device has told what became of the steps so far."""
        try:
            self._inner.synchronize()
        except lars_array.NonFiniteError:
            self._inner = self._moved()
            self._tree = self._shown()
            raise
        self._inner = self._moved()

    def _forget_masters(self) -> None:
        """Have the next step make masters anew, of the parameters as they are now."""
        state = self._inner.state_views()
        self._inner.attach_state({name: own | {"master": None} for name, own in state.items()})

    def _is_gone(self) -> bool:
        """Return whether the owner of the copies that were handed out has given one away."""
        return any(isinstance(x, jax.Array) and x.is_deleted() for x in jax.tree.leaves(self._tree))

    def _shown(self) -> Any:
        """Return the parameters as a tree of JAX arrays."""
        leaves: list[Any] = [self._others.get(i) for i in range(self._structure.num_leaves)]
        for i, x in zip(self._places, self._place.end(), strict=True):
            leaves[i] = x
        return self._structure.unflatten(leaves)

    def _moved(self) -> lars_array.LARS:
        """Return the inner optimizer, on the memory as it is now."""
        old = self._inner
        options = [{key: x for key, x in group.items() if key not in ("params", "names")} for group in old.param_groups]
        new = self._made(options)
        new.attach_state(self._place.inside(old.state_views()))
        new.steps, new.skipped_steps, new._stepper.last = old.steps, old.skipped_steps, old._stepper.last
        for group, mine in zip(old.param_groups, new.param_groups, strict=True):
            group["params"] = mine["params"]
        new.param_groups = old.param_groups  # which the user may hold
        return new

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tree": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        with self._place.here():
            self._inner = self._moved()
            self._tree = self._shown()


def _is_parameter(name: str, leaf: Any) -> bool:
    if isinstance(leaf, jax.core.Tracer):
        check_has_values(f"parameter {name!r}", leaf)
    return isinstance(leaf, (jax.Array, np.ndarray)) and jax.numpy.issubdtype(leaf.dtype, jax.numpy.inexact)


def _is_state(state: Any) -> bool:
    return isinstance(state, Mapping) and all(isinstance(own, Mapping) for own in state.values())
