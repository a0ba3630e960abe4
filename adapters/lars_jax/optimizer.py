"""LARS for JAX without tracing: the kernels of `lars_array` step the memory of JAX arrays."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lars_array import Rule
from lars_array._arrays import ArraySpecs, check_parameter
from lars_array._stepper import ParamState, StatefulOptimizer, Stepper, shown
from lars_array.hyperparams import (
    defaults_from,
    described,
    named_options,
    options_of,
    readable,
    scheduled,
)
from lars_array.layers import LayerOf
from lars_jax._arguments import LarsArguments, check_rate
from lars_jax._buffers import DonatedBuffers, buffers_of
from lars_jax._devices import check_has_values
from lars_jax._messages import check_leaf, is_torch, no_parameters
from lars_jax._trees import Leaves
from lars_jax.checkpoint import regrouped

__all__ = ["LARS"]


class LARS(StatefulOptimizer):
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

    @named_options
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
        hyper = defaults_from(locals()) | {"layer_axes": 0}  # which leaves have themselves
        check_rate("lr", lr, params)
        if not isinstance(donate, bool):
            raise TypeError(f"donate must be True or False; got {shown(donate)}")
        readable(_with_values(hyper, 0), 0)
        super().__init__(Stepper(kernel))
        tree = Leaves.of(params)
        values = [np.asarray(x) if isinstance(x, np.generic) else x for x in tree.values]
        is_parameter = list(map(_is_parameter, tree.names, values))
        index = [i for i, yes in enumerate(is_parameter) if yes]
        if not index:
            raise no_parameters(params)
        for i in index:
            check_parameter(tree.names[i], values[i])
        self._others = {name for name, yes in zip(tree.names, is_parameter) if not yes}
        arguments = LarsArguments(hyper, weight_decay_mask, trust_ratio_mask, layer_axes)
        of_leaves = arguments.of_leaves(tree, self._others)
        self.param_groups = arguments.groups([tree.names[i] for i in index], [of_leaves[i] for i in index])
        self._layer_axes = [group["layer_axes"] for group in self.param_groups]
        names = [name for group in self.param_groups for name in group["names"]]
        place = {name: i for i, name in enumerate(tree.names)}
        self._index = [place[name] for name in names]  # of the parameters among the leaves, group by group
        given = [values[i] for i in self._index]
        # Whether groups without decay are adapted by all rules depends, at each step, on the decay of the others.
        self._decay, self._always_adapt = weight_decay, always_adapt
        self._excluded = [k for k, group in enumerate(self.param_groups) if group["weight_decay"] is not weight_decay]
        self._leaves = tree._replace(tree=None, values=[None if yes else x for yes, x in zip(is_parameter, values)])
        self._memory = buffers_of(names, given, donate)
        self._tree: Any = None
        with self._memory.context():
            self._state = _State(self._memory, names, self.param_groups, layer_of)
            self._stepper.choose_kernel(self._state.params)
            self._release()
        for leaf in given if donate else ():
            if isinstance(leaf, jax.Array):
                leaf.delete()

    @property
    def params(self) -> Any:
        """The parameters as they are now."""
        if self._tree is None:  # a step has ended before it made them
            with self._memory.context():
                self._release()
        return self._tree

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
            be lost; and inside of functions that JAX traces, or under `jax.set_mesh` of other devices. Then nothing
            was changed.
        NonFiniteError
            As for `lars_array.LARS.step`. On a CUDA device a rejected step returns the parameters as they were; a later
            call raises, before it does anything.
        """
        given = self._leaves.match(grads, "grads", self._others)
        for name, g in zip(self._leaves.names, given):
            if name in self._others and _is_inexact(g):
                raise TypeError(f"the gradient of {shown(name)} must be None, since only arrays of floats are trained")
        memory, before = self._memory, self._tree
        memory.check_context()
        check_has_values("found_inf", found_inf)
        with memory.context():
            try:
                gradients = memory.gradients([given[i] for i in self._index])
                self._poll_device()
                options, found = memory.numbers(self._options(), found_inf)
                groups = self._read_groups(options)
                steps, self._tree = self.steps, None  # made when somebody asks, whatever ends this step
                memory.acquire()
                self._state.params = memory.arrays  # another list if they have moved
                try:
                    self._take_step(gradients, groups, found)
                finally:
                    # Copies that were returned before are still right, but may have been donated.
                    if memory.donates or self.steps > steps or any(x.is_deleted() for x in self._released):
                        self._release()
                    else:
                        self._tree = before
            finally:
                memory.forget()
        return self._tree

    def replace_params(self, params: Any) -> None:
        """Go on from other parameters, of the same structure, shapes and dtypes: clipped ones, or an average.

        Parameters
        ----------
        params : pytree
            Copied, not modified. Leaves that are no floating-point arrays are taken over too.

        Raises
        ------
        ValueError, TypeError
            If they do not fit. Then nothing was changed.
        """
        given = self._leaves.match(params, "params", self._others)
        self._memory.check_context()
        new = [np.asarray(x) if isinstance(x, np.generic) else x for x in (given[i] for i in self._index)]
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
            own = zip(self._leaves.names, self._leaves.values, given)
            others = [old if x is None or name not in self._others else x for name, old, x in own]
            self._leaves = self._leaves._replace(values=others)
            self._release()

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of all that a step depends on beside the parameters, as `lars_array.LARS.state_dict` does.

        Returns
        -------
        dict
            By the names of the leaves: their paths with dots. Arrays are NumPy's.
        """
        with self._memory.context():
            saved = self._saved(self._memory.to_numpy)
        for group in saved["param_groups"]:
            group.update({key: np.asarray(x) for key, x in group.items() if isinstance(x, jax.Array)})
        return saved

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
        given = regrouped(state_dict, [group["names"] for group in self.param_groups])
        with self._memory.context():
            self._load(given | {"state": self._memory.from_numpy(given.get("state"))})

    def __repr__(self) -> str:
        return described("lars_jax.LARS", self.param_groups)

    def _release(self) -> None:
        """Let `params` be the parameters as they are now."""
        leaves = list(self._leaves.values)
        self._released = self._memory.release()
        for i, x in zip(self._index, self._released, strict=True):
            leaves[i] = x
        self._tree = self._leaves.structure.unflatten(leaves)

    def _options(self) -> list[dict[str, Any]]:
        """Return the hyper-parameters of the groups at this step."""
        options = [_with_values(options_of(group), self.steps) for group in self.param_groups]
        if callable(self._decay) and not _with_values({"weight_decay": self._decay}, self.steps)["weight_decay"]:
            for k in self._excluded:
                options[k]["always_adapt"] = self._always_adapt
        return options

    def __copy__(self) -> LARS:
        return copy.deepcopy(self)  # two optimizers can't step the same memory

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_tree": None, "_released": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        with self._memory.context():
            self._state.params = self._memory.arrays
            self._state.attach(self._memory.from_numpy(self._state.views()))
            self._release()


class _State(ParamState):
    """Parameters in the memory of JAX arrays; gradients are JAX arrays, or what kernels take."""

    def __init__(
        self, memory: DonatedBuffers, names: list[str], groups: Sequence[Mapping[str, Any]], layer_of: LayerOf
    ) -> None:
        super().__init__(layer_of)
        self.memory, self.names, self.params = memory, names, memory.arrays
        self.group_of = np.array([k for k, group in enumerate(groups) for _ in group["names"]], np.int32)
        self.layer_axes = [group["layer_axes"] for group in groups for _ in group["names"]]
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
    return isinstance(leaf, (jax.Array, np.ndarray)) and _is_inexact(leaf)


def _is_inexact(x: Any) -> bool:
    return isinstance(x, float | complex) or (hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact))


def _with_values(options: Mapping[str, Any], step: int) -> dict[str, Any]:
    """Return options with the values of schedules; raise for traced ones, whose derivatives would be lost."""
    known = scheduled(options, step)
    for name, x in known.items():
        check_has_values(name, x)
    return known
