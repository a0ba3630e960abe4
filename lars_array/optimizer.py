"""The optimizer for arrays that are updated in place: parameter groups, state and checks. No maths."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device

from lars_array import kernels
from lars_array.arrays import at_home, check_buffer, check_master, is_array, is_distant, listed
from lars_array.checkpoint import read_checkpoint
from lars_array.distant import DistantLayers, Whereabouts, refused
from lars_array.gradients import given_order, match_gradients
from lars_array.hyper import DEFAULTS, at_step, complete
from lars_array.layers import Layers, Taken
from lars_array.memory import Spans, check_writable
from lars_array.parameters import read_parameters
from lars_array.registry import Rule
from lars_array.rows import LayerOf, Stack, labels_of, row_labels, stack_of
from lars_array.stacks import sliced_gradients, whole
from lars_array.telemetry import Norms, trust_ratios

__all__ = ["LARS", "required"]


class _Required:
    """The default of an argument that has none, as in torch.optim of flash's days."""

    def __repr__(self) -> str:
        return "<required parameter>"

    def __reduce__(self) -> str:
        return "required"  # copies and pickles are the one there is


required = _Required()


class LARS:
    r"""Layer-wise adaptive rate scaling (You et al. 2017), with the arguments of ``flash.core.optimizers.LARS``.

    .. math::
        r = \eta \frac{\|p\|}{\|g\| + w\|p\| + \epsilon}, \qquad
        v \leftarrow \mu v + (1 - \tau)\,r\,(g + w p), \qquad p \leftarrow p - \text{lr}\,v

    for each parameter array p, a layer, with gradient g and momentum buffer v. As in torch's SGD the first step of a
    layer is not dampened. With the default weight decay 0 this is SGD: see `always_adapt`.

    Parameters
    ----------
    params : iterable of arrays, mapping of name to array, iterable of (name, array), or iterable of groups
        The parameters, updated in place: float64, float32, float16, bfloat16 or complex arrays of NumPy, or of any
        Array API library whose arrays can be written to. A group is a dict ``{"params": any of the former,
        **overrides}``; every argument below but `kernel` can be overridden. Parameters without a name are named by
        their position.
    lr : float or callable
        Learning rate; or a function of the step, counted from 0, such as those of `lars_array.schedules`.
    momentum : float
        :math:`\mu`, 0 by default.
    dampening : float
        :math:`\tau`, 0 by default.
    weight_decay : float
        w, the L2 penalty, 0 by default.
    nesterov : bool
        :math:`p \leftarrow p - \text{lr}\,(r\,(g + w p) + \mu v)` instead.
    trust_coefficient : float
        :math:`\eta`, 0.001 by default.
    eps : float
        :math:`\epsilon`, 1e-8 by default.
    rule : str, callable or Rule
        The variant of LARS: a name in `lars_array.RULES`, or a function of one's own, see `lars_array.Rule`.
    trust_clip : bool
        LARC: :math:`r \leftarrow \min(r / \text{lr}, 1)`.
    trust_bounds : pair of float, optional
        :math:`r \leftarrow \min(\max(r, \text{lowest}), \text{highest})`, before the clip.
    always_adapt : bool
        Whether layers with w = 0 are adapted too, by rules that leave them out.
    adapt : bool
        False: r = 1 for these layers, whose weight decay still applies. This is SGD.
    maximize : bool
        :math:`g \leftarrow -g`, before all else.
    rescale_grad : float
        :math:`g \leftarrow \text{rescale\_grad}\,g`, before all that follows.
    max_grad_norm : float, optional
        :math:`g \leftarrow g \min(1, \text{max\_grad\_norm} / \|g\|)`, the norm being that of all gradients together.
    nonfinite : {"raise", "skip", "propagate"}
        What is done about a layer whose parameters, gradient or coefficients are not finite: `NonFiniteError`, naming
        it, and nothing is changed; nothing is changed and `skipped_steps` counts it; or nothing at all. Momentum
        buffers are not looked at. Parameters on a device are waited for by nobody: there "raise" leaves out the step
        as "skip" does, and the error comes with the first later call that finds the news arrived, see `synchronize`.
    layer_axes : int
        How many leading axes of a parameter say which layer it is, 0 by default: with 1 each ``p[i]`` is a layer with
        norms of its own, as in the stacked parameters of scanned layers or of experts. Not to be changed later.
    layer_of : mapping or callable, optional
        Which layer a parameter is a part of, by name: those of one label, a string say, are one layer, of which norms
        are taken over all its parts. None: the parameter is a layer by itself. For all groups together.
    master_weights : bool
        Whether a parameter of half precision, float16 or bfloat16, has a float32 copy that is trained in its place: a
        step that is smaller than half precision can tell would be lost otherwise. Norms are the copy's, and the
        parameter is its rounding, written in the same pass. The copy is made by the first step from the parameter;
        what its owner writes to the parameter later is overwritten. It is forgotten by a step without this option.
        Of no consequence for other parameters.
    kernel : str, optional
        "compiled" (NumPy arrays, with numba), "blocked" (NumPy arrays), "cuda" (CuPy arrays) or "portable"; by default
        what the environment variable LARS_ARRAY_KERNEL says, else the first of them that takes the parameters.

    Attributes
    ----------
    param_groups : list of dict
        Hyper-parameters of each group, to be read and, between steps, changed; its "params" and "names" only read.
    steps, skipped_steps : int
        How many steps were taken, and skipped. Of parameters on a device, a step counts as taken until it is known
        that it was not.

    Raises
    ------
    ValueError
        For hyper-parameters out of range, unknown names of rules or options, names that are not unique, parameters
        that are read-only, overlap in memory or lie on several devices.
    TypeError
        For what is no array, or no floating-point one, and for values of the wrong kind.

    Notes
    -----
    Norms are accumulated in float64. Parameters of half precision are computed on in float32 and have a float32 buffer.

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
    ) -> None:
        self.defaults = {
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
            "adapt": adapt,
            "maximize": maximize,
            "rescale_grad": rescale_grad,
            "max_grad_norm": max_grad_norm,
            "nonfinite": nonfinite,
            "layer_axes": layer_axes,
            "master_weights": master_weights,
        }
        _at_step(self.defaults | ({"lr": 0.0} if lr is required else {}), 0)
        self.steps = 0
        self.skipped_steps = 0
        self.param_groups: list[dict[str, Any]] = []
        self._layer_of = layer_of
        self._stacks: list[Stack] = []
        self._given: list[str] = []  # the parameters' names
        self._axes: list[int] = []
        self._wholes: dict[int, Any] = {}
        self._whole_masters: dict[int, Any] = {}
        self._stacked = False  # whether rows are others than the parameters
        # Of each row, which is a parameter or a slice of one:
        self._names: list[str] = []
        self._params: list[Any] = []
        self._group_of: list[int] = []
        self._labels: list[Hashable] = []
        self._buffers: list[Any] = []
        self._masters: list[Any] = []
        self._previous_lr = np.zeros(0)
        self._all: Sequence[int] = range(0)
        self._order: list[int] | None = None
        self._last: Taken | None = None
        self._layers: Layers | None = None
        self._kernel_name = kernel
        self._kernel: Any = None
        self._spans: Spans | None = None
        self._whereabouts: Whereabouts | None = None
        self._add(params)

    def add_param_group(self, group: Mapping[str, Any]) -> None:
        """Add a group of parameters.

        Parameters
        ----------
        group : mapping
            "params", in any of the forms that `LARS` takes but groups, and overrides.

        Raises
        ------
        ValueError, TypeError
            As for `LARS`; then nothing was added.
        """
        if not isinstance(group, Mapping):
            raise TypeError(f"group must be a mapping with the key 'params'; got {group!r}")
        self._add([group])

    def step(
        self, grads: Any = None, closure: Callable[[], tuple[Any, Any]] | None = None, *, found_inf: Any = None
    ) -> Any:
        """Update the parameters in place. Either all of the step is done or, where it is refused, nothing.

        Parameters
        ----------
        grads : mapping of name to array, or iterable of arrays
            One entry a parameter, of its shape and device; not modified. That of a real parameter may be of any of
            the real types, that of a complex one is of the same. An iterable goes in the order in which the parameters
            were given. A parameter whose entry is None is skipped and keeps its state.
        closure : callable, optional
            Returns (loss, grads); given instead of `grads`.
        found_inf : number or array of shape (), optional
            Beside the parameters. Where it isn't zero the step is skipped, whatever `nonfinite` says: what a loss
            scaler has found.

        Returns
        -------
        object
            The loss that `closure` returned, else None.

        Raises
        ------
        ValueError, TypeError
            If `grads` does not fit the parameters, shares memory with what is written to, or a hyper-parameter is out
            of range.
        NonFiniteError
            See `nonfinite`.
        """
        self._hear()
        loss = None
        if closure is not None:
            if grads is not None:
                raise TypeError("step takes grads or a closure, not both")
            loss, grads = _loss_and_gradients(closure())
        elif grads is None or callable(grads):
            raise TypeError("step needs grads, or closure=... with a function that returns (loss, grads)")
        gradients = match_gradients(grads, self._given, self._order)
        if self._stacked:
            gradients = sliced_gradients(self._stacks, gradients)
        index = self._all
        if set(map(type, gradients)) != {np.ndarray}:
            found = [i for i, g in enumerate(gradients) if g is not None]
            gradients = [_detached(gradients[i]) for i in found]
            index = found if len(found) < len(index) else index
        groups = [_at_step(_options(group), self.steps) for group in self.param_groups]
        self._check_axes(groups)
        with at_home(self._params[0]):
            taken = self._advance(index, gradients, groups, found_inf)
        if taken:
            self.steps += 1
        else:
            self.skipped_steps += 1
        return loss

    def synchronize(self) -> None:
        """Wait for the device until all steps are done, and then know what became of them.

        Raises
        ------
        NonFiniteError
            If a step was refused since the last call that has said so. That step has changed nothing; those after it
            were taken.
        """
        self._hear(wait=True)

    def norms(self) -> dict[str, Norms]:
        """Return the norms that the last step was taken with; they cost nothing, but a device is waited for.

        On a device this is the last step, whether it was taken or not.

        Returns
        -------
        dict of str to Norms
            By name of parameter, of those that had a gradient; of a stacked one by slice, "w[0]"; of one that is part
            of a layer, the norms of the layer. Empty before the first step.
        """
        if self._last is None:
            return {}
        with at_home(self._params[0]):
            p_squares, g_squares = (listed(self._last.planned().S[:, i]) for i in (0, 1))
        norms = [Norms(p**0.5, g**0.5) for p, g in zip(p_squares, g_squares)]
        return dict(zip(self._last.names, norms))

    def trust_ratios(self) -> dict[str, float]:
        """Return the trust ratios that the last step was taken with; see `norms`.

        Returns
        -------
        dict of str to float
            By name of parameter, of those that had a gradient; 1.0 where a layer was not adapted. Empty before the
            first step.
        """
        if self._last is None:
            return {}
        with at_home(self._params[0]):
            return dict(zip(self._last.names, listed(trust_ratios(self._last))))

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of all that a step depends on beside the parameters.

        Returns
        -------
        dict
            "steps", "skipped_steps"; "param_groups", each with all hyper-parameters and the "names" of its parameters;
            "state", by name "previous_lr" and, where there is one, "momentum_buffer" and "master".

        Raises
        ------
        NonFiniteError
            As `synchronize` does: what is saved must be known.
        """
        self.synchronize()
        state = self.state_views()
        for own in state.values():
            for key in own.keys() & {"momentum_buffer", "master"}:
                with at_home(own[key]):
                    own[key] = array_namespace(own[key]).asarray(own[key], copy=True)
        groups = [copy.deepcopy(_options(group)) | {"names": list(group["names"])} for group in self.param_groups]
        return {"steps": self.steps, "skipped_steps": self.skipped_steps, "param_groups": groups, "state": state}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned, in an optimizer whose groups hold parameters of the same names.

        Parameters
        ----------
        state_dict : mapping
            Not modified, and not referred to afterwards.

        Raises
        ------
        ValueError, TypeError
            If it does not fit these parameters; then nothing was changed.
        """
        with at_home(self._params[0]):
            params = [stack.param for stack in self._stacks]
            read = read_checkpoint(state_dict, [group["names"] for group in self.param_groups], params)
        self.steps, self.skipped_steps = read.steps, read.skipped_steps
        for group, options in zip(self.param_groups, read.groups):
            group.update(options | {"layer_axes": group["layer_axes"]})
        self._buffers, self._previous_lr = self._of_rows(read.buffers), np.array(self._of_rows(read.previous_lr))
        self._masters = self._of_rows(read.masters)
        stacked = [i for i, stack in enumerate(self._stacks) if stack.lead]
        self._wholes = {i: read.buffers[i] for i in stacked if read.buffers[i] is not None}
        self._whole_masters = {i: read.masters[i] for i in stacked if read.masters[i] is not None}
        self._layers = self._spans = self._whereabouts = None

    def state_views(self, *, wait: bool = True) -> dict[str, dict[str, Any]]:
        """Return the "state" of `state_dict` with the buffers and masters themselves, not copies of them.

        Parameters
        ----------
        wait : bool
            False: a device is not waited for. Then "previous_lr" is left out, and a buffer may not be used yet.

        Returns
        -------
        dict
            By name of parameter; see `attach_state`.
        """
        buffers, previous_lrs = self._whereabouts_of_all() if wait else (self._buffers, [])
        state: dict[str, dict[str, Any]] = {}
        masters = self._of_params(self._masters, self._whole_masters)
        arrays = zip(self._given, self._stacks, self._of_params(buffers, self._wholes), masters, strict=True)
        for name, stack, v, master in arrays:
            state[name] = {"previous_lr": previous_lrs[stack.start]} if wait else {}
            state[name] |= {} if v is None else {"momentum_buffer": v}
            state[name] |= {} if master is None else {"master": master}
        return state

    def attach_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over what `state_views` returned, without copying: from then on steps write into these arrays.

        Parameters
        ----------
        state : mapping
            By name of parameter; those that are missing keep what they have.

        Raises
        ------
        ValueError, TypeError
            If a name is unknown, or an array does not fit its parameter; then nothing was changed.
        """
        self.synchronize()
        buffers, previous_lr = self._whereabouts_of_all()
        buffers, wholes = list(buffers), dict(self._wholes)
        masters, whole_masters = list(self._masters), dict(self._whole_masters)
        place = {name: i for i, name in enumerate(self._given)}
        for name, own in state.items():
            if name not in place:
                raise ValueError(f"state must be of parameters named {self._given!r}; got the name {name!r}")
            stack, v, master = self._stacks[place[name]], own.get("momentum_buffer"), own.get("master")
            if v is not None:
                check_buffer(name, v, stack.param)
                check_writable(f"momentum_buffer of {name}", v)
            if master is not None:
                check_master(name, master, stack.param)
                check_writable(f"master of {name}", master)
            rows = slice(stack.start, stack.start + stack.rows)
            buffers[rows], wholes[place[name]] = stack.slices(v), v
            masters[rows], whole_masters[place[name]] = stack.slices(master), master
            previous_lr[rows] = [float(own.get("previous_lr", 0.0))] * stack.rows
        Spans(self._names, self._params, buffers, masters)
        self._buffers, self._previous_lr, self._wholes = buffers, np.array(previous_lr), wholes
        self._masters, self._whole_masters = masters, whole_masters
        self._layers = self._spans = self._whereabouts = None

    def __repr__(self) -> str:
        lines = []
        for number, group in enumerate(self.param_groups):
            changed = {key: value for key, value in _options(group).items() if value != DEFAULTS.get(key, required)}
            options = ", ".join(f"{key}={value!r}" for key, value in changed.items())
            lines.append(f"  group {number}: {len(group['params'])} parameters, {options}")
        return "\n".join(["LARS(", *lines, ")"])

    def __getstate__(self) -> dict[str, Any]:
        self.synchronize()
        buffers, previous_lr = self._whereabouts_of_all()
        known: dict[str, Any] = {"_buffers": buffers, "_previous_lr": np.array(previous_lr)}
        known |= {"_wholes": {}, "_whole_masters": {}}
        if self._last is not None:
            known["_last"] = self._last._replace(plan=self._last.planned())
        # Layers and spans hold addresses, and a kernel is what is fastest here: none of them may travel.
        return self.__dict__ | known | {"_kernel": None, "_layers": None, "_spans": None, "_whereabouts": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._stacked:  # slices are no longer views of what they were cut from
            self._params = [part for stack in self._stacks for part in stack.slices(stack.param)]
            self._rehome()
        self._kernel = kernels.pick(self._params, self._kernel_name)

    def _add(self, params: Any) -> None:
        layout = read_parameters(params, start=len(self._stacks))
        groups, group_of, given, stacks = [], list(self._group_of), list(self._given), list(self._stacks)
        names, arrays = list(self._names), list(self._params)
        for number, group in enumerate(layout.groups, len(self.param_groups)):
            options = complete(self.defaults | group.overrides)
            if options["lr"] is required:
                raise ValueError(
                    f"parameter group {number} didn't specify a value of required optimization parameter lr"
                )
            _at_step(options, self.steps)
            groups.append({"params": group.arrays, "names": group.names, **options})
            given += group.names
            for name, p in zip(group.names, group.arrays):
                stacks.append(stack_of(name, p, options["layer_axes"], len(names)))
                names += stacks[-1].names()
                arrays += stacks[-1].slices(p)
                group_of += [number] * stacks[-1].rows
        repeated = set(self._given) & set(given[len(self._given) :])
        if repeated:
            raise ValueError(f"names of parameters must differ; got {min(repeated)!r} twice")
        for name, p in zip(names, arrays):
            check_writable(name, p)
            _check_same_place(p, arrays[0], name, names[0])
        labels = row_labels(labels_of(self._layer_of, given), stacks)
        Spans(names, arrays)
        self._kernel = kernels.pick(arrays, self._kernel_name)

        self.synchronize()
        self._settle()
        added = len(names) - len(self._names)
        self.param_groups += groups
        self._axes += [group["layer_axes"] for group in groups]
        self._names, self._params, self._group_of, self._labels = names, arrays, group_of, labels
        self._given, self._stacks, self._stacked = given, stacks, len(stacks) < len(names)
        self._buffers += [None] * added
        self._masters += [None] * added
        self._previous_lr = np.concatenate([self._previous_lr, np.zeros(added)])
        self._all = range(len(names))
        self._order = given_order(given)
        self._layers = self._spans = None

    def _check_axes(self, groups: Sequence[Mapping[str, Any]]) -> None:
        for number, (group, known) in enumerate(zip(groups, self._axes)):
            if group["layer_axes"] != known:
                rule = f"layer_axes of parameter group {number} must stay what it was, {known!r}"
                raise ValueError(f"{rule}; got {group['layer_axes']!r}")

    def _of_rows(self, values: Sequence[Any]) -> list[Any]:
        """Return what stands for each row from what stands for each parameter: slices of arrays, numbers repeated."""
        pairs = zip(self._stacks, values, strict=True)
        return [x for stack, y in pairs for x in ([y] * stack.rows if isinstance(y, float) else stack.slices(y))]

    def _of_params(self, values: Sequence[Any], wholes: Mapping[int, Any]) -> list[Any]:
        """Return the momentum buffers, or the masters, of parameters from those of rows."""
        if not self._stacked:
            return list(values)
        firsts = [values[stack.start] for stack in self._stacks]
        return [None if v is None else wholes.get(i, v) for i, v in enumerate(firsts)]

    def _rehome(self) -> None:
        """Put buffers and masters of slices that lie anywhere into one array for each parameter."""
        for arrays, wholes in ((self._buffers, self._wholes), (self._masters, self._whole_masters)):
            for i, stack in enumerate(self._stacks):
                rows = slice(stack.start, stack.start + stack.rows)
                if arrays[stack.start] is None:
                    wholes.pop(i, None)
                elif stack.lead and wholes.get(i) is None:
                    wholes[i] = whole(stack, arrays[rows])
                    arrays[rows] = stack.slices(wholes[i])
        self._layers = self._spans = None

    def _hear(self, *, wait: bool = False) -> None:
        """Count as what they were the steps of which the device has sent news, and raise if one was refused."""
        if self._whereabouts is None:
            return
        before, now = self._whereabouts.news(wait=wait)
        skipped, not_taken = now.skipped - before.skipped, now.refused - before.refused
        self.skipped_steps += skipped
        self.steps -= skipped + not_taken
        if wait:
            self.steps += self._whereabouts.replayed()
        if not_taken:
            raise refused(now, self._names)

    def _whereabouts_of_all(self) -> tuple[list[Any], list[float]]:
        """Return the momentum buffers that are used, and the last learning rates."""
        if self._whereabouts is None:
            return self._buffers, self._previous_lr.tolist()
        with at_home(self._params[0]):
            self._bring_together()
            unused, previous_lr = listed(self._whereabouts.first), listed(self._whereabouts.previous_lr)
        return [None if nothing else v for v, nothing in zip(self._buffers, unused)], previous_lr

    def _bring_together(self) -> None:
        """Put where the layers of the last step stand beside where the others do."""
        if isinstance(self._layers, DistantLayers) and self._whereabouts is not None:
            self._whereabouts.merge(self._layers.index, self._layers.first, self._layers.previous_lr)

    def _settle(self) -> None:
        """Bring home what only the device knows, and let the next step begin anew from there."""
        self._buffers, previous_lr = self._whereabouts_of_all()
        self._previous_lr = np.array(previous_lr)
        self._layers = self._spans = self._whereabouts = None

    def _advance(self, index: Sequence[int], grads: list[Any], groups: list[dict[str, Any]], found_inf: Any) -> bool:
        """Take the step with the parameters at `index`, and return True; or return False and change nothing."""
        if not index:
            return True
        if self._spans is None:
            self._spans = Spans(self._names, self._params, self._buffers, self._masters)
        if self._layers is None or self._layers.index != index:
            self._bring_together()
            lists: Any = (self._names, self._params, self._buffers, self._masters)
            lists += (self._group_of, self._previous_lr.tolist(), self._labels)
            if index != self._all:
                lists = ([x[i] for i in index] for x in lists)
            if is_distant(self._params[0]):
                if self._whereabouts is None:
                    self._whereabouts = Whereabouts(self._buffers, self._previous_lr, like=self._params[0])
                self._layers = DistantLayers(index, *lists, kernel=self._kernel, whereabouts=self._whereabouts)
            else:
                self._layers = Layers(index, *lists, kernel=self._kernel)
        layers = self._layers
        layers.check(grads, self._spans)
        step = layers.step(groups, grads, found_inf)
        if step is None:
            return False
        self._last = step
        if layers.has_new_state:
            for i, v, master in zip(index, layers.buffers, layers.masters):
                self._buffers[i], self._masters[i] = v, master
            self._spans = None
            if self._stacked:
                self._bring_together()
                self._rehome()
        if self._whereabouts is not None:
            return True
        self._previous_lr[layers.place] = np.array([group["lr"] for group in groups])[layers.group]
        return True


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "names")}


