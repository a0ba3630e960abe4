"""LARS for JAX without tracing: the kernels of `lars_array` step the memory of JAX arrays."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lars_array import Norms, Rule
from lars_array._arrays import ArraySpecs, check_parameter
from lars_array._stepper import KEPT, ParamState, Stepper, shown
from lars_array.hyperparams import (
    DEFAULTS,
    Hyperparams,
    check_layer_axes,
    complete,
    defaults_from,
    described,
    options_of,
    readable,
    scheduled,
    warn_of_sgd,
)
from lars_array.layers import LayerOf
from lars_array.state.checkpoint import read_checkpoint
from lars_jax._arguments import LarsArguments, check_rate
from lars_jax._buffers import DonatedBuffers, buffers_of
from lars_jax._devices import check_has_values
from lars_jax._messages import check_leaf, is_torch, no_parameters
from lars_jax._trees import Leaves
from lars_jax.checkpoint import regrouped

__all__ = ["LARS"]


class LARS:
    r"""Layer-wise adaptive rate scaling for trees of JAX arrays, outside of jit, by the kernels of `lars_array`.

    Gradients are read in place, and no array that is visible elsewhere is ever written to. On a CUDA device, which
    needs CuPy, the host does not wait. Arguments as for `lars_array.LARS`, except: there are no groups and no `adapt`,
    and those below.

    Parameters
    ----------
    params : pytree
        The parameters, on the first CPU device or on one CUDA device: a dict, a list, a dataclass, a module of Flax or
        Equinox. Copied, not modified. Leaves that are no floating-point arrays are returned as they are, and must have
        no gradients; NumPy arrays go to the device of the others.
    lr : float or callable
        Learning rate; or a function of the step, counted from 0, such as those of `lars_array.schedules` and of optax.
        On a CUDA device this, and the other numbers, may be arrays of shape () there, which are not checked.
    weight_decay_mask, trust_ratio_mask : bool, pytree of bool, or callable
        As for `lars_jax.lars`.
    layer_axes : int, pytree of int, or callable
        As for `lars_jax.lars`.
    layer_of : mapping or callable, optional
        As for `lars_jax.lars`.
    donate : bool
        If True, the arrays given here are deleted, and those that a step returns by the next step, which reuses their
        memory. If False, each step copies the parameters.

    Attributes
    ----------
    params : pytree
        The parameters as they are now.
    param_groups : list of dict
        Hyper-parameters, to be read and, between steps, changed; "names", only read.
    steps, skipped_steps : int
        As for `lars_array.LARS`.

    Raises
    ------
    ValueError, TypeError
        As for `lars_array.LARS`; and for arrays that are traced, or lie on several devices: `lars_jax.lars` takes them.
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
        rule: str | Rule | Callable[..., Any] = DEFAULTS["rule"],
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
        hyper = defaults_from(locals()) | {"layer_axes": 0}  # which leaves have themselves
        check_rate("lr", lr, params)
        readable(_with_values(hyper, 0), 0)
        tree = Leaves.of(params)
        values = [np.asarray(x) if isinstance(x, np.generic) else x for x in tree.values]
        is_parameter = list(map(_is_parameter, tree.names, values))
        index = [i for i, yes in enumerate(is_parameter) if yes]
        if not index:
            raise no_parameters(params)
        for i in index:
            check_parameter(tree.names[i], values[i])
        self._optional = [not yes for yes in is_parameter]
        arguments = LarsArguments(hyper, weight_decay_mask, trust_ratio_mask, layer_axes)
        of_leaves = arguments.of_leaves(tree, self._optional)
        groups, group_of = arguments.groups([of_leaves[i] for i in index])
        self._leaves = tree._replace(tree=None, values=[])
        order = sorted(range(len(index)), key=group_of.__getitem__)
        self._index = [index[i] for i in order]  # of the parameters among the leaves, group by group
        own_names, given = [tree.names[i] for i in self._index], [values[i] for i in self._index]
        self._others = [None if yes else leaf for yes, leaf in zip(is_parameter, values)]
        self._param_groups = [
            complete(group) | {"names": [tree.names[i] for i, own in zip(index, group_of) if own == k]}
            for k, group in enumerate(groups)
        ]
        self._hyperparams, self._stepper = Hyperparams(), Stepper(kernel)
        # Groups that a mask excludes from decay, which depends on a schedule whether others have.
        excluded = {k for k, i in zip(group_of, index) if not of_leaves[i][0]} if callable(weight_decay) else set()
        self._excluded, self._decay, self._always_adapt = excluded, weight_decay, always_adapt
        self._steps, self._skipped_steps = 0, 0
        self._last: Any = None  # the `StepResult` of the last step
        self._memory = buffers_of(own_names, given, donate)
        with self._memory.context():
            group_of = [group_of[i] for i in order]
            self._axes = [group["layer_axes"] for group in self._param_groups]
            self._state = _State(self._memory, own_names, group_of, [self._axes[k] for k in group_of], layer_of)
            self._stepper.choose_kernel(self._state.params)
            self._release()
        for leaf in given if donate else ():
            if isinstance(leaf, jax.Array):
                leaf.delete()

    @property
    def params(self) -> Any:
        """The parameters as they are now."""
        return self._tree

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Hyper-parameters of each group of leaves."""
        return self._param_groups

    @property
    def steps(self) -> int:
        """How many steps were taken."""
        return self._steps

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped."""
        return self._skipped_steps

    def step(self, grads: Any, *, found_inf: Any = None) -> Any:
        """Take a step, and return the new parameters.

        Parameters
        ----------
        grads : pytree
            In the structure of the parameters, or with their names in dicts or modules of other types, such as a State
            of Flax for its module; None for a leaf that is skipped. Not modified.
        found_inf : number or array of shape (), optional
            The step is skipped where it isn't zero.

        Returns
        -------
        pytree
            The parameters, in the structure in which they were given. With ``donate=True`` all that were returned
            before are deleted; also if the step is rejected as not finite, and then `params` has them anew.

        Raises
        ------
        ValueError, TypeError
            If `grads` does not fit the parameters, or these were deleted; for traced numbers, whose derivatives would
            be lost; and inside of functions that JAX traces, or under ``jax.set_mesh`` of other devices. Then nothing
            was changed.
        NonFiniteError
            As for `lars_array.LARS.step`. On a CUDA device a rejected step returns the parameters as they were; a later
            call raises, before it does anything.
        """
        given = self._leaves.match(grads, "grads", self._optional)
        for name, is_optional, g in zip(self._leaves.names, self._optional, given):
            if is_optional and _is_inexact(g):
                raise TypeError(f"the gradient of {shown(name)} must be None, since only arrays of floats are trained")
        self._memory.check_context()
        gradients = self._memory.gradients([given[i] for i in self._index])
        check_has_values("found_inf", found_inf)
        result: Any = None
        with self._memory.context():
            try:
                self._poll_device()
                options, found = self._memory.numbers(self._options(), found_inf)
                groups = self._hyperparams.read(options, self._steps)
                check_layer_axes(groups, self._axes)
                if not self._steps + self._skipped_steps:
                    warn_of_sgd(groups)
                self._memory.acquire()
            except BaseException:
                self._memory.forget()
                raise
            self._state.params = self._memory.arrays  # another list if they have moved
            try:
                result = self._stepper.step(self._state, gradients, groups, found)
            finally:
                # Copies that were returned before are still right, but may have been donated.
                if self._memory.donates or result is not None or any(x.is_deleted() for x in self._released):
                    self._release()
                self._memory.forget()
        if result is None:
            self._skipped_steps += 1
        else:
            self._steps += 1
            self._last = result if result.names else self._last
        return self._tree

    def synchronize(self) -> None:
        """Wait for the device, and update `steps` and `skipped_steps`.

        Raises
        ------
        NonFiniteError
            As for `lars_array.LARS.synchronize`.
        """
        self._poll_device(wait=True)

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
        given = self._leaves.match(params, "params", self._optional)
        self._memory.check_context()
        new = [given[i] for i in self._index]
        for name, x, p in zip(self._state.names, new, self._state.params):
            self._memory.check(f"parameter {shown(name)}", x)
            if x.shape != p.shape or x.dtype != p.dtype:
                raise ValueError(
                    f"parameter {shown(name)} must keep its shape {p.shape!r} and dtype {p.dtype!r}; "
                    f"got {x.shape!r} and {x.dtype!r}"
                )
        with self._memory.context():
            self._memory.refill(new)
            self._state.params = self._memory.arrays
            self._state.masters = [None] * len(new)  # the next step makes them anew
            self._release()

    def norms(self) -> dict[str, Norms]:
        """Return the norms of the last step; see `lars_array.LARS.norms`.

        Returns
        -------
        dict of str to Norms
            By name of leaf.
        """
        return {} if self._last is None else self._last.norms()

    def trust_ratios(self) -> dict[str, float]:
        """Return the trust ratios of the last step; see `lars_array.LARS.trust_ratios`.

        Returns
        -------
        dict of str to float
            By name of leaf.
        """
        return {} if self._last is None else self._last.trust_ratios()

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of all that a step depends on beside the parameters, as `lars_array.LARS.state_dict` does.

        Returns
        -------
        dict
            By the names of the leaves: their paths with dots. Arrays are NumPy's.
        """
        self.synchronize()
        with self._memory.context():
            state = {
                name: {key: self._memory.to_numpy(x) if key in KEPT else x for key, x in own.items()}
                for name, own in self._state.views().items()
            }
        groups = [
            {key: np.asarray(x) if isinstance(x, jax.Array) else copy.deepcopy(x) for key, x in group.items()}
            for group in self._param_groups
        ]
        return {"steps": self._steps, "skipped_steps": self._skipped_steps, "param_groups": groups, "state": state}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state of this class, of `lars_array.LARS` or of `lars_jax.to_state_dict`.

        Parameters
        ----------
        state_dict : mapping
            Not modified. Names may come in another order, and in other groups if these have the same options.

        Raises
        ------
        ValueError, TypeError
            If it does not fit these parameters; then nothing was changed.
        """
        names = [group["names"] for group in self._param_groups]
        given = regrouped(state_dict, names)
        with self._memory.context():
            given = {key: self._memory.from_numpy(x) if key == "state" else x for key, x in given.items()}
            read = read_checkpoint(given, names, self._state.params)
            self._state.attach(read.state, copied=True)
        self._steps, self._skipped_steps = read.steps, read.skipped_steps
        for group, options in zip(self._param_groups, read.groups):
            group.update(options | {"layer_axes": group["layer_axes"]})

    def __repr__(self) -> str:
        return described("lars_jax.LARS", self._param_groups)

    def _release(self) -> None:
        """Let `params` be the parameters as they are now."""
        leaves = list(self._others)
        self._released = self._memory.release()
        for i, x in zip(self._index, self._released, strict=True):
            leaves[i] = x
        self._tree = self._leaves.structure.unflatten(leaves)

    def _options(self) -> list[dict[str, Any]]:
        """Return the hyper-parameters of the groups at this step."""
        options = [_with_values(options_of(group), self._steps) for group in self._param_groups]
        if self._excluded and not _with_values({"weight_decay": self._decay}, self._steps)["weight_decay"]:
            for k in self._excluded:
                options[k]["always_adapt"] = self._always_adapt
        return options

    def _poll_device(self, *, wait: bool = False) -> None:
        """Update the step counters from the device and raise if it rejected a step."""
        steps, skipped, error = self._state.poll_device(wait=wait)
        self._steps += steps
        self._skipped_steps += skipped
        if error is not None:
            raise error

    def __copy__(self) -> LARS:
        return copy.deepcopy(self)  # two optimizers can't step the same memory

    def __getstate__(self) -> dict[str, Any]:
        self.synchronize()
        last = None if self._last is None else self._last.settled()
        return self.__dict__ | {"_tree": None, "_released": None, "_last": last}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        with self._memory.context():
            self._state.params = self._memory.arrays
            self._state.attach(self._memory.from_numpy(self._state.views()))
            self._release()


