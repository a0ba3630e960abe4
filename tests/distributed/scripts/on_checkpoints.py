"""Run by test_checkpoints_torch on 2 and on 4 ranks, after on_engines, which saves what is loaded here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import engines
import numpy as np
import torch
from ranks import serve
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

import lars_array
from lars_torch import LARS

STEPS, MORE = engines.SAVED_AT, 5


def went_on(model: nn.Module, optimizer: LARS, **options: Any) -> float:
    """Train on, and return the distance from the whole network that did not stop."""
    engines.train(model, optimizer, MORE, start=STEPS)
    whole, _ = engines.trained(STEPS + MORE, **options)
    return engines.distance(whole, model)


def load(processes: int) -> Any:
    model, optimizer = engines.spread(**engines.SAVED)
    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    checkpoint.load(parts, checkpoint_id=engines.checkpoint_of(processes))
    states = {"model_state_dict": parts["model"], "optim_state_dict": parts["optimizer"]}
    set_state_dict(model, optimizer, **states)
    return {
        "distance": went_on(model, optimizer, **engines.SAVED),
        "keys": sorted(map(sorted, optimizer.state.values())),
    }


def preparing_changes_nothing() -> bool:
    """`get_state_dict` takes a step with gradients of zero and learning rate 0 to make the state."""
    model, optimizer = engines.spread(**engines.SAVED)
    before = [engines.whole(p).clone() for p in model.parameters()]
    get_state_dict(model, optimizer)
    return all(torch.equal(a, engines.whole(p)) for a, p in zip(before, model.parameters(), strict=True))


def whole_of_torch(engine: str) -> float:
    """A checkpoint of whole tensors, which each rank has, is cut as the parameters are."""
    trained, saved = engines.trained(STEPS)
    model, optimizer = engines.spread(engine)
    full = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, trained.state_dict(), options=full)
    optimizer.load_state_dict(saved.state_dict())
    return went_on(model, optimizer)


def whole_of_numpy() -> float:
    """A checkpoint of `lars_array.LARS` goes to pieces, by name."""
    trained = engines.network()
    named = {name: p.detach().numpy() for name, p in trained.named_parameters()}
    numpy_groups: list[dict[str, Any]] = [
        {"params": {name: p for name, p in named.items() if name.endswith("weight")}},
        {
            "params": {name: p for name, p in named.items() if name.endswith("bias")},
            "weight_decay": 0.0,
            "adapt": False,
        },
    ]
    of_numpy = lars_array.LARS(numpy_groups, **engines.OPTIONS)
    reader = torch.optim.SGD(trained.parameters(), lr=0.0)
    for k in range(STEPS):
        engines.backward(trained, reader, k)
        of_numpy.step({name: np.asarray(p.grad) for name, p in trained.named_parameters()})
    model = engines.fsdp(engines.network())
    set_model_state_dict(model, dict(trained.state_dict()), options=StateDictOptions(full_state_dict=True))
    names = list(model.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [(name, p) for name, p in names if name.endswith("weight")]},
        {"params": [(name, p) for name, p in names if name.endswith("bias")], **engines.UNADAPTED},
    ]
    optimizer = LARS(groups, **engines.OPTIONS)
    optimizer.load_state_dict(of_numpy.state_dict())
    return went_on(model, optimizer)


def pieces_into_whole() -> Any:
    """The other way round DTensors are refused, and nothing changes."""
    model, optimizer = engines.spread()
    engines.train(model, optimizer, 1)
    _, plain = engines.trained(1)
    before = [v.clone() for own in plain.state.values() for v in own.values()]
    try:
        plain.load_state_dict(optimizer.state_dict())
    except ValueError as error:
        after = [v for own in plain.state.values() for v in own.values()]
        return {"message": str(error), "unchanged": all(map(torch.equal, before, after))}
    return {"message": "loaded", "unchanged": False}


def half_precision() -> Any:
    """Masters and momentum buffers of bfloat16 pieces are float32, and spread as they are."""
    model = engines.fsdp(engines.network().bfloat16())
    optimizer = LARS(engines.groups_of(model), **engines.OPTIONS, master_weights=True)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) + 0.01
    optimizer.step()
    kept = [x for own in optimizer.state.values() for x in own.values()]
    alike = all(x.placements == p.placements for p in model.parameters() for x in optimizer.state[p].values())
    return {
        "types": sorted({str(x.dtype) for x in kept}),
        "kinds": sorted({type(x).__name__ for x in kept}),
        "alike": alike,
    }


CASES: dict[str, Callable[[], Any]] = {
    "from 2": lambda: load(2),
    "from 4": lambda: load(4),
    "preparing changes nothing": preparing_changes_nothing,
    **{f"whole into {engine}": lambda engine=engine: whole_of_torch(engine) for engine in engines.ENGINES},
    "whole of NumPy": whole_of_numpy,
    "pieces into whole": pieces_into_whole,
    "half precision": half_precision,
}

if __name__ == "__main__":
    serve(CASES)
