"""The optimizer for arrays that are updated in place: parameter groups, state and step counters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from numbers import Real
from operator import is_
from typing import Any

from array_api_compat import array_namespace

from lars_array._arrays import device_context
from lars_array._messages import located, shown
from lars_array._stepper import StatefulOptimizer, Stepper
from lars_array.core import Rule
from lars_array.hyperparams import (
    complete,
    defaults_from,
    described,
    named_options,
    readable,
    required,
)
from lars_array.layers import LayerOf
from lars_array.state.inputs import gradient_order, match_gradients, read_parameters
from lars_array.state.shards import AllReduce, checked_all_reduce, names_of_layers, refusals_are_told
from lars_array.state.store import ParamState

__all__ = ["LARS"]


class LARS(StatefulOptimizer):
    r"""Layer-wise adaptive rate scaling (You et al. 2017), with the arguments of ``flash.core.optimizers.LARS``.

    .. math::
        r = \eta \frac{\|p\|}{\|g\| + w\|p\| + \epsilon}, \qquad
        v \leftarrow \mu v + (1 - \tau)\,r\,(g + w p), \qquad p \leftarrow p - \text{lr}\,v

    for each parameter array p, a layer, with gradient g and momentum buffer v. As in torch's SGD, dampening does not
    apply to the first step of a layer. With weight decay 0, the default, this is SGD, see `always_adapt`; the first
    step warns of that, unless a rule was given, or `adapt` or `always_adapt` differs from its default.

    Parameters
    ----------
    params : iterable of arrays, mapping of name to array, iterable of (name, array), or iterable of groups
        The parameters, updated in place: float64, float32, float16, bfloat16 or complex NumPy arrays, or writable
        arrays of any other Array API library. A group is a dict ``{"params": any of these forms, **overrides}``; every
        argument below except `layer_of`, `kernel` and `layers` can be overridden. Parameters without a name are named
        by their position.
    lr : float or callable
        Learning rate, or a function of the step, counted from 0, such as those of `lars_array.schedules`. Every other
        number below may be a function of the step, too.
    momentum : float
        :math:`\mu`, 0 by default.
    dampening : float
        :math:`\tau`, 0 by default.
    weight_decay : float
        w, the L2 penalty, 0 by default.
    nesterov : bool
        Use :math:`p \leftarrow p - \text{lr}\,(r\,(g + w p) + \mu v)` instead.
    trust_coefficient : float
        :math:`\eta`, 0.001 by default.
    eps : float
        :math:`\epsilon`, 1e-8 by default.
    rule : str, callable or Rule
        The variant of LARS: a name in `lars_array.RULES`, or a custom function, see `lars_array.Rule`.
    trust_clip : bool
        LARC: :math:`r \leftarrow \min(r / \text{lr}, 1)`.
    trust_bounds : pair of float, optional
        :math:`r \leftarrow \min(\max(r, \text{lowest}), \text{highest})`, before the clip.
    always_adapt : bool
        Whether layers with w = 0 are adapted too, by rules that exclude them.
    adapt : bool
        False: r = 1 for these layers, and weight decay still applies. This is SGD.
    maximize : bool
        :math:`g \leftarrow -g`, before everything else.
    rescale_grad : float
        :math:`g \leftarrow \mathrm{rescale\_grad}\,g`, before clipping and the rule.
    max_grad_norm : float, optional
        :math:`g \leftarrow g \min(1, \mathrm{max\_grad\_norm} / \|g\|)`, with the norm of all gradients together.
    nonfinite : {"raise", "skip", "propagate"}
        Policy for layers with non-finite parameters, gradients or coefficients. "raise": the step is rejected with a
        `NonFiniteError` that names the layer, and nothing is changed. "skip": the step is skipped, nothing is changed,
        and `skipped_steps` is incremented. "propagate": no check. Momentum buffers are not checked. On a GPU the host
        does not wait: with "raise" a bad step changes nothing, and the error is raised by a later call, at the latest
        by `synchronize`.
    layer_axes : int
        The number of leading axes that index layers, 0 by default. With 1, each ``p[i]`` is a layer with its own norms,
        as in the stacked parameters of scanned layers or of experts. It cannot be changed later.
    layer_of : mapping or callable, optional
        Maps the name of a parameter to a layer label, such as a string. Parameters with the same label form one layer,
        with norms over all of them. None, or the label None: the parameter is its own layer. Applies to all groups
        together.
    master_weights : bool
        Whether a half-precision parameter (float16 or bfloat16) has a float32 master copy that is trained in its place.
        Otherwise steps smaller than the precision of the parameter are lost. Norms are those of the master, and the
        parameter is its rounding, written in the same pass. The first step creates the master from the parameter; later
        changes to the parameter are overwritten, unless `refresh_masters` is called. A step without this option drops
        the master. Ignored for other dtypes.
    kernel : str, optional
        "compiled" (NumPy arrays, with numba), "blocked" (NumPy arrays), "cuda" (CuPy arrays) or "portable". The default
        is the environment variable LARS_ARRAY_KERNEL, else the first of these kernels that supports the parameters.
    all_reduce : callable, optional
        Makes the parameters pieces of layers that are spread over processes, such as those of
        `lars_array.collectives`. ``all_reduce(table)`` adds a float64 array of shape (rows, 3) over all processes, in
        place, on the device of the parameters and in the order of its current stream; it is called once a step. All
        processes give the same layers in the same order, empty arrays where they hold nothing of one, and the same
        hyper-parameters. A group with ``all_reduce=None`` is whole on each process, and the same. If gradients are
        clipped, different functions of several groups must be over the same processes. On a GPU, a step that reports
        an earlier one has been taken, as on the other processes.
    layers : sequence of str, optional
        The names of all layers, the same list on all processes, where each holds pieces of some of them only: names of
        parameters, or labels of `layer_of`. A label may be a list, with a label for each slice of a stacked parameter.

    Attributes
    ----------
    param_groups : list of dict
        The hyper-parameters of each group, which may be changed between steps, and its "params" and "names", sequences
        that must not be changed: a step after that is rejected.
    steps, skipped_steps : int
        The numbers of steps taken and of steps skipped. On a GPU a step counts as taken until the device has reported
        otherwise.

    Raises
    ------
    ValueError
        For hyper-parameters out of range, unknown names of rules or options, duplicate names, and parameters that are
        read-only, overlap in memory or are on several devices.
    TypeError
        For parameters that are not floating-point arrays, and values of the wrong type.

    Warns
    -----
    UserWarning
        At the first step, if no layer is adapted and nobody has asked for that.

    Notes
    -----
    Norms are accumulated in float64. Half-precision parameters use float32 arithmetic and a float32 buffer.

    References
    ----------
    You, Gitman, Ginsburg 2017, arXiv 1708.03888; lightning-flash 0.8.2, flash/core/optimizers/lars.py.

    Examples
    --------
    >>> import numpy as np
    >>> w, b = np.array([[3.0, 4.0]]), np.zeros(1)
    >>> optimizer = LARS({"w": w, "b": b}, lr=0.1, momentum=0.9, weight_decay=1e-4)
    >>> optimizer.step({"w": np.array([[0.6, 0.8]]), "b": np.ones(1)})
    >>> w
    array([[2.9997, 3.9996]])
    >>> round(optimizer.trust_ratios()["w"], 6)
    0.004998
    """

    @named_options
    def __init__(
        self,
        params: Any,
        lr: Any = required,
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
        adapt: bool = True,
        maximize: bool = False,
        rescale_grad: float = 1.0,
        max_grad_norm: float | None = None,
        nonfinite: str = "raise",
        layer_axes: int = 0,
        layer_of: LayerOf = None,
        master_weights: bool = False,
        kernel: str | None = None,
        all_reduce: AllReduce | None = None,
        layers: Sequence[str] | None = None,
    ) -> None:
        if isinstance(params, Real) and not isinstance(lr, Real):
            raise TypeError(f"params come first, and then lr; got params={shown(params)} and lr={shown(lr)}")
        self.defaults = defaults_from(locals())
        readable(self.defaults | ({"lr": 0.0} if lr is required else {}), 0)
        super().__init__(Stepper(kernel))
        self._order: list[int] | None = None  # of the gradients in an iterable
        self._all_reduce = checked_all_reduce(all_reduce)
        self._state = ParamState(layer_of)
        self._state.layers = names_of_layers(layers)
        self._add(params)

    def add_param_group(self, group: Mapping[str, Any]) -> None:
        """Add a group of parameters.

        Parameters
        ----------
        group : mapping
            "params", in any of the forms that `LARS` accepts except groups, and overrides.

        Raises
        ------
        ValueError, TypeError
            As for `LARS`; then nothing was added.
        """
        if not isinstance(group, Mapping):
            raise TypeError(f"group must be a mapping with the key 'params'; got {shown(group)}")
        self._add([group])

    def step(
        self,
        grads: Any = None,
        closure: Callable[[], tuple[Any, Any]] | None = None,
        *,
        found_inf: Any = None,
    ) -> Any:
        """Update the parameters in place. If the step is rejected, nothing has changed.

        Parameters
        ----------
        grads : mapping of name to array, or iterable of arrays
            One entry per parameter, with its shape and device; not modified. The gradient of a real parameter may have
            any real floating-point type, that of a complex parameter must have the parameter's type. An iterable is in
            the order of the parameters. A parameter whose entry is None does not take part and keeps its state.
        closure : callable, optional
            Returns (loss, grads); passed instead of `grads`.
        found_inf : number or array of shape (), optional
            The result of a loss scaler, on the device of the parameters. If it is not zero, the step is skipped
            regardless of `nonfinite`.

        Returns
        -------
        object
            The loss that `closure` returned, else None.

        Raises
        ------
        ValueError, TypeError
            If `grads` does not fit the parameters or shares memory with them, or a hyper-parameter is out of range.
        NonFiniteError
            See `nonfinite`.
        RefusedElsewhereError
            With `all_reduce`, if another process has refused the step.
        """
        shards = self._state.shards
        if not shards:
            self._poll_device()
            return self._step(grads, closure, found_inf)
        with self._polled(), refusals_are_told(shards):
            return self._step(grads, closure, found_inf)

    def _step(self, grads: Any, closure: Callable[[], tuple[Any, Any]] | None, found_inf: Any) -> Any:
        loss = None
        if closure is not None:
            if grads is not None:
                raise TypeError("step takes grads or a closure, not both")
            loss, grads = _loss_and_gradients(closure())
        elif grads is None or callable(grads):
            raise TypeError("step needs grads, or closure=... with a function that returns (loss, grads)")
        gradients = match_gradients(grads, self._state.names, self._order)
        if any(hasattr(kind, "requires_grad") for kind in set(map(type, gradients))):
            gradients = list(map(_detached, gradients))
        groups = self._read_groups()
        self._check_params()
        self._take_step(gradients, groups, found_inf)
        return loss

    def refresh_masters(self) -> None:
        """Make the master copies of half-precision parameters anew from the parameters, at their next steps.

        Call this after anything else has written to the parameters: a checkpoint of the best weights, a clamp, an
        average. Without it the next step overwrites that, see `master_weights`. Momentum buffers are kept.
        """
        self._state.masters = [None] * len(self._state.masters)

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the optimizer's state, without the parameters.

        Returns
        -------
        dict
            "steps" and "skipped_steps"; "param_groups", each with all hyper-parameters and the "names" of its
            parameters; "state", by name: "previous_lr" and, if they exist, "momentum_buffer" and "master".

        Raises
        ------
        NonFiniteError
            As `synchronize` does.
        """
        return self._saved(_copied)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a copy of the state that `state_dict` returned.

        Parameters
        ----------
        state_dict : mapping
            From an optimizer whose groups have parameters of the same names; not modified.

        Raises
        ------
        ValueError, TypeError
            If it does not fit these parameters; then nothing was changed.
        """
        with device_context(self._state.params[0]):
            self._load(state_dict)

    def state_views(self, *, wait: bool = True) -> dict[str, dict[str, Any]]:
        """Return the "state" of `state_dict` with the buffers and masters themselves instead of copies.

        Parameters
        ----------
        wait : bool
            False: do not wait for a device. Then "previous_lr" is missing, and a buffer may be unused.

        Returns
        -------
        dict
            By name of parameter; see `attach_state`.
        """
        return self._state.views(wait=wait)

    def attach_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Use the arrays that `state_views` returned without copying: later steps write into them.

        Parameters
        ----------
        state : mapping
            By name of parameter; parameters that are missing keep their state. The arrays must keep their memory, shape
            and dtype, which is not checked again.

        Raises
        ------
        ValueError, TypeError
            If a name is unknown, or an array does not fit its parameter; then nothing was changed.
        """
        self.synchronize()
        self._state.attach(state)

    def __repr__(self) -> str:
        return described("LARS", self.param_groups)

    def _add(self, params: Any) -> None:
        number = len(self.param_groups)
        layout = read_parameters(params, start=len(self._state.names))
        groups: list[dict[str, Any]] = []
        functions = [checked_all_reduce(group.overrides.pop("all_reduce", self._all_reduce)) for group in layout.groups]
        for group in layout.groups:
            place = f"parameter group {number + len(groups)}"
            with located(place if number or len(layout.groups) > 1 else ""):
                options = complete(self.defaults | group.overrides)
                if options["lr"] is not required:
                    readable(options, self.steps)
            if options["lr"] is required:
                raise ValueError(f"{place} didn't specify a value of required optimization parameter lr")
            groups.append({"params": group.arrays, "names": group.names, **options})
        axes = [group["layer_axes"] for group in groups]
        state = self._state.extended(layout.groups, axes, functions)
        self.synchronize()
        self._stepper.choose_kernel(state.params)
        self._state = state
        self.param_groups += groups
        self._layer_axes += axes
        self._order = gradient_order(state.names)

    def _check_params(self) -> None:
        """Raise if parameters were replaced in a group, which holds those that the optimizer was given."""
        state, lists = self._state, [group.get("params", ()) for group in self.param_groups]
        if sum(map(len, lists)) == len(state.params) and all(map(is_, chain.from_iterable(lists), state.params)):
            return
        given = [*chain.from_iterable(lists), *state.params]
        i = next((i for i, p in enumerate(state.params) if given[i] is not p), len(state.params) - 1)
        raise ValueError(
            f"the parameters of a group can't be replaced, and {shown(state.names[i])} in parameter group "
            f"{state.group_of[i]} was; write into its array, p[...] = new, or make another optimizer"
        )


def _copied(array: Any) -> Any:
    with device_context(array):
        return array_namespace(array).asarray(array, copy=True)


def _detached(g: Any) -> Any:
    """Return a gradient without torch's graph, which parameters and buffers must not become part of."""
    return g.detach() if getattr(g, "requires_grad", False) else g


def _loss_and_gradients(returned: Any) -> tuple[Any, Any]:
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise TypeError(f"closure must return the pair (loss, grads); got {shown(returned)}")
    return returned
