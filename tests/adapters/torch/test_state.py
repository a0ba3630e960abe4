"""Checkpoints: of our own and of others, there and back, whole and to the bit; copies and pickles."""

from __future__ import annotations

import collections
import copy
import io
import pickle
import types
from typing import Any

import numpy as np
import pytest
import torch

import lars_array
from lars_torch import LARS

OPTIONS: dict[str, Any] = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1, "trust_coefficient": 0.1}
SHAPES = [(4, 3), (3,), ()]


def parameters(dtype: torch.dtype = torch.float32) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def advance(optimizer: Any, start: int, stop: int, lr: Any = None) -> None:
    """Take steps with gradients that depend on their number only."""
    for t in range(start, stop):
        generator = torch.Generator().manual_seed(100 + t)
        for group in optimizer.param_groups:
            if lr is not None:
                group["lr"] = lr(t)
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def params_of(optimizer: Any) -> list[Any]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def assert_same(ours: Any, theirs: Any) -> None:
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        assert torch.equal(p, q)
        assert ours.state.get(p, {}).keys() == theirs.state.get(q, {}).keys()
        for key, v in ours.state.get(p, {}).items():
            assert v.dtype == theirs.state[q][key].dtype and torch.equal(v, theirs.state[q][key])


def through_a_file(state_dict: Any) -> Any:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"rule": "mxnet"}, {"rule": "optax"}, {"master_weights": True}, {"momentum": 0}], ids=str
)
def test_a_run_goes_on_as_if_it_had_not_been_interrupted(dtype: torch.dtype, options: dict[str, Any]) -> None:
    def lr(t: int) -> float:
        return 0.5 / (1 + t)  # for rules that look at the last one

    options = OPTIONS | options
    whole = LARS(parameters(dtype), **options)
    advance(whole, 0, 6, lr)
    first = LARS(parameters(dtype), **options)
    advance(first, 0, 3, lr)
    second = LARS([torch.nn.Parameter(p.detach().clone()) for p in params_of(first)], lr=123.0)
    second.load_state_dict(through_a_file(first.state_dict()))
    advance(second, 3, 6, lr)
    assert_same(second, whole)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("options", [{}, {"rule": "mxnet"}, {"master_weights": True}], ids=str)
def test_copies_go_on_by_themselves(copied: Any, options: dict[str, Any]) -> None:
    optimizer = LARS(parameters(torch.bfloat16), **OPTIONS, **options, kernel="blocked")
    advance(optimizer, 0, 3, lambda t: 0.5 / (1 + t))
    twin = copied(optimizer)
    before = copy.deepcopy(params_of(twin))
    advance(optimizer, 3, 6, lambda t: 0.5 / (1 + t))
    for p, q in zip(params_of(twin), before, strict=True):
        assert torch.equal(p, q), "memory is shared"
    advance(twin, 3, 6, lambda t: 0.5 / (1 + t))
    assert_same(twin, optimizer)


def test_momentum_of_half_precision_keeps_its_bits() -> None:
    p = torch.nn.Parameter(torch.ones(3).half())
    optimizer = LARS([p], lr=1.0, momentum=0.9)
    optimizer.state[p]["momentum_buffer"] = torch.full((3,), 1 / 3)
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    assert optimizer.state[p]["momentum_buffer"].dtype == torch.float32
    assert torch.equal(optimizer.state[p]["momentum_buffer"], torch.full((3,), 1 / 3))


def test_all_hyper_parameters_are_in_a_checkpoint() -> None:
    given = OPTIONS | {"eps": 0.1, "nesterov": True, "rule": "timm", "trust_bounds": (0.0, 2.0), "max_grad_norm": 3.0}
    optimizer = LARS(parameters(), lr=9.0)
    optimizer.load_state_dict(through_a_file(LARS(parameters(), **given).state_dict()))
    assert {key: optimizer.param_groups[0][key] for key in given} == given


