"""LARS (You et al. 2017, arXiv 1708.03888) for arrays of any Array API library."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lars_array._version import __version__
from lars_array.core import RULES, Hyper, Rule, apply, coefficients, register, sums
from lars_array.nonfinite import NonFiniteError
from lars_array.optimizer import LARS
from lars_array.param_groups import is_bias_or_norm, param_groups
from lars_array.rules import preset
from lars_array.schedules import linear_scaled_lr, warmup_cosine, warmup_polynomial
from lars_array.state.shards import RefusedElsewhereError
from lars_array.telemetry import Norms

if TYPE_CHECKING:
    from lars_array.files import Saved, load, save
    from lars_array.functional import State, init, lars_step, update
    from lars_array.recorder import Recorder

__all__ = [
    "LARS",
    "RULES",
    "Hyper",
    "NonFiniteError",
    "Norms",
    "Recorder",
    "RefusedElsewhereError",
    "Rule",
    "Saved",
    "State",
    "__version__",
    "apply",
    "coefficients",
    "init",
    "is_bias_or_norm",
    "lars_step",
    "linear_scaled_lr",
    "load",
    "param_groups",
    "preset",
    "register",
    "save",
    "sums",
    "update",
    "warmup_cosine",
    "warmup_polynomial",
]


_LATER = {
    "Recorder": "recorder",
    **dict.fromkeys(("Saved", "load", "save"), "files"),
    **dict.fromkeys(("State", "init", "lars_step", "update"), "functional"),
}


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    """Import what not every program uses when it is asked for: importing lars_array need not wait for it."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"lars_array.{_LATER[name]}"), name)
