"""The defaults of the originals, which a rule alone does not bring."""

from __future__ import annotations

from typing import Any

from lars_array.registry import RULES

__all__ = ["PRESETS", "preset"]

_FAIR = {"momentum": 0.9, "eps": 0.0}
_SIMCLR = {"momentum": 0.9, "eps": 0.0}
_TENSORFLOW = {"momentum": 0.9, "weight_decay": 1e-4, "eps": 0.0}

# By rule, where the original's defaults are not those of `LARS`.
PRESETS: dict[str, dict[str, Any]] = {
    "torch-optimizer": {"trust_coefficient": 0.01},
    "kozistr": {"momentum": 0.9, "eps": 0.0},
    "apex": {"trust_coefficient": 0.02, "trust_clip": True},
    "barlow": _FAIR,
    "vicreg": _FAIR,
    "moco-v3": _FAIR,
    "optax": {"momentum": 0.9, "eps": 0.0},
    "simclr": _SIMCLR,
    "simclr-popular": _SIMCLR,
    "tf-models": _SIMCLR,
    "tf-models-popular": _SIMCLR,
    # The reference's 0.0 is falsy and gives way to Keras's 1e-7.
    "mlperf": _TENSORFLOW | {"eps": 1e-7},
    "tf-tpu": _TENSORFLOW,
    "tf-contrib": _TENSORFLOW,
    "tinygrad": _TENSORFLOW,
    "tinygrad-popular": _TENSORFLOW,
    "nvidia": {"eps": 0.0},
    "mxnet": {"eps": 0.0},
    "nus": {"eps": 0.0},
    "colossalai": {"eps": 0.0},
    "open-lars": {"momentum": 0.9},
    "paddle": {"momentum": 0.9, "weight_decay": 5e-4, "eps": 0.0},
}


def preset(name: str) -> dict[str, Any]:
    """Return the arguments that make `LARS` the implementation `name` as its authors ship it.

    Parameters
    ----------
    name : str
        A name in `lars_array.RULES`.

    Returns
    -------
    dict
        The rule, and the original's defaults where they are not those of `LARS`. Exclusions by name or number of axes,
        which some originals have built in, are the business of `param_groups`.

    Raises
    ------
    ValueError
        For an unknown name.

    Examples
    --------
    >>> preset("apex")
    {'rule': 'apex', 'trust_coefficient': 0.02, 'trust_clip': True}
    """
    if name not in RULES:
        raise ValueError(f"name must be one of {', '.join(sorted(RULES))}; got {name!r}")
    return {"rule": name, **PRESETS.get(name, {})}