@pytest.mark.parametrize("rule", ["flash", "optax", "nvidia", "mxnet"])
@pytest.mark.parametrize("lr", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
def test_the_last_learning_rate_is_state_where_a_rule_reads_it(rule: str, lr: Any) -> None:
    optimizer = LARS(parameters(), **OPTIONS | {"lr": lr}, rule=rule)
    p, q, r = params_of(optimizer)
    for x in (p, q):
        x.grad = torch.ones_like(x)
    optimizer.step()
    keys = {"momentum_buffer", "previous_lr"} if rule in ("nvidia", "mxnet") else {"momentum_buffer"}
    assert optimizer.state[p].keys() == keys and r not in optimizer.state
    state_dict = optimizer.state_dict()
    assert not any("previous_lr" in group for group in state_dict["param_groups"])
    assert state_dict["state"][1].get("previous_lr", 0.5) == 0.5
    p.grad = None
    optimizer.param_groups[0]["lr"] = 0.25
    optimizer.step()
    rates = [optimizer.state[x].get("previous_lr") for x in (p, q)]
    assert rates == ([0.5, 0.25] if rule in ("nvidia", "mxnet") else [None, None])


def test_the_last_learning_rate_is_state_too_where_another_rule_has_got_the_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flash = lars_array.RULES["flash"].function

    def reads(S: Any, hyper: Any, xp: Any) -> Any:
        return flash(S, hyper, xp) * (1 + hyper.previous_lr)[:, None]

    monkeypatch.setitem(lars_array.RULES, "own", lars_array.Rule(flash))
    advance(LARS(parameters(), **OPTIONS, rule="own"), 0, 1)
    monkeypatch.setitem(lars_array.RULES, "own", lars_array.Rule(reads))
    optimizer = LARS(parameters(), **OPTIONS, rule="own")
    advance(optimizer, 0, 2)
    assert all(own["previous_lr"] == 0.5 for own in optimizer.state.values())
    twin = copy.deepcopy(optimizer)
    for own in (optimizer, twin):
        advance(own, 2, 3)
    assert_same(optimizer, twin)


def test_a_last_learning_rate_that_is_replaced_is_read() -> None:
    first, second = (LARS(parameters(), **OPTIONS, rule="mxnet") for _ in range(2))
    for optimizer in (first, second):
        advance(optimizer, 0, 2, lambda t: 0.5 / (1 + t))
    for own in first.state.values():
        own["previous_lr"] = 0.125
    for own in second.state.values():
        own["previous_lr"].fill_(0.125)
    for optimizer in (first, second):
        advance(optimizer, 2, 4, lambda t: 0.5 / (1 + t))
    assert_same(first, second)
    third = LARS(parameters(), **OPTIONS, rule="mxnet")
    advance(third, 0, 2, lambda t: 0.5 / (1 + t))
    advance(third, 2, 4, lambda t: 0.5 / (1 + t))
    assert not torch.equal(params_of(third)[0], params_of(first)[0])


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_last_learning_rate_out_of_range_is_refused(value: float) -> None:
    optimizer = LARS(parameters(), **OPTIONS, rule="mxnet")
    advance(optimizer, 0, 1)
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["state"][0]["previous_lr"] = value
    with pytest.raises(ValueError, match="previous_lr must be finite and at least 0"):
        optimizer.load_state_dict(state_dict)


# ------------------------------------------------------------------------------------- states and groups are replaced


def empty_dict(optimizer: Any) -> None:
    optimizer.state = {}


def empty_defaultdict(optimizer: Any) -> None:
    optimizer.state = collections.defaultdict(dict)


def cleared(optimizer: Any) -> None:
    optimizer.state.clear()


def other_states(optimizer: Any) -> None:
    for p in params_of(optimizer):
        optimizer.state[p] = {"momentum_buffer": torch.full_like(p, 0.5)}


def other_groups(optimizer: Any) -> None:
    optimizer.param_groups = [{**group, "lr": 0.25} for group in optimizer.param_groups]


def split_groups(optimizer: Any) -> None:
    (group,) = optimizer.param_groups
    optimizer.param_groups = [{**group, "params": [p]} for p in group["params"]]
    optimizer.param_groups[1]["lr"] = 0.125


def fewer_groups(optimizer: Any) -> None:
    optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][1:]


@pytest.mark.parametrize(
    "change", [empty_dict, empty_defaultdict, cleared, other_states, other_groups, split_groups, fewer_groups]
)
@pytest.mark.parametrize("steps_before", [0, 2])
def test_replaced_states_and_groups_are_taken_as_by_sgd(change: Any, steps_before: int) -> None:
    ours = LARS(parameters(), lr=0.5, momentum=0.9, weight_decay=0.1, adapt=False)
    theirs = sgd(parameters())
    for optimizer in (ours, theirs):
        advance(optimizer, 0, steps_before)
        change(optimizer)
        if isinstance(optimizer.state, dict) and not isinstance(optimizer.state, collections.defaultdict):
            if optimizer is theirs:  # which has a KeyError
                optimizer.state = collections.defaultdict(dict)
        advance(optimizer, 2, 5)
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        torch.testing.assert_close(p, q)
        torch.testing.assert_close(ours.state[p], theirs.state[q])


