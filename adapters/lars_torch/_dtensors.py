"""DTensors, of which each process holds a piece, and the pieces.

Nothing of torch.distributed is imported: before somebody else has, there are no DTensors.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch

from lars_array._stepper import shown

__all__ = ["check_placements", "is_dtensor", "like", "local", "local_gradients", "locals_of", "spread_as"]


def is_dtensor(x: Any) -> bool:
    """Return whether a tensor is spread over a mesh of processes."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def local(x: Any) -> Any:
    """Return what this process holds of a tensor; the tensor itself where that is all."""
    if not is_dtensor(x):
        return x
    piece = x._local_tensor  # not to_local(), which makes a new parameter at each call
    return piece if type(piece) is torch.Tensor else _waited(piece)


def locals_of(tensors: Sequence[Any]) -> list[Any]:
    """Return `local` of many tensors or None, faster."""
    kind, plain = sys.modules["torch.distributed.tensor"].DTensor, torch.Tensor
    pieces = [x._local_tensor if type(x) is kind else x for x in tensors]
    return [x if type(x) is plain else _waited(local(x)) for x in pieces]


def _waited(piece: Any) -> Any:
    return piece.wait() if hasattr(piece, "wait") else piece  # of a collective that may still run


def like(piece: Any, p: Any) -> Any:
    """Return a tensor on the memory of a piece that is spread as a parameter is."""
    if not is_dtensor(p):
        return piece
    dtensor: Any = sys.modules["torch.distributed.tensor"].DTensor
    return dtensor.from_local(piece, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def spread_as(name: str, x: Any, p: Any) -> Any:
    """Return a tensor spread over processes as a parameter is: cut from a whole one that each process has.

    Raises
    ------
    ValueError
        If it is spread in another way.
    """
    if getattr(x, "shape", None) != p.shape:
        return x  # a message about it is for others
    if not is_dtensor(p):
        way_out = "load it by torch.distributed.checkpoint, or give its full_tensor()"
        raise ValueError(f"{name} in state_dict must be a plain tensor, as the parameter is; got a DTensor: {way_out}")
    if not is_dtensor(x):
        from torch.distributed.tensor import distribute_tensor

        # Without a message between processes, where torch can do without.
        alone = {"src_data_rank": None} if "src_data_rank" in signature(distribute_tensor).parameters else {}
        return distribute_tensor(x.to(p.device), p.device_mesh, p.placements, **alone)
    if x.device_mesh != p.device_mesh:
        meshes = f"{_ranks(p)}; got {_ranks(x)}"
        raise ValueError(f"{name} in state_dict must be on the parameter's mesh, of the ranks {meshes}")
    return x if x.placements == p.placements else x.redistribute(placements=p.placements)


def local_gradients(names: Sequence[str], grads: Sequence[Any], params: Sequence[Any]) -> list[Any]:
    """Return what this process needs of gradients: reduced, where it holds parts of sums, and cut as the parameters.

    Raises
    ------
    TypeError, ValueError
        If only one of a parameter and its gradient is spread over processes, or each over another mesh.
    """
    kind, found = sys.modules["torch.distributed.tensor"].DTensor, []
    for name, g, p in zip(names, grads, params, strict=True):
        if type(g) is kind and type(p) is kind:
            mine, its = p._spec, g._spec
            where, there = mine.placements, its.placements
            is_alike = its is mine or (its.mesh is mine.mesh and (there is where or there == where))
            found.append(g if is_alike else _cut_as(name, g, p))
        elif g is not None and is_dtensor(g) is not is_dtensor(p):
            what, other = ("a plain tensor", "a DTensor")[:: -1 if is_dtensor(p) else 1]
            raise TypeError(f"the gradient of {name!r} must be {what}, as the parameter is; got {other}")
        else:
            found.append(g)
    return locals_of(found)


def _ranks(x: Any) -> str:
    return shown(x.device_mesh.mesh.tolist())


def _cut_as(name: str, g: Any, p: Any) -> Any:
    if g.device_mesh != p.device_mesh:
        meshes = f"{_ranks(p)}; got {_ranks(g)}"
        raise ValueError(f"the gradient of {name!r} must be on the parameter's mesh, of the ranks {meshes}")
    return g if g.placements == p.placements else g.redistribute(placements=p.placements)


def check_placements(name: str, p: Any) -> None:
    """Raise TypeError for a parameter of which each process holds a part of a sum."""
    if any(placement.is_partial() for placement in p.placements):
        raise TypeError(f"{name} must not be a sum that is still to be made; got placements {p.placements}")
