"""The processes that hold pieces of layers: those of a DTensor's mesh, or of a group that the owner names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from math import prod
from typing import Any, NamedTuple

import torch

from lars_torch._arrays import tensor_of
from lars_torch._dtensors import is_dtensor

__all__ = ["GroupSum", "Spread", "check_engine", "check_engines", "process_group", "spread_of"]


# ---------------------------------------------------------------------------------------------------- process groups


class GroupSum:
    """Adds tables over the processes of a group, as `all_reduce` of `lars_array.LARS` does.

    Parameters
    ----------
    group : ProcessGroup
        The group.
    """

    def __init__(self, group: Any) -> None:
        self.group, self.size = group, torch.distributed.get_world_size(group)

    def __call__(self, table: Any) -> None:
        tensor = tensor_of(table)
        kinds = [device.type for device in self.group._device_types]
        if tensor.device.type in kinds:
            torch.distributed.all_reduce(tensor, group=self.group)
            return
        moved = tensor.to(kinds[0])  # of parameters that were moved to the CPU, where NCCL does not work
        torch.distributed.all_reduce(moved, group=self.group)
        tensor.copy_(moved)

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise TypeError("a process group can't be copied or pickled")


class Spread(NamedTuple):
    """How the parameters of an optimizer are spread over processes.

    Parameters
    ----------
    all_reduce : list of GroupSum or None
        What adds the sums of each, None for one that is whole here.
    counted : list of bool
        Whether it is this process that counts it, where several hold the same.
    copies : list of int
        How many processes hold the same piece.
    starts : list of tuple of int
        Where in the whole parameter the piece begins that is here.
    norm_reduce : GroupSum or None
        What adds the norms of gradients over processes that hold different layers.
    """

    all_reduce: list[Any]
    counted: list[bool]
    copies: list[int]
    starts: list[tuple[int, ...]]
    norm_reduce: Any


def spread_of(params: Sequence[Any], groups: Sequence[Any], norm_group: Any) -> Spread:
    """Return how parameters are spread.

    Parameters
    ----------
    params : sequence of Tensor
        The parameters.
    groups : sequence of ProcessGroup, DeviceMesh or None
        The `shard_group` of each.
    norm_group : ProcessGroup, DeviceMesh or None
        Over which norms are added.
    """
    sums: dict[Any, GroupSum] = {}

    def sum_over(group: Any) -> GroupSum:
        return sums.setdefault(group, GroupSum(group))

    norm_reduce = None if norm_group is None else GroupSum(process_group(norm_group))
    spread = Spread([None] * len(params), [True] * len(params), [1] * len(params), [()] * len(params), norm_reduce)
    by_root: dict[Any, list[int]] = {}
    for i, (p, group) in enumerate(zip(params, groups, strict=True)):
        if group is not None:
            spread.all_reduce[i] = sum_over(process_group(group))
        elif is_dtensor(p) and p.device_mesh.get_coordinate() is not None and _splits(p):
            by_root.setdefault(_root(p.device_mesh), []).append(i)
    for root, index in by_root.items():
        axes = {i: _axes(root, params[i].device_mesh) for i in index}
        used = set().union(*(axis for own in axes.values() for axis in own))
        group_sum, place = sum_over(_group_over(root, used)), root.get_coordinate()
        for i in index:
            split = set().union(*(axes[i][k] for k in _splits(params[i])))
            spread.all_reduce[i] = group_sum
            spread.counted[i] = all(place[axis] == 0 for axis in used - split)
            spread.copies[i] = prod(root.size(axis) for axis in used - split)
            spread.starts[i] = _start(params[i])
    return spread


def process_group(group: Any) -> Any:
    """Return the ProcessGroup that an argument means; raise TypeError if none."""
    if hasattr(group, "get_group") and hasattr(group, "mesh_dim_names"):
        return group.get_group()
    if isinstance(group, torch.distributed.ProcessGroup):
        return group
    raise TypeError(
        f"a group of processes must be a ProcessGroup or a DeviceMesh of one axis; got {type(group).__name__}"
    )


def _splits(p: Any) -> list[int]:
    """Return the axes of its mesh over which a DTensor is split."""
    return [k for k, placement in enumerate(p.placements) if not placement.is_replicate()]


def _start(p: Any) -> tuple[int, ...]:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return tuple(compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)[1])


def _root(mesh: Any) -> Any:
    """Return the mesh that a mesh was cut from."""
    if hasattr(mesh, "_get_root_mesh"):
        return mesh._get_root_mesh()
    return torch.distributed.device_mesh._mesh_resources.get_root_mesh(mesh)


def _axes(root: Any, mesh: Any) -> list[set[int]]:
    """Return for each axis of a mesh the axes of its root that it runs along: several where these were flattened."""
    found = []
    for k in range(mesh.ndim):
        ranks = torch.distributed.get_process_group_ranks(mesh.get_group(k))
        places = torch.stack([(root.mesh == rank).nonzero()[0] for rank in ranks])
        found.append({axis for axis in range(root.ndim) if len(set(places[:, axis].tolist())) > 1})
    return found


def _group_over(root: Any, axes: Iterable[int]) -> Any:
    """Return the group of this process and of all that differ from it in these axes of a mesh only."""
    axes, place = sorted(axes), root.get_coordinate()
    ranks = root.mesh[tuple(slice(None) if axis in axes else place[axis] for axis in range(root.ndim))].flatten()
    if len(axes) == 1:
        return root.get_group(axes[0])
    if len(ranks) == torch.distributed.get_world_size():
        return torch.distributed.group.WORLD
    return _new_group(tuple(sorted(ranks.tolist())), torch.distributed.group.WORLD)


@cache
def _new_group(ranks: tuple[int, ...], world: Any) -> Any:
    """Return a new group of ranks, one for each time that torch.distributed is initialised."""
    return torch.distributed.new_group(list(ranks), use_local_synchronization=True)


# -------------------------------------------------------------------------------------------- marks of other engines

_ENGINES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "a flat parameter of FullyShardedDataParallel": (
        lambda p: bool(getattr(p, "_is_flat_param", False)),
        "make it with use_orig_params=True and give shard_group, or use fully_shard",
    ),
    "a piece of FullyShardedDataParallel": (
        lambda p: bool(getattr(p, "_fsdp_flattened", False)),
        "give shard_group, its process group, or use fully_shard",
    ),
    "a piece of fairscale": (lambda p: bool(getattr(p, "_is_sharded", False)), "give shard_group, its process group"),
    "a parameter of DeepSpeed's ZeRO-3": (lambda p: hasattr(p, "ds_id"), "use fully_shard"),
    "a piece of Megatron": (
        lambda p: bool(getattr(p, "tensor_model_parallel", False)),
        "give shard_group, its tensor-parallel group",
    ),
}


def check_engine(name: str, p: Any) -> None:
    """Raise TypeError for a plain tensor that its owner has marked as a piece: LARS needs the norm of the whole."""
    for what, (is_marked, way_out) in _ENGINES.items():
        if is_marked(p):
            raise TypeError(f"{name} is {what}, and LARS needs the norm of the whole layer: {way_out}")


def check_engines(members: Sequence[Any], groups: Sequence[Any], before: Sequence[Any]) -> None:
    """Raise TypeError for pieces without a `shard_group`, also where an engine has put one flat piece for all.

    Parameters
    ----------
    members : sequence of NamedParam
        All parameters.
    groups : sequence of ProcessGroup, DeviceMesh or None
        The `shard_group` of each.
    before : sequence of Tensor
        The parameters that the groups had before.
    """
    known = set(before)
    for member, group in zip(members, groups, strict=True):
        if group is not None:
            continue
        check_engine(f"parameter {member.name!r}", member.param)
        if len(known) > 1 and member.param not in known and _is_flat(member, members, known):
            raise TypeError(
                f"parameter {member.name!r} is a flat tensor in the place of several parameters, such as DeepSpeed's "
                "ZeRO puts there, and LARS needs the norms of whole layers: use fully_shard"
            )


def _is_flat(member: Any, members: Sequence[Any], known: set[Any]) -> bool:
    """Return whether a tensor, alone in its group, may be a process's share of the parameters that were there."""
    alone = sum(other.group == member.group for other in members) == 1
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    processes = torch.distributed.get_world_size() if distributed else 1
    gone = known.difference(other.param for other in members)
    enough = member.param.numel() * processes >= sum(p.numel() for p in gone)
    return alone and member.param.ndim == 1 and len(gone) > 1 and enough