@pytest.mark.parametrize(
    "state",
    [
        None,
        types.MappingProxyType({}),
        *({0: own} for own in (None, types.MappingProxyType({}), [])),
        {0: {"momentum_buffer": np.ones((4, 3))}},
        {0: {"momentum_buffer": torch.ones(5)}},
        {2: {"momentum_buffer": torch.ones(5)}},
    ],
    ids=str,
)
@pytest.mark.parametrize("steps_before", [0, 2])
def test_nothing_moves_before_a_state_is_refused(state: Any, steps_before: int) -> None:
    optimizer = LARS(parameters(), **OPTIONS)
    advance(optimizer, 0, steps_before)
    params = params_of(optimizer)
    before = [p.detach().clone() for p in params]
    if isinstance(state, dict):
        optimizer.state.update({params[i]: own for i, own in state.items()})
    else:
        optimizer.state = state
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises((TypeError, ValueError)):
        optimizer.step()
    assert all(map(torch.equal, params, before))


# ------------------------------------------------------------------------------------------------ other implementations


def sgd(params: Any) -> Any:
    return torch.optim.SGD(params, lr=0.5, momentum=0.9, weight_decay=0.1)


def torch_optimizer(params: Any) -> Any:
    return pytest.importorskip("torch_optimizer").LARS(params, lr=0.5, momentum=0.9, weight_decay=0.1)


def timm(params: Any) -> Any:
    from benchmarks.peers.timm_lars import lars_class

    return lars_class()(params, lr=0.5, momentum=0.9, weight_decay=0.1, trust_coeff=0.1)


@pytest.mark.parametrize("peer", [sgd, torch_optimizer, timm])
def test_checkpoints_of_others_load(peer: Any) -> None:
    other = peer(parameters())
    advance(other, 0, 3)
    ours = LARS([torch.nn.Parameter(p.detach().clone()) for p in params_of(other)], lr=9.0, trust_coefficient=0.25)
    ours.load_state_dict(through_a_file(other.state_dict()))
    for p, q in zip(params_of(ours), params_of(other), strict=True):
        assert torch.equal(ours.state[p]["momentum_buffer"], other.state[q]["momentum_buffer"])
    group = ours.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.5, 0.9, 0.1)
    theirs = other.param_groups[0]  # timm has another name for it
    assert group["trust_coefficient"] == theirs.get("trust_coefficient", theirs.get("trust_coeff", 0.25))
    assert group["rule"] == "flash"
    advance(ours, 3, 5)


def test_options_that_a_checkpoint_lacks_stay_those_of_the_group() -> None:
    first, *others = parameters()
    own = {"adapt": False, "trust_coefficient": 0.02}
    optimizer = LARS([{"params": [first]}, {"params": others, **own}], **OPTIONS)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["adapt"], group["trust_coefficient"]
    optimizer.load_state_dict(saved | {"param_groups": [group | {"lr": 0.3} for group in saved["param_groups"]]})
    assert [group["adapt"] for group in optimizer.param_groups] == [True, False]
    assert [group["trust_coefficient"] for group in optimizer.param_groups] == [0.1, 0.02]
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.3]


@pytest.mark.parametrize("peer", [sgd, torch_optimizer, timm])
def test_our_checkpoints_load_into_others(peer: Any) -> None:
    ours = LARS(parameters(), **OPTIONS)
    advance(ours, 0, 3)
    other = peer([torch.nn.Parameter(p.detach().clone()) for p in params_of(ours)])
    kept = {key: value for key, value in other.param_groups[0].items() if key not in ours.param_groups[0]}
    other.load_state_dict(through_a_file(ours.state_dict()))
    other.param_groups[0].update(kept)  # torch drops what a checkpoint does not have
    for p, q in zip(params_of(ours), params_of(other), strict=True):
        assert torch.equal(ours.state[p]["momentum_buffer"], other.state[q]["momentum_buffer"])
    advance(other, 3, 5)


def test_sgd_without_momentum_leaves_no_buffers() -> None:
    other = torch.optim.SGD(parameters(), lr=0.5)
    advance(other, 0, 2)
    state_dict = other.state_dict()
    for number in range(len(SHAPES)):
        state_dict["state"][number] = {"momentum_buffer": None}  # as older ones of torch wrote it
    ours = LARS(parameters(), **OPTIONS)
    advance(ours, 0, 2)
    ours.load_state_dict(state_dict)
    assert all(p not in ours.state for p in params_of(ours))
    ours.param_groups[0].update(momentum=0.9, dampening=0.5)
    fresh = LARS([torch.nn.Parameter(p.detach().clone()) for p in params_of(ours)], lr=0.5, momentum=0.9, dampening=0.5)
    advance(ours, 2, 4)
    advance(fresh, 2, 4)
    assert_same(ours, fresh)


