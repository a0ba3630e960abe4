"""The parameters that an optimizer is given: what is no parameter is named, before anything is kept of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from inspect import isgenerator
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor

from lars_array._arrays import COMPUTE, dtype_name
from lars_array._stepper import shown
from lars_torch._arrays import check_is_memory
from lars_torch._sharding import check_engine

__all__ = ["check_params", "listed"]


def listed(params: Any, group: int | None = None) -> Any:
    """Return parameters, or parameter groups, as a list where torch takes any iterable of them.

    Raises TypeError for what is no iterable of parameters, and ValueError for a generator that was used up before.
    """
    place = "params" if group is None else f"params of parameter group {group}"
    if isinstance(params, torch.nn.Module):
        kind = type(params).__name__
        raise TypeError(f"{place} must be parameters; got the module {kind}, give its parameters()")
    if isinstance(getattr(params, "param_groups", None), list):
        kind = type(params).__name__
        raise TypeError(f"{place} must be parameters; LARS is an optimizer itself and wraps none, got {kind}")
    if isinstance(params, Mapping):
        if group is not None:  # as lars_array.param_groups returns
            return list(params.items())
        raise TypeError(f"{place} must be an iterable of parameters; got a mapping, give its items()")
    if params is None or isinstance(params, torch.Tensor | set | str):
        return params  # torch takes the first in a group, and has a message for each
    if not hasattr(params, "__iter__"):
        kind = type(params).__name__
        raise TypeError(f"{place} must be an iterable of parameters, and lr a number; got {kind} {shown(params)} first")
    if isgenerator(params) and params.gi_frame is None:
        raise ValueError(f"optimizer got an empty parameter list: {place} is a generator that was used up before")
    return list(params) if isinstance(params, Iterator) or group is not None else params


def check_params(params: Any, number: int, first: int, *, are_pieces: bool = False) -> None:
    """Raise for a parameter of a group that can't be stepped, or is given twice; the first is that of this number.

    Raises
    ------
    TypeError
        For another type than dense tensors of floating-point numbers that hold a whole parameter.
    ValueError
        For a parameter that is given twice.
    """
    members: Sequence[Any] = params if isinstance(params, list) else [params]
    seen: dict[int, str] = {}
    for i, member in enumerate(members, first):
        name, p = member if isinstance(member, tuple) and len(member) == 2 else (str(i), member)
        label = f"parameter {name!r} of group {number}"
        if not isinstance(p, torch.Tensor):
            hint = "; arrays of NumPy are stepped by lars_array.LARS" if isinstance(p, np.ndarray) else ""
            hint = "; give its parameters()" if isinstance(p, torch.nn.Module) else hint
            raise TypeError(f"optimizer can only optimize Tensors, but {label} is {torch.typename(p)}{hint}")
        if dtype_name(p.dtype) not in COMPUTE:
            raise TypeError(f"{label} must be of one of the types {', '.join(COMPUTE)}; got {p.dtype}")
        if not isinstance(p, FakeTensor):  # which has no memory, and steps by torch's own functions
            check_is_memory(label, p)
            if not are_pieces:
                check_engine(label, p)
        if id(p) in seen:
            raise ValueError(f"parameters must be given once; {label} is given twice, before as {seen[id(p)]!r}")
        seen[id(p)] = name
