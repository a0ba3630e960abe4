"""The steps of `lars_jax` for the recorder of bits: the transformation under jit, and the eager optimizer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bits_arrays import arrays
from bits_cases import Scenario
from bits_runs import Subject

from lars_jax import LARS, lars

__all__ = ["Eager", "Jitted"]


class _OnJax(Subject):
    def __init__(self, scenario: Scenario) -> None:
        self._wide = any("64" in x or "128" in x for x in (scenario.dtype, scenario.g_dtype or ""))
        self._wide = self._wide and scenario.dtype != "complex64"

    def around(self) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = jax.enable_x64(self._wide)
        return context


class Jitted(_OnJax):
    """`lars_jax.lars` and the addition of its updates in one compiled function."""

    def __init__(self, scenario: Scenario) -> None:
        super().__init__(scenario)
        with self.around():
            first = arrays(scenario.model, scenario.dtype, scenario.layout, 0)
            self._params = {name: jnp.array(x) for name, x in first.items()}
            options = dict(scenario.options)
            self._solver = lars(options.pop("lr"), **options)
            self._state = self._solver.init(self._params)
        self._jitted = jax.jit(self._update)

    def _update(self, grads: Any, state: Any, params: Any) -> Any:
        updates, state = self._solver.update(grads, state, params)
        return {k: p if updates[k] is None else (p + updates[k]).astype(p.dtype) for k, p in params.items()}, state

    def step(self, grads: Mapping[str, Any], found_inf: bool) -> None:
        """Take a step."""
        there = {name: None if g is None else jnp.array(g) for name, g in grads.items()}
        self._params, self._state = self._jitted(there, self._state, self._params)

    def params(self) -> Mapping[str, Any]:
        """Return the parameters."""
        return {name: np.asarray(x) for name, x in self._params.items()}

    def state(self) -> Mapping[str, Mapping[str, Any]]:
        """Return the trace, and all else in arrays of all leaves."""
        trace = {name: {"momentum_buffer": np.asarray(v)} for name, v in (self._state.trace or {}).items()}
        rest = {key: np.asarray(getattr(self._state, key)) for key in ("count", "first", "previous_lr")}
        return trace | {"all": rest}


class Eager(_OnJax):
    """`lars_jax.LARS`.

    Parameters
    ----------
    scenario : Scenario
        What is to be done.
    donate : bool
        Whether its parameters are handed over.
    """

    def __init__(self, scenario: Scenario, donate: bool) -> None:
        super().__init__(scenario)
        os.environ["LARS_ARRAY_THREADS"] = "2"
        with self.around():
            first = arrays(scenario.model, scenario.dtype, scenario.layout, 0)
            there = {name: jnp.array(x) for name, x in first.items()}
            self.optimizer = LARS(there, **scenario.options, donate=donate)

    def step(self, grads: Mapping[str, Any], found_inf: bool) -> None:
        """Take a step."""
        there = {name: None if g is None else jnp.array(g) for name, g in grads.items()}
        self.optimizer.step(there, found_inf=float(found_inf) if found_inf else None)

    def params(self) -> Mapping[str, Any]:
        """Return the parameters."""
        return {name: np.asarray(x) for name, x in self.optimizer.params.items()}

    def state(self) -> Mapping[str, Mapping[str, Any]]:
        """Return what a checkpoint holds."""
        state: dict[str, Any] = self.optimizer.state_dict()["state"]
        return state
