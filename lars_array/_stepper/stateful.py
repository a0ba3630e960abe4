"""What optimizers with their own state share: counts, telemetry, and state dicts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from lars_array._interrupts import SignalScope, uninterrupted
from lars_array._stepper.stepper import Stepper
from lars_array.hyperparams import DEFAULTS, Hyperparams, check_layer_axes, options_of, scheduled, warn_of_sgd
from lars_array.nonfinite import NonFiniteError
from lars_array.state.checkpoint import read_checkpoint
from lars_array.state.store import KEPT, ParamState
from lars_array.telemetry import Norms, StepResult

__all__ = ["StatefulOptimizer"]


class StatefulOptimizer:
    """Step counts, telemetry and state dicts of an optimizer.

    Parameters
    ----------
    stepper : Stepper
        Takes its steps.
    """

    _state: ParamState

    def __init__(self, stepper: Stepper) -> None:
        self.steps = 0
        self.skipped_steps = 0
        self.param_groups: list[dict[str, Any]] = []
        self._layer_axes: list[int] = []  # of each group
        self._last: StepResult | None = None
        self._hyperparams = Hyperparams()
        self._stepper = stepper

    def synchronize(self) -> None:
        """Wait for the device, and update `steps` and `skipped_steps`.

        Raises
        ------
        NonFiniteError
            If the device has rejected a step since the last call that raised. The rejected step changed nothing; later
            steps were taken.
        RefusedElsewhereError
            If it has rejected the step because another process refused it, or did not take part alike.
        """
        self._poll_device(wait=True)

    def norms(self) -> dict[str, Norms]:
        """Return the norms of the last step, at no extra pass over memory; waits for the device.

        On a GPU this includes a last step that was skipped or rejected.

        Returns
        -------
        dict of str to Norms
            By name, for the parameters that had a gradient. Slices of a stacked parameter have names such as "w[0]";
            parameters joined into one layer have the norms of the layer. Empty before the first step.
        """
        return {} if self._last is None else self._last.norms()

    def trust_ratios(self) -> dict[str, float]:
        """Return the trust ratios of the last step; see `norms`.

        Returns
        -------
        dict of str to float
            By name, for the parameters that had a gradient; 1.0 for layers that were not adapted. Empty before the
            first step.
        """
        return {} if self._last is None else self._last.trust_ratios()

    @property
    def last_lr(self) -> list[float]:
        """The learning rates of the groups: of schedules the values at the last step, before the first those of step 0.

        Numbers are returned as they are now. Waits for a device if a learning rate is an array there.
        """
        step = max(self.steps - 1, 0)
        return [float(scheduled({"lr": group["lr"]}, step)["lr"]) for group in self.param_groups]

    @property
    def _results(self) -> list[StepResult]:
        """The result of the last step, in a list as that of `lars_torch.LARS`, which has one a device."""
        return [] if self._last is None else [self._last]

    def _copying(self) -> AbstractContextManager[Any]:
        """Return a context in which copies of results are queued behind the step."""
        return nullcontext()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in DEFAULTS or name == "lr":
            place = f"for group in optimizer.param_groups: group[{name!r}] = ..."
            raise AttributeError(f"hyper-parameters belong to the parameter groups; set {name} by `{place}`")
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        self.synchronize()
        return self.__dict__ | {"_last": None if self._last is None else self._last.settled()}

    def _poll_device(self, *, wait: bool = False) -> None:
        """Update the step counters from the device and raise if it rejected a step."""
        error = self._device_error(wait=wait)
        if error is not None:
            raise error

    def _device_error(self, *, wait: bool = False) -> Exception | None:
        """Update the step counters from the device, and return the error of a step that it rejected."""
        device = self._state.device
        if device is None or not (wait or device.has_news):
            return None
        with uninterrupted():  # a device reports each step once
            steps, skipped, error = self._state.poll_device(wait=wait)
            self.steps += steps
            self.skipped_steps += skipped
        return error

    @contextmanager
    def _polled(self) -> Iterator[None]:
        """Where processes share layers, raise only after this step for an earlier one that the device has rejected.

        Each process receives the report at a time of its own, and all have to take the same steps.
        """
        error = self._device_error()
        try:
            yield
        finally:
            if error is not None:
                raise error

    def _read_groups(self, options: Sequence[Mapping[str, Any]] | None = None) -> Sequence[Mapping[str, Any]]:
        """Return the groups at this step, complete and checked; `options` are theirs with schedules evaluated."""
        groups = self._hyperparams.read(self.param_groups, self.steps, options)
        check_layer_axes(groups, self._layer_axes)
        return groups

    def _take_step(self, gradients: Sequence[Any], groups: Sequence[Mapping[str, Any]], found_inf: Any) -> bool:
        """Take a step and count it; return whether it was taken."""
        if not self.steps + self.skipped_steps:
            warn_of_sgd(groups)
        with SignalScope():
            try:
                result = self._stepper.step(self._state, gradients, groups, found_inf)
            except NonFiniteError as error:
                raise NonFiniteError(f"{error} (step {self.steps})") from None
            if result is None:
                self.skipped_steps += 1
                return False
            self.steps += 1
            self._last = result if result.names else self._last
        return True

    def _saved(self, copied: Callable[[Any], Any]) -> dict[str, Any]:
        """Return a state dict with copies of arrays."""
        self.synchronize()
        state = {
            name: {key: copied(x) if key in KEPT else x for key, x in own.items()}
            for name, own in self._state.views().items()
        }
        groups = [copy.deepcopy(options_of(group)) | {"names": list(group["names"])} for group in self.param_groups]
        return {"steps": self.steps, "skipped_steps": self.skipped_steps, "param_groups": groups, "state": state}

    def _load(self, state_dict: Any, *, copied: bool = True) -> None:
        """Load a state dict whose groups have the names of these, or a copy of it."""
        read = read_checkpoint(state_dict, [group["names"] for group in self.param_groups], self._state.params)
        with uninterrupted():
            self._state.attach(read.state, copied=copied)
            self.steps, self.skipped_steps = read.steps, read.skipped_steps
            for group, options in zip(self.param_groups, read.groups):
                group.update(options | {"layer_axes": group["layer_axes"]})
