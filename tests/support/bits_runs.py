"""Five steps of a scenario, and all that they leave; here of NumPy arrays."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from bits_arrays import arrays
from bits_cases import STEPS, Scenario

import lars_array

__all__ = ["InPlace", "Pure", "Subject", "canonical", "grouped", "lars_step", "taken"]


class Subject:
    """Something that takes steps.

    Attributes
    ----------
    optimizer : object
        What tells norms, trust ratios and numbers of steps; None where nothing does.
    """

    optimizer: Any = None

    def around(self) -> AbstractContextManager[Any]:
        """Return the context in which everything is to be done."""
        return nullcontext()

    def step(self, grads: Mapping[str, Any], found_inf: bool) -> None:
        """Take a step; a gradient is a NumPy array or None."""
        raise NotImplementedError

    def params(self) -> Mapping[str, Any]:
        """Return the parameters by name."""
        raise NotImplementedError

    def state(self) -> Mapping[str, Mapping[str, Any]]:
        """Return by name "momentum_buffer" and "master" and whatever else is an array."""
        raise NotImplementedError


def taken(make: Callable[[Scenario], Subject], scenario: Scenario) -> dict[str, Any]:
    """Take all steps of a scenario.

    Parameters
    ----------
    make : callable
        Returns the subject.
    scenario : Scenario
        What it is to do.

    Returns
    -------
    dict of str to ndarray
        "step 1" and so on, all parameters; "norms" and "ratios" of all steps; "counts", which were refused, and how
        many were taken and skipped; and by name what parameters, buffers and masters are in the end.
    """
    found: dict[str, Any] = {}
    subject = make(scenario)
    norms, ratios, refused = [], [], []
    with subject.around():
        for t in range(STEPS):
            grads: dict[str, Any] = arrays(scenario.model, scenario.g_dtype or scenario.dtype, scenario.g_layout, t + 1)
            if t in scenario.bad:
                grads[next(name for name, g in grads.items() if g.size > 1)].flat[1] = scenario.bad[t]
            grads |= dict.fromkeys(scenario.missing.get(t, ()))
            try:
                subject.step(grads, t in scenario.found_inf)
                if subject.optimizer is not None:
                    subject.optimizer.synchronize()  # a device tells later of what it has refused
            except lars_array.NonFiniteError:
                refused.append(t)
            found[f"step {t + 1}"] = _joined(subject.params())
            if subject.optimizer is not None:
                norms += [number for pair in subject.optimizer.norms().values() for number in pair]
                ratios += list(subject.optimizer.trust_ratios().values())
        counts = [getattr(subject.optimizer, name, -1) for name in ("steps", "skipped_steps")]
        found |= {"norms": np.array(norms), "ratios": np.array(ratios), "counts": np.array([*counts, *refused])}
        found |= {f"p {name}": np.array(x) for name, x in subject.params().items()}
        for name, own in sorted(subject.state().items()):
            found |= {f"{key} {name}": np.array(x) for key, x in sorted(own.items()) if x is not None}
    return found


def _joined(arrays: Mapping[str, Any]) -> Any:
    """Return the bytes of all arrays, in the order of their names."""
    return np.concatenate([np.frombuffer(canonical(arrays[name]).tobytes(), np.uint8) for name in sorted(arrays)])


def canonical(x: Any) -> Any:
    """Return a dense copy of an array in which nan is nan, whatever its sign and payload were."""
    x = np.array(x, order="C")
    parts = x.reshape(-1).view(x.real.dtype) if x.dtype.kind == "c" else x.reshape(-1)
    if x.dtype.kind not in "biu":
        parts[parts != parts] = np.nan
    return x


def grouped(scenario: Scenario, params: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the parameter groups of a scenario."""
    groups = scenario.groups or ((tuple(params), {}),)
    return [{"params": {name: params[name] for name in names}} | options for names, options in groups]


class InPlace(Subject):
    """`lars_array.LARS` over NumPy arrays.

    Parameters
    ----------
    scenario : Scenario
        What is to be done.
    kernel : str
        As for `lars_array.LARS`.
    threads : int
        How many a step may use.
    place : callable
        What a copy of each array is made into.
    """

    def __init__(
        self, scenario: Scenario, kernel: str, threads: int = 2, place: Callable[[Any], Any] = np.asarray
    ) -> None:
        os.environ["LARS_ARRAY_THREADS"] = str(threads)
        first = arrays(scenario.model, scenario.dtype, scenario.layout, 0)
        self._place, self._params = place, {name: place(x) for name, x in first.items()}
        groups = grouped(scenario, self._params)
        self.optimizer = lars_array.LARS(groups, **scenario.options, kernel=kernel)

    def step(self, grads: Mapping[str, Any], found_inf: bool) -> None:
        """Take a step."""
        placed = {name: None if g is None else self._place(g) for name, g in grads.items()}
        self.optimizer.step(placed, found_inf=float(found_inf) if found_inf else None)

    def params(self) -> Mapping[str, Any]:
        """Return the parameters."""
        return self._params

    def state(self) -> Mapping[str, Mapping[str, Any]]:
        """Return what a checkpoint holds."""
        state: dict[str, Any] = self.optimizer.state_dict()["state"]
        return state


class Pure(Subject):
    """`lars_array.init` and `update`."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._params = arrays(scenario.model, scenario.dtype, scenario.layout, 0)
        self._state = lars_array.init(grouped(scenario, self._params))

    def step(self, grads: Mapping[str, Any], found_inf: bool) -> None:
        """Take a step."""
        groups = grouped(self._scenario, self._params)
        new, self._state = lars_array.update(groups, grads, self._state, **self._scenario.options)
        self._params = {name: group["params"][name] for group in new for name in group["params"]}

    def params(self) -> Mapping[str, Any]:
        """Return the parameters."""
        return self._params

    def state(self) -> Mapping[str, Mapping[str, Any]]:
        """Return buffers, and all else in arrays of all layers."""
        buffers = {name: {"momentum_buffer": v} for name, v in self._state.momentum_buffers.items()}
        rest = {"step": self._state.step, "first": self._state.first, "previous_lr": self._state.previous_lr}
        return buffers | {"all": {key: np.asarray(x) for key, x in rest.items()}}


def lars_step(scenario: Scenario) -> Subject:
    """Return `lars_array.lars_step` of each layer by itself."""
    return _Alone(scenario)


class _Alone(Subject):
    def __init__(self, scenario: Scenario) -> None:
        self._options = scenario.options
        self._params = arrays(scenario.model, scenario.dtype, scenario.layout, 0)
        self._buffers: dict[str, Any] = dict.fromkeys(self._params)

    def step(self, grads: Mapping[str, Any], found_inf: bool) -> None:
        for name, p in self._params.items():
            new = lars_array.lars_step(p, grads[name], self._buffers[name], **self._options)
            self._params[name], self._buffers[name] = new

    def params(self) -> Mapping[str, Any]:
        return self._params

    def state(self) -> Mapping[str, Mapping[str, Any]]:
        return {name: {"momentum_buffer": v} for name, v in self._buffers.items()}