@pytest.mark.parametrize("names", [None, ["w", "b", "s"]], ids=["unnamed", "named"])
def test_a_checkpoint_of_lars_array_loads(names: list[str] | None) -> None:
    arrays = [p.detach().numpy().copy() for p in parameters()]
    given = arrays if names is None else dict(zip(names, arrays, strict=True))
    near = lars_array.LARS(given, **OPTIONS, rule="mxnet", nonfinite="propagate")
    params = parameters()
    far = LARS(params if names is None else list(zip(names, params, strict=True)), **OPTIONS, rule="mxnet")
    steps = [[np.full(shape, 0.1 * (t + 1), np.float32) for shape in SHAPES] for t in range(6)]

    def step_far(grads: Any) -> None:
        for p, g in zip(params, grads, strict=True):
            p.grad = torch.from_numpy(np.asarray(g).copy())
        far.step()

    for t, grads in enumerate(steps):
        if t == 3:
            far.load_state_dict(near.state_dict())
            for p, a in zip(params, arrays, strict=True):
                p.data.copy_(torch.from_numpy(a))
        near.param_groups[0]["lr"] = far.param_groups[0]["lr"] = 0.5 / (t + 1)
        near.step(grads if names is None else dict(zip(names, grads, strict=True)))
        step_far(grads)
    for p, a in zip(params, arrays, strict=True):
        assert np.array_equal(p.detach().numpy(), a)


# ------------------------------------------------------------------------------------------------------------ refusals


def broken(state_dict: Any, **changes: Any) -> Any:
    state_dict = copy.deepcopy(state_dict)
    state_dict["param_groups"][0].update(changes.pop("group", {}))
    state_dict["state"][0].update(changes)
    return state_dict


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"momentum_buffer": torch.zeros(2, 3)}, r"must have the parameter's shape \(4, 3\); got \(2, 3\)"),
        ({"momentum_buffer": torch.zeros(4, 3, dtype=torch.complex64)}, "must be of a type like torch.float32"),
        ({"momentum_buffer": torch.zeros(4, 3, dtype=torch.int64)}, "must be of a type like torch.float32"),
        ({"momentum_buffer": 3.0}, r"must have the parameter's shape \(4, 3\); got 3.0"),
        ({"group": {"momentum": -0.5}}, "Invalid momentum value: -0.5"),
        ({"group": {"rule": "unheard-of"}}, "rule must be one of"),
        ({"group": {"params": [0]}}, "size of optimizer's group"),
    ],
    ids=str,
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(changes: Any, message: str) -> None:
    optimizer = LARS(parameters(), **OPTIONS)
    advance(optimizer, 0, 3)
    twin = copy.deepcopy(optimizer)
    with pytest.raises((ValueError, TypeError), match=message):
        optimizer.load_state_dict(broken(optimizer.state_dict(), **changes))
    for own in (optimizer, twin):
        advance(own, 3, 5)
    assert_same(optimizer, twin)
    assert optimizer.state_dict()["param_groups"] == twin.state_dict()["param_groups"]


def test_names_of_a_checkpoint_of_lars_array_must_be_known() -> None:
    near = lars_array.LARS({"x": np.ones((4, 3), np.float32)}, lr=0.1)
    optimizer = LARS([("w", torch.nn.Parameter(torch.ones(4, 3)))], lr=0.1)
    with pytest.raises(ValueError, match=r"state_dict must be of parameters named 'w'; got 'x'"):
        optimizer.load_state_dict(near.state_dict())


def test_a_rejected_step_casts_no_momentum_buffer() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = LARS([p], lr=0.1, momentum=0.9, nonfinite="raise")
    wide = torch.full((3,), 1e-60, dtype=torch.float64)
    optimizer.state[p]["momentum_buffer"] = wide
    p.grad = torch.full((3,), float("nan"))
    with pytest.raises(lars_array.NonFiniteError):
        optimizer.step()
    assert optimizer.state[p]["momentum_buffer"] is wide
    p.grad = torch.ones(3)
    for _ in range(2):
        optimizer.step()
    assert optimizer.state[p]["momentum_buffer"].dtype is torch.float32


def test_numbers_are_no_functions_of_the_step() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = LARS([p], lr=0.1)
    p.grad = torch.ones(3)
    optimizer.param_groups[0]["momentum"] = lambda step: 0.9
    with pytest.raises(TypeError, match=r"^momentum must be a number or a tensor, see torch.optim.lr_scheduler; got"):
        optimizer.step()
