"""Comparisons that several test files share, and LARS as a plain loop to compare with. Each raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lars_array import LARS


def assert_same(ours: Any, theirs: Any) -> None:
    """Bit for bit, through nested mappings and sequences; -0.0 differs from 0.0."""
    assert fingerprint(ours) == fingerprint(theirs), f"{ours!r} is not {theirs!r}"


def assert_close(ours: Any, theirs: Any, tolerance: float = 1e-13) -> None:
    """Relative to the largest entry."""
    ours, theirs = to_numpy(ours), to_numpy(theirs)
    assert ours.shape == theirs.shape, f"shape {ours.shape}, not {theirs.shape}"
    scale = np.max(np.abs(theirs), initial=0.0)
    worst = np.max(np.abs(ours - theirs), initial=0.0)
    assert worst <= tolerance * scale, f"off by {worst} of {scale}"


def assert_refused(call: Callable[[], Any], kind: type[Exception], message: str, *watched: Any) -> None:
    """The call raises just this, and leaves what is watched, optimizers or arrays, as it was to the last bit."""
    before = fingerprint(watched)
    with pytest.raises(kind) as caught:
        call()
    assert caught.type is kind, f"{caught.type} is not {kind}"
    assert str(caught.value) == message, f"it says {caught.value}"
    assert fingerprint(watched) == before, "a refused call has changed something"


def fingerprint(x: Any) -> Any:
    """Return what can be compared with == and changes with any bit of `x`."""
    if isinstance(x, LARS):
        seen = {"state": x.state_dict(), "groups": x.param_groups, "norms": x.norms(), "ratios": x.trust_ratios()}
        return fingerprint(seen | {"repr": repr(x), "steps": x.steps, "skipped": x.skipped_steps})
    if isinstance(x, dict):
        return {key: fingerprint(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [type(x).__name__, *map(fingerprint, x)]
    if hasattr(x, "__array_namespace__") or hasattr(x, "__dlpack__"):
        x = to_numpy(x)
        return str(x.dtype), x.shape, x.tobytes()
    return type(x).__name__, repr(x)


def to_numpy(x: Any) -> Any:
    """Return `x` as a NumPy array."""
    if isinstance(x, np.ndarray) or not hasattr(x, "__dlpack__"):
        return np.asarray(x)
    try:
        return np.from_dlpack(x)
    except BufferError:  # from array_api_strict's second, pretended device
        return np.asarray(x.to_device(type(x.device)("CPU_DEVICE")))


def flash_step(
    p: Any,
    g: Any,
    v: Any = None,
    *,
    lr: float,
    momentum: float = 0,
    dampening: float = 0,
    weight_decay: float = 0,
    nesterov: bool = False,
    trust_coefficient: float = 0.001,
    eps: float = 1e-8,
) -> tuple[Any, Any]:
    """Return new p and v, as the code of lightning-flash 0.8.2 goes, line by line."""
    p_norm, g_norm, d = np.linalg.norm(p), np.linalg.norm(g), g
    if weight_decay != 0 and p_norm != 0 and g_norm != 0:
        d = (g + weight_decay * p) * (p_norm / (g_norm + p_norm * weight_decay + eps) * trust_coefficient)
    if momentum != 0:
        v = d.copy() if v is None else momentum * v + (1 - dampening) * d
        d = d + momentum * v if nesterov else v
    return p - lr * d, v


def flash_run(initial: Any, grads: list[Any], **hyper: Any) -> Any:
    """Return the parameters after steps with `grads`; a list under a name has a value for each step."""
    p, v = initial, None
    for t, g in enumerate(grads):
        p, v = flash_step(p, g, v, **{key: x[t] if isinstance(x, list) else x for key, x in hyper.items()})
    return p