def _at_step(options: Mapping[str, Any], step: int) -> dict[str, Any]:
    """Return `hyper.at_step` with numbers for arrays of shape ()."""
    group = dict(options)
    if callable(group.get("lr")):
        group["lr"] = group["lr"](step)
    return at_step({key: x.item() if _can_be_read(x) else x for key, x in group.items()}, step)


def _can_be_read(x: Any) -> bool:
    return getattr(x, "shape", None) == () and not (is_array(x) and is_distant(x))


def _detached(g: Any) -> Any:
    """Return a gradient without torch's graph, which must not reach into parameters and buffers."""
    return g.detach() if getattr(g, "requires_grad", False) else g


def _loss_and_gradients(returned: Any) -> tuple[Any, Any]:
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise TypeError(f"closure must return the pair (loss, grads); got {returned!r}")
    return returned


def _check_same_place(p: Any, other: Any, name: str, other_name: str) -> None:
    if type(p) is not type(other) and array_namespace(p) is not array_namespace(other):
        kinds = f"{type(p).__name__} and {type(other).__name__}"
        raise TypeError(f"parameters must be arrays of one library; {name!r} and {other_name!r} are {kinds}")
    if device(p) != device(other):
        places = f"{device(p)!r} and {device(other)!r}"
        raise ValueError(f"parameters must lie on one device; {name!r} and {other_name!r} lie on {places}")
