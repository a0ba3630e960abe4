"""The optimizer as torch has it: groups, state, hooks and checks. No maths, and no visits to memory."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch.optim import Optimizer

from lars_array.optimizer import required
from lars_array.registry import Rule
from lars_array.rows import LayerOf, labels_of
from lars_torch import autograd, checkpoint, compiled
from lars_torch.engine import Engine, Member, check_tensor
from lars_torch.hyper import check_group

__all__ = ["LARS"]


class LARS(Optimizer):
    r"""Layer-wise adaptive rate scaling (You et al. 2017), as ``flash.core.optimizers.LARS`` has it.

    .. math::
        r = \eta \frac{\|p\|}{\|g\| + w\|p\| + \epsilon}, \qquad
        v \leftarrow \mu v + (1 - \tau)\,r\,(g + w p), \qquad p \leftarrow p - \text{lr}\,v

    for each parameter p, a layer, with gradient g and momentum buffer v. As in torch's SGD the first step of a layer is
    not dampened. With the default weight decay 0 this is SGD: see `always_adapt`.

    Parameters
    ----------
    params : iterable of Tensor, of (str, Tensor), or of dict
        The parameters or parameter groups, as ``torch.optim.SGD`` takes them: float64, float32, float16, bfloat16 or
        complex, on one device or several. Updated in place; gradients are not modified.
    lr : float or Tensor
        Learning rate. Any ``torch.optim.lr_scheduler`` may change it.
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
        The variant of LARS: a name in `lars_array.RULES`, "timm" or "apex" say, or a function of one's own.
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
        :math:`g \leftarrow g \min(1, \text{max\_grad\_norm} / \|g\|)`, the norm being that of all gradients together,
        which must lie on one device.
    nonfinite : {"propagate", "raise", "skip"}
        What is done about a layer whose parameters, gradient or coefficients are not finite: nothing, as in torch;
        `lars_array.NonFiniteError`, and nothing is changed; or nothing is changed and `skipped_steps` counts it. On a
        device that is not waited for: see `lars_array.LARS`.
    layer_axes : int
        How many leading axes of a parameter say which layer it is, as in `lars_array.LARS`; not to be changed later.
    master_weights : bool
        Whether float16 and bfloat16 parameters are rounded copies of float32 ones, which are stepped: "master" in the
        state. What else is written into such a parameter between steps is lost.
    differentiable : bool
        Whether a step is recorded by autograd. Then steps run on torch's own functions.
    foreach, fused, capturable : bool, optional
        Taken, and without effect: every step handles all tensors at once and each element once, and one on a CUDA
        device that is not the first can be captured in a graph; give the learning rate as a tensor there.
    layer_of : mapping or callable, optional
        Which layer a parameter is a part of, by its name or, without one, its position, "0" say; as in
        `lars_array.LARS`. The parts of a layer must lie on one device.
    kernel : str, optional
        As for `lars_array.LARS`, "compiled" or "portable" say.

    Attributes
    ----------
    param_groups : list of dict
        Hyper-parameters of each group, read at each step.
    state : dict
        By parameter ``{"momentum_buffer": Tensor}``, float32 for half precision; nothing before the first step or
        without momentum. With `master_weights` "master" as well.

    Raises
    ------
    ValueError
        For hyper-parameters out of range; and as torch's optimizers do.
    TypeError
        For what is no dense tensor of a floating-point type, such as a DTensor; and as torch's optimizers do.

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

    # GradScaler then leaves the scale to the step, which has no pass of its own for it.
    _step_supports_amp_scaling = True

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
    ) -> None:
        defaults = {
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
            "differentiable": differentiable,
        }
        check_group(defaults | ({"lr": 0.0} if lr is required else {}))
        if differentiable and master_weights:
            raise ValueError("differentiable and master_weights exclude each other; got True for both")
        self._kernel, self._layer_of, self._number = kernel, layer_of, compiled.number(self)
        self._forget()
        super().__init__(params, defaults)
        self._labels()

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
        if isinstance(param_group, dict):
            group = self.defaults | {key: value for key, value in param_group.items() if key != "params"}
            if group["lr"] is required:
                number = len(self.param_groups)
                raise ValueError(
                    f"parameter group {number} didn't specify a value of required optimization parameter lr"
                )
            check_group(group)
        super().add_param_group(param_group)
        self._settle()
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
        checkpoint.load(self, super().load_state_dict, state_dict)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch's optimizers do.

        Returns
        -------
        dict
            "state", by number ``{"momentum_buffer": Tensor}``; "param_groups", each with all hyper-parameters, and
            "previous_lr" of its parameters if its rule needs that.
        """
        state_dict = super().state_dict()
        state_dict["param_groups"] = checkpoint.with_previous_lr(self, state_dict["param_groups"])
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
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.defaults["differentiable"]:
            autograd.step(self)
        elif torch.compiler.is_compiling():
            compiled.step(self)
        else:
            with torch.no_grad():
                self._step()
        return loss

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped because something was not finite."""
        return self._skipped + sum(engine.inner.skipped_steps for engine in self._engines)

    def norms(self) -> dict[str, Any]:
        """Return the norms that the last step was taken with, see `lars_array.LARS.norms`.

        Returns
        -------
        dict of str to Norms
            By name of parameter, or by its number where it has no name.
        """
        return {name: norms for engine in self._engines for name, norms in engine.inner.norms().items()}

    def trust_ratios(self) -> dict[str, float]:
        """Return the trust ratios that the last step was taken with, see `lars_array.LARS.trust_ratios`.

        Returns
        -------
        dict of str to float
            By name of parameter, or by its number where it has no name.
        """
        return {name: r for engine in self._engines for name, r in engine.inner.trust_ratios().items()}

    def synchronize(self) -> None:
        """Wait for all devices, and raise if one has refused a step, see `lars_array.LARS.synchronize`."""
        for engine in self._engines:
            engine.inner.synchronize()

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        groups = checkpoint.with_previous_lr(self, state["param_groups"])
        return {**state, "param_groups": groups, "_kernel": self._kernel, "_layer_of": self._layer_of}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Called for copies and pickles, and by load_state_dict for what it has read.
        super().__setstate__(state)
        self.__dict__.setdefault("_kernel", None)
        self.__dict__.setdefault("_layer_of", None)
        if "_number" not in self.__dict__:  # graphs go on referring to one that was loaded into
            self._number = compiled.number(self)
        self._params = [p for group in self.param_groups for p in group["params"]]
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        self._forget()
        for group in self.param_groups:
            self._previous_lr |= dict(zip(group["params"], group.pop("previous_lr", [])))

    # ------------------------------------------------------------------------------------------------------ engines

    def _members(self) -> list[Member]:
        """Return all parameters, in the order of the groups."""
        found: list[Member] = []
        for k, group in enumerate(self.param_groups):
            names = group.get("param_names") or [str(len(found) + i) for i in range(len(group["params"]))]
            found += [Member(p, k, name) for p, name in zip(group["params"], names)]
        return found

    def _labels(self) -> dict[str, Hashable]:
        """Return which layer each parameter is a part of."""
        names = [member.name for member in self._members()]
        return dict(zip(names, labels_of(self._layer_of, names), strict=True))

    def _previous_lrs(self) -> dict[torch.Tensor, float]:
        """Return the learning rate of the last step of each parameter that has taken one."""
        known = dict(self._previous_lr)
        for engine in self._engines:
            known |= engine.previous_lr()
        return known

    def _note_lr(self, p: torch.Tensor, lr: Any) -> None:
        """Say with which learning rate a parameter has taken its last step."""
        self._previous_lr[p] = float(lr.detach() if isinstance(lr, torch.Tensor) else lr)

    def _forget(self) -> None:
        self._engines: list[Engine] = []
        self._without: list[torch.Tensor] = []  # parameters that have not had a gradient yet
        self._lists: list[list[torch.Tensor]] = []  # of the groups when engines were made
        self._skipped = 0
        self._previous_lr: dict[torch.Tensor, float] = {}

    def _settle(self) -> None:
        """Learn what engines alone know, and have them made anew at the next step."""
        self._previous_lr, self._skipped = self._previous_lrs(), self.skipped_steps
        self._engines, self._lists = [], []

    def _step(self, given: Mapping[torch.Tensor, tuple[torch.Tensor, torch.Tensor]] | None = None) -> None:
        """Take a step; of the parameters that are given, with what stands in their place and their gradient."""
        engines = self._current_engines(given)
        if len(engines) > 1:
            self._check_for_several(engines)
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for engine in engines:
            grads = [p.grad if given is None else given.get(p, (p, None))[1] for p in engine.params]
            written = engine.step(self.param_groups, grads, grad_scale, found_inf)
            # DLPack goes past autograd, which must not compute gradients from what is no longer there.
            torch.autograd.graph.increment_version(written)

    def _current_engines(self, given: Any) -> list[Engine]:
        if not (
            _are_same([group["params"] for group in self.param_groups], self._lists)
            and all(p.grad is None if given is None else p not in given for p in self._without)
            and all(engine.is_current(self.state, _memory(engine.params, given)) for engine in self._engines)
        ):
            self._make_engines(given)
        return self._engines

    def _make_engines(self, given: Any) -> None:
        had_one = {p for engine in self._engines for p in engine.unmoved()} | set(given or ())
        members = self._members()
        on: dict[torch.device, list[Member]] = {}
        for member in members:
            if member.param in had_one or (given is None and member.param.grad is not None):
                check_tensor(member.name, member.param)
                on.setdefault(member.param.device, []).append(member)
        labels = self._labels()
        _check_layers(labels, on)
        self._settle()
        self._previous_lr = {m.param: self._previous_lr[m.param] for m in members if m.param in self._previous_lr}
        for device, own in on.items():
            tensors = _memory([member.param for member in own], given)
            known = self.param_groups, self.state, self._previous_lr, self._kernel
            self._engines.append(Engine(device, own, tensors, *known, layer_of=labels.get))
        self._without = [m.param for m in members if not any(m.param in engine.known for engine in self._engines)]
        self._params = [member.param for member in members]
        self._lists = [list(group["params"]) for group in self.param_groups]

    def _check_for_several(self, engines: list[Engine]) -> None:
        """Refuse before the first device steps what the second would, and what they would have to decide together."""
        for group in self.param_groups:
            check_group(group)
            for name, alone in (("max_grad_norm", None), ("nonfinite", "propagate")):
                if group[name] != alone:
                    places = ", ".join(str(engine.device) for engine in engines)
                    raise ValueError(f"{name} needs all parameters on one device; got {group[name]!r} and {places}")


def _are_same(groups: list[list[torch.Tensor]], others: list[list[torch.Tensor]]) -> bool:
    """Return whether groups hold the same objects in the same places: some libraries put others there."""
    pairs = zip(groups, others)
    return list(map(len, groups)) == list(map(len, others)) and all(all(map(is_, *pair)) for pair in pairs)


def _memory(params: Sequence[torch.Tensor], given: Any) -> Sequence[torch.Tensor]:
    return params if given is None else [given[p][0] if p in given else p for p in params]


def _check_layers(labels: Mapping[str, Hashable], on: Mapping[torch.device, Sequence[Member]]) -> None:
    """Refuse layers that have parts on several devices."""
    known: dict[Hashable, torch.device] = {}
    for device, members in on.items():
        for member in members:
            label = labels[member.name]
            if label is not None and known.setdefault(label, device) != device:
                places = f"{known[label]} and {device}"
                raise ValueError(f"the parts of layer {label!r} must lie on one device; got {places}")