class _State(ParamState):
    """Parameters in the memory of JAX arrays; gradients are JAX arrays, or what kernels take."""

    def __init__(
        self, memory: DonatedBuffers, names: list[str], group_of: list[int], axes: list[int], layer_of: LayerOf
    ) -> None:
        super().__init__(layer_of)
        self.memory, self.names, self.params = memory, names, memory.arrays
        self.group_of, self.layer_axes = np.array(group_of, np.int32), axes
        self.buffers, self.masters = [None] * len(names), [None] * len(names)
        self.previous_lr = np.zeros(len(names))
        self.rows()  # which refuses what can't be layers

    def view(self, array: Any) -> Any:
        """See `ParamState.view`."""
        return self.memory.view(array) if isinstance(array, jax.Array) else array

    def view_all(self, arrays: list[Any]) -> list[Any]:
        """See `ParamState.view_all`."""
        return list(map(self.view, arrays))

    def specs(self, arrays: Sequence[Any], specs_of: Callable[[Sequence[Any]], ArraySpecs] | None) -> ArraySpecs:
        """See `ParamState.specs`."""
        return self.memory.specs if isinstance(arrays[0], jax.Array) else super().specs(arrays, specs_of)

    def check_gradient(self, name: str, g: Any, p: Any) -> None:
        """Let all pass: `DonatedBuffers.gradients` has checked them, before parameters were donated."""

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"params": []}  # views


def _is_parameter(name: str, leaf: Any) -> bool:
    if isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct):
        check_has_values(f"parameter {shown(name)}", leaf)
    if is_torch(leaf):
        check_leaf(name, leaf)
    return isinstance(leaf, (jax.Array, np.ndarray)) and jax.numpy.issubdtype(leaf.dtype, jax.numpy.inexact)


def _is_inexact(g: Any) -> bool:
    return isinstance(g, float | complex) or (hasattr(g, "dtype") and jax.numpy.issubdtype(g.dtype, jax.numpy.inexact))


def _with_values(options: Mapping[str, Any], step: int) -> dict[str, Any]:
    """Return options with the values of schedules; raise for traced ones, whose derivatives would be lost."""
    known = scheduled(options, step)
    for name, x in known.items():
        check_has_values(name, x)
    return known
