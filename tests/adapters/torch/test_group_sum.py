"""Sums over a group of processes, where the table lies on another device than the group's collectives work on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lars_torch._sharding import GroupSum

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")


@pytest.mark.parametrize(("kinds", "seen"), [(["cpu", "cuda"], "cpu"), (["cpu"], "cpu"), (["meta"], "meta")])
def test_the_table_goes_to_a_device_that_the_group_can_add_on(
    kinds: list[str], seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with parameters that were moved to the CPU, and NCCL, which works on GPUs only; "meta" stands for one."""
    calls = []

    def all_reduce(tensor: Any, group: Any) -> None:
        calls.append((tensor.device.type, tensor.shape, group))

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(torch.Tensor, "copy_", lambda tensor, other: tensor)  # "meta" holds nothing to copy
    group = SimpleNamespace(_device_types=[torch.device(kind) for kind in kinds])
    add = GroupSum(group)
    add(np.ones((4, 3)))
    assert add.size == 2
    assert calls == [(seen, (4, 3), group)]
