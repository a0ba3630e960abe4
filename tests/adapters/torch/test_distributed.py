"""What torch builds around optimizers for several processes, in one: LARS without adaptation beside SGD."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lars_array import NonFiniteError
from lars_torch import LARS

distributed = pytest.importorskip("torch.distributed")
if not distributed.is_available() or not distributed.is_gloo_available():
    pytest.skip("torch was built without gloo", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch's own, which differ from release to release
OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    yield
    distributed.destroy_process_group()


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2)).double()


def train(model: nn.Module, optimizer: Any) -> None:
    x = torch.linspace(-1, 1, 32, dtype=torch.float64).reshape(8, 4)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def replicated(model: nn.Module, kind: Any, **options: Any) -> None:
    """Train on gradients that are views into one bucket."""
    parallel = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    train(parallel, kind(parallel.parameters(), **options))


def sharded_state(model: nn.Module, kind: Any, **options: Any) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), optimizer_class=kind, parameters_as_bucket_view=True, **options
    )
    train(model, optimizer)
    optimizer.consolidate_state_dict()
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer)


def in_backward(model: nn.Module, kind: Any, **options: Any) -> None:
    from torch.distributed.optim import _apply_optimizer_in_backward

    _apply_optimizer_in_backward(kind, model.parameters(), options)
    for _ in range(3):
        model(torch.ones(8, 4, dtype=torch.float64).cumsum(0)).square().sum().backward()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("way", [replicated, sharded_state, in_backward])
def test_it_steps_as_sgd_does(way: Callable[..., None]) -> None:
    ours, theirs = network(), network()
    way(ours, LARS, **OPTIONS, adapt=False)
    way(theirs, torch.optim.SGD, **OPTIONS)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", ["flash", "nvidia"])
@pytest.mark.parametrize("flat", [False, True])
def test_a_distributed_checkpoint_changes_no_bit(flat: bool, rule: str, tmp_path: Path) -> None:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    shape = StateDictOptions(flatten_optimizer_state_dict=flat)

    def optimizer_of(model: nn.Module, **options: Any) -> LARS:
        groups = [{"params": model[0].parameters()}, {"params": model[3].parameters(), "lr": 0.05}]
        return LARS(groups, **OPTIONS | options, rule=rule)

    model, resumed = network(), network(1)
    optimizer, other = optimizer_of(model), optimizer_of(resumed, momentum=0.5)
    train(model, optimizer)
    saved = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=shape)))
    checkpoint.save(saved, checkpoint_id=tmp_path)
    read = dict(zip(("model", "optimizer"), get_state_dict(resumed, other, options=shape)))
    checkpoint.load(read, checkpoint_id=tmp_path)
    states = {"model_state_dict": read["model"], "optim_state_dict": read["optimizer"]}
    set_state_dict(resumed, other, **states, options=shape)
    assert other.param_groups[1]["lr"] == 0.05 and other.param_groups[0]["momentum"] == 0.9
    for each in (optimizer, other):
        each.param_groups[0]["lr"] = 0.025  # which momentum is corrected for
    train(model, optimizer)
    train(resumed, other)
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


def test_sharded_states_keep_the_last_learning_rates() -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    def trained(kind: Any, *, resumed: bool) -> nn.Module:
        model = network()
        options = OPTIONS | {"rule": "nvidia"}
        optimizer = (
            ZeroRedundancyOptimizer(model.parameters(), LARS, **options)
            if kind
            else LARS(model.parameters(), **options)
        )
        train(model, optimizer)
        if resumed:
            optimizer.consolidate_state_dict()
            saved = optimizer.state_dict()
            optimizer = ZeroRedundancyOptimizer(model.parameters(), LARS, **options)
            optimizer.load_state_dict(saved)
        optimizer.param_groups[0]["lr"] = 0.025
        train(model, optimizer)
        return model

    models = [trained(False, resumed=False), trained(True, resumed=False), trained(True, resumed=True)]
    for other in models[1:]:
        assert all(map(torch.equal, models[0].parameters(), other.parameters()))


def test_a_late_report_of_a_device_is_raised_after_taking_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processes would else wait for this one, or refuse a step that nothing is wrong with."""
    p = nn.Parameter(torch.ones(3))
    optimizer = LARS([p], **OPTIONS, shard_group=distributed.group.WORLD)
    p.grad = torch.ones(3)
    optimizer.step()
    before, (part,) = p.detach().clone(), optimizer._parts

    def report(**_: Any) -> None:
        raise NonFiniteError("an earlier step")

    monkeypatch.setattr(part, "poll", report)
    with pytest.raises(NonFiniteError, match="an earlier step"):
        optimizer.step()
    assert not torch.equal(p, before)


@pytest.mark.parametrize("labels", [{"2": 0}, {"1": 1, "2": "1"}])
def test_layers_of_pieces_must_have_different_names(labels: dict[str, Any]) -> None:
    params = [nn.Parameter(torch.ones(3)) for _ in range(3)]
    for p in params:
        p.grad = torch.ones(3)
    optimizer = LARS(params, **OPTIONS, layer_of=labels.get, shard_group=distributed.group.WORLD)
    with pytest.raises(ValueError, match="layers must have different names; two are called"):
        optimizer.step()
