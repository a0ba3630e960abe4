"""The optimizer for torch: groups, state, hooks and devices. No maths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from itertools import chain
from operator import is_
from threading import RLock
from typing import Any

import torch
from torch.optim import Optimizer

from lars_array._stepper import (
    SignalScope,
    check_kernel_name,
    refusals_are_told,
    shown,
    uninterrupted,
)
from lars_array.core import Rule
from lars_array.hyperparams import defaults_from, is_sgd, named_options, required, warn_of_sgd
from lars_array.layers import LayerOf, labels_of
from lars_torch import _checkpoint, _tracing
from lars_torch._arrays import resolved
from lars_torch._dtensors import is_dtensor
from lars_torch._hyperparams import check_group
from lars_torch._keys import NAMES, PROCESSES, check_keys, plain_group, resembles
from lars_torch._params import check_params, listed
from lars_torch._sharding import check_engines, process_group, spread_of
from lars_torch._state import NamedParam, OutdatedError, TensorState

__all__ = ["LARS"]


class LARS(Optimizer):
    """`lars_array.LARS` as a `torch.optim.Optimizer`.

    Arguments as for `lars_array.LARS`, except:

    Parameters
    ----------
    params : iterable of Tensor, of (str, Tensor), or of dict
        The parameters or parameter groups, as `torch.optim.SGD` takes them (names since torch 2.6): float64, float32,
        float16, bfloat16 or complex, on one device or several; DTensors on one device. Updated in place; gradients are
        not modified.
    lr : float or Tensor
        Learning rate. Any ``torch.optim.lr_scheduler`` may change it.
    max_grad_norm : float, optional
        As there; all parameters must lie on one device.
    nonfinite : {"propagate", "raise", "skip"}
        As there, but "propagate" by default, as in torch; any other needs all parameters on one device.
    master_weights : bool
        As there; the copies are "master" in the state.
    differentiable : bool
        Whether a step is recorded by autograd. Then steps run on torch's own functions.
    fused : bool, optional
        Whether a step takes the scale and `found_inf` from a ``GradScaler``, as with torch's own optimizers, instead of
        a pass of the scaler over all gradients.
    foreach, capturable : bool, optional
        Accepted and ignored: every step handles all tensors at once and each element once. Every step but the first can
        be captured in a CUDA graph; pass the learning rate as a tensor there.
    layer_of : mapping or callable, optional
        As there; a parameter without a name is named by its position, such as "0". The parts of a layer must lie on
        one device.
    shard_group : ProcessGroup or DeviceMesh, optional
        The processes that hold pieces of these parameters, in the place of `all_reduce`, where they are plain tensors:
        of FullyShardedDataParallel with ``use_orig_params=True``, or of an engine of your own. All processes give the
        same parameters in the same order, empty ones where they hold nothing. DTensors need no argument.
    norm_group : ProcessGroup or DeviceMesh, optional
        The processes that hold other parameters of the model, as with ZeroRedundancyOptimizer or in pipelines:
        `max_grad_norm` and `nonfinite` then hold for all of them.

    Attributes
    ----------
    param_groups : list of dict
        Hyper-parameters of each group, read at each step.
    state : dict
        By parameter ``{"momentum_buffer": Tensor}``, float32 for half precision; nothing before the first step or
        without momentum. With `master_weights` "master" as well, and "previous_lr" where the rule reads it.

    Raises
    ------
    ValueError
        For hyper-parameters out of range, unknown keys of groups, and parameters that are given twice; and as torch's
        optimizers do.
    TypeError
        For anything but dense tensors of a floating-point type, and for what other engines have marked as a piece of a
        parameter, without `shard_group`; and as torch's optimizers do.

    Notes
    -----
    Tensors on a CPU are stepped by `lars_array` as NumPy arrays on the same memory, those on a CUDA device as CuPy
    arrays; without CuPy, and on other devices, by the same equations in torch's own functions.

    References
    ----------
    You, Gitman, Ginsburg 2017, arXiv 1708.03888; lightning-flash 0.8.2, flash/core/optimizers/lars.py.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(10, 1)
    >>> optimizer = LARS(model.parameters(), lr=0.1, momentum=0.9)
    >>> optimizer.zero_grad()
    >>> model(torch.ones(4, 10)).square().mean().backward()
    >>> optimizer.step()
    """

    _has_warned = False  # of a step that is SGD's

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
        nonfinite: str = "propagate",
        layer_axes: int = 0,
        master_weights: bool = False,
        differentiable: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        layer_of: LayerOf = None,
        kernel: str | None = None,
        shard_group: Any = None,
        norm_group: Any = None,
    ) -> None:
        params = listed(params)
        defaults = plain_group(defaults_from(locals())) | {"differentiable": differentiable}
        check_group(defaults | ({"lr": 0.0} if lr is required else {}))
        if differentiable and master_weights:
            raise ValueError("differentiable and master_weights exclude each other; got True for both")
        if fused and (differentiable or foreach):
            raise RuntimeError(f"fused and {'differentiable' if differentiable else 'foreach'} exclude each other")
        if kernel is not None:
            check_kernel_name(kernel)
        self._kernel, self._layer_of, self._number = kernel, layer_of, _tracing.number(self)
        self._lock, self._steps = RLock(), 0
        self._processes = dict(zip(PROCESSES, (shard_group, norm_group), strict=True))
        self._params: list[torch.Tensor] = []
        self._reset()
        super().__init__(params, defaults)
        if fused:  # GradScaler then leaves the scale to the step, as with torch's own optimizers
            self._step_supports_amp_scaling = True
        self._labels()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in NAMES:
            place = f"optimizer.param_groups[0][{name!r}] = {shown(value)}"
            raise AttributeError(f"{name} belongs to the parameter groups: write {place}")
        super().__setattr__(name, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters.

        Parameters
        ----------
        param_group : dict
            "params", and overrides of any argument of `LARS` but `kernel`.

        Raises
        ------
        ValueError, TypeError
            As for `LARS`; then nothing was added.
        """
        number = len(self.param_groups)
        if isinstance(param_group, dict):
            param_group["params"] = listed(param_group["params"], group=number)
            param_group |= plain_group(param_group)
            group = self.defaults | param_group
            if group["lr"] is required:
                raise ValueError(
                    f"parameter group {number} didn't specify a value of required optimization parameter lr"
                )
            check_keys(group, number)
            try:
                check_group(group)
            except (TypeError, ValueError) as error:
                error.args = (f"{error} (parameter group {number})",)
                raise
            given = [group.get(name, self._processes[name]) for name in PROCESSES]
            for one in given:
                if one is not None:
                    process_group(one)
            check_params(group["params"], number, len(self._params), are_pieces=given[0] is not None)
            if self.defaults["differentiable"] and any(map(is_dtensor, group["params"])):
                raise ValueError(f"differentiable must be False for DTensors (parameter group {number})")
        super().add_param_group(param_group)
        try:
            self._named_params()
        except ValueError:
            self.param_groups.pop()
            raise
        self._params = [p for group in self.param_groups for p in group["params"]]

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a checkpoint: of this class, of another LARS or SGD of torch, or of `lars_array.LARS`.

        Parameters
        ----------
        state_dict : dict
            Not modified. Hyper-parameters that it lacks are those that this optimizer was made with. Momentum buffers
            become float32 for half precision, whatever they were, and keep their bits where they were float32.

        Raises
        ------
        ValueError, TypeError
            If it does not fit; then nothing was changed.
        """
        _checkpoint.load(self, super().load_state_dict, state_dict)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch's optimizers do.

        Returns
        -------
        dict
            "state", by number what `state` holds by parameter; "param_groups", each with all hyper-parameters, whose
            numbers are Python's.
        """
        state_dict = super().state_dict()
        groups = [{k: x for k, x in group.items() if k not in PROCESSES} for group in state_dict["param_groups"]]
        state_dict["param_groups"] = list(map(plain_group, groups))
        return state_dict

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient, in place.

        Parameters
        ----------
        closure : callable, optional
            Evaluates the model again, sets gradients, and returns the loss.

        Returns
        -------
        object
            What `closure` returned, else None.

        Raises
        ------
        ValueError, TypeError
            If a hyper-parameter is out of range, or a gradient is sparse or does not fit; then nothing was changed.
        NonFiniteError
            See `nonfinite`.
        RefusedElsewhereError
            If the parameters are spread over processes, and another one has refused the step.
        """
        loss = None
        if closure is not None:
            with refusals_are_told(self._shared), torch.enable_grad():
                self._find_shared()
                if not callable(closure):
                    raise TypeError(f"closure must be a function that returns the loss; got {shown(closure)}")
                loss = closure()
        try:
            self._take_step()
        except BaseException:
            # GradScaler takes these back only after a step that raises nothing, and would use them again.
            self.__dict__.pop("grad_scale", None)
            self.__dict__.pop("found_inf", None)
            raise
        return loss

    def _take_step(self) -> None:
        if self.defaults["differentiable"]:
            _tracing.recorded_step(self)
        elif torch.compiler.is_compiling():
            _tracing.compiled_step(self)
        else:
            with torch.no_grad():
                if _tracing.is_observed(self):
                    _tracing.plain_step(self)
                else:
                    self._step()

    def __repr__(self) -> str:
        found = [str(number) for number, group in enumerate(self.param_groups) if is_sgd(group)]
        note = f"\nSGD, not adapted: parameter group {', '.join(found)}" if found else ""
        return super().__repr__() + note

    @property
    def steps(self) -> int:
        """How many steps were taken since the optimizer was made or has loaded a checkpoint, which holds no count.

        A file that `lars_torch.load` has loaded holds one, and steps are counted on.

        On a GPU a step counts as taken until the device has reported otherwise.
        """
        return self._taken + sum(part.corrections for part in self._parts[:1])

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped because something was not finite."""
        return self._skipped + sum(part.skipped for part in self._parts)

    @property
    def last_lr(self) -> list[float]:
        """The learning rate of each group, which schedulers change; waits for a device where it is a tensor there."""
        return [float(group["lr"]) for group in self.param_groups]

    def norms(self) -> dict[str, Any]:
        """Return the norms that the last step was taken with, see `lars_array.LARS.norms`.

        Returns
        -------
        dict of str to Norms
            By name of parameter, or by its number where it has no name.
        """
        return {name: norms for result in self._results for name, norms in result.norms().items()}

    def trust_ratios(self) -> dict[str, float]:
        """Return the trust ratios that the last step was taken with, see `lars_array.LARS.trust_ratios`.

        Returns
        -------
        dict of str to float
            By name of parameter, or by its number where it has no name.
        """
        return {name: ratio for result in self._results for name, ratio in result.trust_ratios().items()}

    @property
    def _results(self) -> list[Any]:
        return [part.result for part in self._parts if part.result is not None]

    def _copying(self) -> AbstractContextManager[Any]:
        """Return a context in which copies of results are queued behind the steps of all devices."""
        stack = ExitStack()
        for part in self._parts:
            stack.enter_context(part.context())
        return stack

    def synchronize(self) -> None:
        """Wait for all devices, and raise if one has rejected a step, see `lars_array.LARS.synchronize`."""
        for part in self._parts:
            part.poll(wait=True)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return {**state, "_kernel": self._kernel, "_layer_of": self._layer_of, "_processes": self._processes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Called for copies and pickles, and by load_state_dict for what it has read.
        super().__setstate__(state)
        if "_number" not in self.__dict__:  # graphs go on referring to one that was loaded into
            blank: dict[str, Any] = {"_kernel": None, "_layer_of": None, "_lock": RLock(), "_steps": 0, "_parts": []}
            blank["_processes"] = dict.fromkeys(PROCESSES)
            self.__dict__ |= blank | self.__dict__ | {"_number": _tracing.number(self)}
        lists = [group["params"] for group in self.param_groups]
        self._params = [p for params in lists for p in params]
        for group in self.param_groups:
            group |= self.defaults | group
        axes = [group["layer_axes"] for group in self.param_groups]
        # What is known of parameters stays if only numbers and buffers are others.
        if self._parts and _are_same(lists, self._lists) and all(part.restart(axes) for part in self._parts):
            self._taken, self._skipped = 0, 0
        else:
            self._reset()

    # ------------------------------------------------------------------------------------------------- by device

    def _named_params(self) -> list[NamedParam]:
        """Return all parameters, in the order of the groups; a name that repeats gets the parameter's number."""
        found: list[NamedParam] = []
        for k, group in enumerate(self.param_groups):
            names = group.get("param_names") or [str(len(found) + i) for i in range(len(group["params"]))]
            found += [NamedParam(p, k, name) for p, name in zip(group["params"], names)]
        counts = Counter(member.name for member in found)
        repeated = [i for i, member in enumerate(found) if counts[member.name] > 1]
        if repeated and self._layer_of is not None:
            name = found[repeated[0]].name
            raise ValueError(f"layer_of needs different names; {name!r} is the name of {counts[name]} parameters")
        for i in repeated:
            found[i] = found[i]._replace(name=f"{found[i].name} ({i})")
        return found

    def _labels(self) -> dict[str, Hashable]:
        """Return the layer that each parameter is part of."""
        names = [member.name for member in self._named_params()]
        return dict(zip(names, labels_of(self._layer_of, names), strict=True))

    def _reset(self) -> None:
        """Forget all but `state` and `param_groups`."""
        self._parts: list[TensorState] = []  # one a device
        self._without: list[int] = []  # parameters that have not had a gradient yet
        self._lists: list[list[torch.Tensor]] = []  # of the groups when the parts were made
        self._known_keys: list[list[str]] = []
        self._taken, self._skipped = 0, 0
        self._has_shards = False  # known once there are parts
        self._shared: list[Any] = []  # the layers that other processes hold pieces of

    def _step(self, given: Mapping[torch.Tensor, tuple[torch.Tensor, torch.Tensor]] | None = None) -> None:
        """Take a step; where parameters are `given`, with the tensor in the place of each and its gradient."""
        with self._lock:  # steps of several threads would write their addresses into the same tables
            self._steps += 1
            try:
                with refusals_are_told(self._shared), SignalScope():
                    self._find_shared()
                    self._locked_step(given)
            except (TypeError, ValueError) as error:
                error.args = (self._placed(str(error)),)
                raise

    def _placed(self, message: str) -> str:
        """Return the message of a rejected step with its number, and the group of the parameter that is named."""
        group = next((member.group for member in self._named_params() if repr(member.name) in message), None)
        place = "" if group is None or f"group {group}" in message else f"parameter group {group}, "
        return f"{message:.460} ({place}step {self._steps})"

    def _check_keys(self) -> None:
        """Refuse keys that were put into a group since and look like hyper-parameters, such as those of other LARS."""
        keys = list(map(list, self.param_groups))
        if keys == self._known_keys:
            return
        for number, own in enumerate(keys):
            check_keys(filter(resembles, own), number)
        self._known_keys = keys

    def _locked_step(self, given: Mapping[torch.Tensor, tuple[torch.Tensor, torch.Tensor]] | None) -> None:
        self._check_keys()
        lists = [group["params"] for group in self.param_groups]
        params = memory = list(chain.from_iterable(lists))
        try:
            grads = [p.grad for p in params]
        except AttributeError:  # another object was put into a group
            for number, group in enumerate(self.param_groups):
                check_params(list(group["params"]), number, 0)
            raise
        if given is not None:
            memory, grads = ([given.get(p, (p, None))[k] for p in params] for k in (0, 1))
        if _are_same(lists, self._lists) and all(grads[i] is None for i in self._without):
            with suppress(OutdatedError):
                return self._step_parts(memory, grads, are_local=given is not None)
        self._make_parts(params, grads)
        self._step_parts(memory, resolved(grads), are_local=given is not None)

    def _step_parts(self, memory: list[torch.Tensor], grads: list[Any], *, are_local: bool) -> None:
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if len(self._parts) > 1:
            self._check_for_several()
        steps = []
        for part in self._parts:
            if not self._has_shards:
                part.poll()
            own = part.read(self.state, memory, grads, are_local=are_local)
            if own is not None:
                steps.append((part, own, part.groups(self.param_groups, grad_scale)))
        if len(steps) > 1:  # before the first device takes a step that the second would refuse
            for part, own, groups in steps:
                part.bind(own, groups)
            if found_inf is not None and bool(found_inf):  # once, and not by each device
                self._skipped += 1
                return
            found_inf = None
        if not steps:  # hyper-parameters are checked and found_inf counts all the same
            for part in self._parts:
                part.groups(self.param_groups, grad_scale)
            self._skipped += bool(self._parts and found_inf is not None and bool(found_inf))
        stepped = [part for part, *_ in steps]
        for part in self._parts if steps else ():
            if part not in stepped:
                part.result = None  # it is not of the last step
        was_taken = False
        for part, own, groups in steps:
            # Kernels go past autograd, which must not compute gradients from values that were overwritten.
            torch.autograd.graph.increment_version(written := part.step(own, groups, found_inf))
            was_taken = was_taken or bool(written)
            part.note_versions(own)
        self._taken += was_taken
        # What a device reports of an earlier step keeps no other process waiting for this one.
        for part in self._parts if self._has_shards else ():
            part.poll()

    def _make_parts(self, params: list[torch.Tensor], grads: list[Any]) -> None:
        """Assign the parameters that have a gradient, or had one in the memory they have now, to devices."""
        if not self._has_warned:
            self._has_warned = True
            warn_of_sgd(self.param_groups)
        self.synchronize()  # counts that are known on a device only would be lost
        known = {p for part in self._parts for p in part.unmoved()}
        members = self._named_params()
        of_groups = self._process_groups("shard_group")
        groups = [of_groups[member.group] for member in members]
        self._has_shards = is_spread = self._is_spread(params)
        check_engines(members, groups, self._params)
        on: dict[torch.device, dict[int, NamedParam]] = {}
        for i, (member, g) in enumerate(zip(members, grads, strict=True)):
            # All processes have to have the same layers, also where only one of them has a gradient.
            if g is not None or member.param in known or is_spread:
                on.setdefault(member.param.device, {})[i] = member
        labels = self._labels()
        _check_layers(labels, on)
        layer_of = None if self._layer_of is None else labels.get
        shared = self.param_groups, layer_of, self._kernel
        spread = None
        if is_spread:
            if len(on) > 1:
                raise ValueError(f"parameters that are spread over processes must lie on one device; got {list(on)}")
            norm_group = next((x for x in self._process_groups("norm_group") if x is not None), None)
            spread = spread_of(params, groups, norm_group)
        parts = [TensorState(device, own, *shared, spread) for device, own in on.items()]
        for part in parts:
            part.remember_agreements(self._parts)
        lists = [list(group["params"]) for group in self.param_groups]
        without = [i for i in range(len(params)) if not any(i in own for own in on.values())]
        found = [shards for part in parts for shards in part.shards]
        with uninterrupted():
            for shards in self._shared:
                shards.is_awaited = False
            # The same list, by which an error is told: other processes wait for what is in it now.
            self._shared[:] = found
            for shards in found:
                shards.is_awaited = True
            self._taken, self._skipped = self.steps, self.skipped_steps
            self._parts, self._params, self._without, self._lists = parts, params, without, lists

    def _process_groups(self, name: str) -> list[Any]:
        """Return the `shard_group` or the `norm_group` of each parameter group."""
        return [group.get(name, self._processes[name]) for group in self.param_groups]

    def _is_spread(self, params: Sequence[torch.Tensor]) -> bool:
        """Return whether sums have to be added over processes."""
        given = (group for name in PROCESSES for group in self._process_groups(name))
        return any(group is not None for group in given) or any(map(is_dtensor, params))

    def _find_shared(self) -> None:
        """Find the layers that other processes hold pieces of, before a step looks at anything else."""
        if self._lists and not self._has_shards:
            return
        params = [p for group in self.param_groups for p in group["params"]]
        if self._is_spread(params) and not _are_same([group["params"] for group in self.param_groups], self._lists):
            self._make_parts(params, [None] * len(params))

    def _check_for_several(self) -> None:
        """Refuse options that several devices would have to decide on together."""
        for group in self.param_groups:
            for name, alone in (("max_grad_norm", None), ("nonfinite", "propagate")):
                if group[name] != alone:
                    devices = ", ".join(str(part.owners[0].device) for part in self._parts)
                    raise ValueError(f"{name} needs all parameters on one device; got {group[name]!r} and {devices}")


def _are_same(groups: list[list[torch.Tensor]], others: list[list[torch.Tensor]]) -> bool:
    """Return whether groups hold the same objects in the same places: some libraries put others there."""
    pairs = zip(groups, others)
    return list(map(len, groups)) == list(map(len, others)) and all(all(map(is_, *pair)) for pair in pairs)


def _check_layers(labels: Mapping[str, Hashable], on: Mapping[torch.device, Mapping[int, NamedParam]]) -> None:
    """Refuse layers that have parts on several devices."""
    known: dict[Hashable, torch.device] = {}
    for device, members in on.items():
        for member in members.values():
            label = labels[member.name]
            if label is not None and known.setdefault(label, device) != device:
                devices = f"{known[label]} and {device}"
                raise ValueError(f"the parts of layer {label!r} must lie on one device; got {devices}")
