"""The steps of `lars_torch.LARS` for the recorder of bits, eager and in a compiled graph."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import torch
from bits_arrays import arrays
from bits_cases import Scenario
from bits_runs import Subject

from lars_torch import LARS

__all__ = ["Torch"]


class Torch(Subject):
    """`lars_torch.LARS`.

    Parameters
    ----------
    scenario : Scenario
        What is to be done.
    compiled : bool
        Whether its step goes through torch.compile.
    """

    def __init__(self, scenario: Scenario, compiled: bool = False) -> None:
        os.environ["LARS_ARRAY_THREADS"] = "2"
        torch.compiler.reset()
        first = arrays(scenario.model, scenario.dtype, scenario.layout, 0)
        self._params = {name: torch.nn.Parameter(_tensor(x)) for name, x in first.items()}
        groups: Any = [
            {"params": [(name, self._params[name]) for name in names]} | options
            for names, options in scenario.groups or ((tuple(first), {}),)
        ]
        self.optimizer = LARS(groups, **scenario.options)
        self._step = torch.compile(self.optimizer.step) if compiled else self.optimizer.step

    def step(self, grads: Mapping[str, Any], found_inf: bool) -> None:
        """Take a step; what a loss scaler has found is where torch's own GradScaler puts it."""
        for name, p in self._params.items():
            p.grad = None
            if grads[name] is not None:
                g = _tensor(grads[name])
                if g.dtype != p.dtype:
                    p.grad_dtype = g.dtype
                p.grad = g
        self.optimizer.found_inf = torch.tensor(float(found_inf)) if found_inf else None
        self._step()

    def params(self) -> Mapping[str, Any]:
        """Return the parameters."""
        return {name: _array(p) for name, p in self._params.items()}

    def state(self) -> Mapping[str, Mapping[str, Any]]:
        """Return buffers and masters."""
        return {
            name: {key: _array(x) for key, x in self.optimizer.state.get(p, {}).items() if key != "previous_lr"}
            for name, p in self._params.items()
        }


def _tensor(x: Any) -> torch.Tensor:
    if x.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def _array(x: torch.Tensor) -> Any:
    x = x.detach()
    return x.view(torch.uint16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()
