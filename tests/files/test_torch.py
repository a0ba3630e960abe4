"""`lars_torch.save` and `load`: models with buffers, names, schedulers, and what does not fit."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from assertions import assert_refused, assert_same

import lars_array

torch = pytest.importorskip("torch")
from lars_torch import LARS, load, param_groups, save  # noqa: E402

OPTIONS: dict[str, Any] = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1}


def model(width: int = 3, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.BatchNorm1d(width), torch.nn.Linear(width, 1))


def train(net: Any, optimizer: Any, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        net(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()


def seen(net: Any, optimizer: Any) -> Any:
    """Return all that training goes on with."""
    tensors = {name: p.clone() for name, p in net.state_dict().items()}
    state = [{k: torch.as_tensor(x).clone() for k, x in optimizer.state.get(p, {}).items()} for p in net.parameters()]
    groups = [{k: group[k] for k in sorted(group) if k != "params"} for group in optimizer.param_groups]
    return tensors, state, repr(groups), optimizer.steps, optimizer.skipped_steps


def assert_goes_on(path: Path, net: Any, optimizer: Any, other: Any, resumed: Any) -> None:
    """Another model with its optimizer goes on as the first does."""
    save(path, optimizer, params=net)
    load(path, resumed, params=other)
    assert_same(seen(other, resumed)[:2], seen(net, optimizer)[:2])
    for one, two in ((net, optimizer), (other, resumed)):
        train(one, two, range(10, 13))
    assert_same(seen(other, resumed), seen(net, optimizer))


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("rule", ["flash", "mxnet"])
def test_a_model_with_buffers(tmp_path: Path, named: bool, rule: str) -> None:
    nets = [model(seed=seed) for seed in (0, 1)]
    given = [net.named_parameters() if named else net.parameters() for net in nets]
    one, two = LARS(given[0], **OPTIONS, rule=rule), LARS(given[1], **OPTIONS | {"lr": 9.0}, rule=rule)
    train(nets[0], one, range(3))
    assert_goes_on(tmp_path / "run", nets[0], one, nets[1], two)
    assert two.steps == 6


def test_groups_that_exclude_biases(tmp_path: Path) -> None:
    nets = [model(seed=seed) for seed in (0, 1)]
    one, two = (LARS(param_groups(net, 0.1), lr=0.5, momentum=0.9) for net in nets)
    train(nets[0], one, range(3))
    assert_goes_on(tmp_path / "run", nets[0], one, nets[1], two)
    # An optimizer of one group can't have the options of two.
    other = model()
    resumed = LARS(other.parameters(), **OPTIONS)
    message = "state_dict must have the same options for '0.weight' and '0.bias', which are in one parameter group here"
    message += f" (file {str(tmp_path / 'run')!r})"
    call = partial(load, tmp_path / "run", resumed, params=other)
    before = seen(other, resumed)
    assert_refused(call, ValueError, message)
    assert_same(seen(other, resumed), before)


def test_a_learning_rate_that_is_a_tensor_and_what_a_scheduler_notes(tmp_path: Path) -> None:
    nets = [model(seed=seed) for seed in (0, 1)]
    one = LARS(nets[0].parameters(), **OPTIONS | {"lr": torch.tensor(0.3)})
    scheduler = torch.optim.lr_scheduler.StepLR(one, 2)
    train(nets[0], one, range(3))
    save(tmp_path / "run", one, params=nets[0], metadata={"scheduler": scheduler.state_dict()["step_size"]})
    two = LARS(nets[1].parameters(), **OPTIONS)
    assert load(tmp_path / "run", two, params=nets[1]).metadata == {"scheduler": 2}
    (group,) = two.param_groups
    assert isinstance(group["lr"], torch.Tensor)
    assert_same(group["lr"], one.param_groups[0]["lr"])
    assert float(group["initial_lr"]) == float(torch.tensor(0.3))
    (plain,) = lars_array.load(tmp_path / "run").state["param_groups"]
    assert "initial_lr" not in plain


def test_names_or_positions(tmp_path: Path) -> None:
    net, other = model(), model(seed=1)
    one = LARS(net.parameters(), **OPTIONS)
    train(net, one, range(2))
    save(tmp_path / "run", one)
    assert [*lars_array.load(tmp_path / "run").state["state"]] == list("012345")
    save(tmp_path / "named", one, params=dict(net.named_parameters()))
    two = LARS(other.parameters(), **OPTIONS)
    load(tmp_path / "named", two)  # it has no names: by position
    assert_same(seen(other, two)[1], seen(net, one)[1])
    named = LARS(list(other.named_parameters())[::-1], **OPTIONS)  # in another order: by name
    load(tmp_path / "named", named)
    assert_same(seen(other, named)[1], seen(net, one)[1])
    with pytest.raises(ValueError, match=r"it has no '2.bias'"):
        load(tmp_path / "run", named)


def test_all_misfits_are_in_one_message_and_nothing_is_changed(tmp_path: Path) -> None:
    net, other = model(), model(width=5)
    one, two = LARS(net.parameters(), **OPTIONS), LARS(other.parameters(), **OPTIONS)
    train(net, one, range(2))
    train(other, two, range(2))
    save(tmp_path / "run", one, params=net)
    before = seen(other, two)
    with pytest.raises(ValueError, match=r"^12 misfits: the momentum buffer of '0.weight' must have .*; and 9 more"):
        load(tmp_path / "run", two, params=other)
    with pytest.raises(ValueError, match="misfits: state_dict must be of parameters named"):
        load(tmp_path / "run", LARS(other[0].parameters(), **OPTIONS), params=other[0])
    assert_same(seen(other, two), before)
    save(tmp_path / "state", one)
    with pytest.raises(ValueError, match="it holds no parameters"):
        load(tmp_path / "state", params=net)


def test_what_is_refused(tmp_path: Path) -> None:
    net = model()
    optimizer = LARS(net.parameters(), **OPTIONS)
    for call, message in (
        (lambda: save(tmp_path / "run", net), "optimizer must be a lars_torch.LARS; got torch.nn"),
        (lambda: load(tmp_path / "run", net), "optimizer must be a lars_torch.LARS; got torch.nn"),
        (lambda: save(tmp_path / "run", optimizer, params=[1]), "params must be a module or a mapping"),
        (lambda: save(tmp_path / "run", optimizer, params={"x": 1}), "params must hold tensors; got 1 for 'x'"),
        (lambda: lars_array.save(tmp_path / "run", optimizer), "lars_torch.save saves its optimizers"),
        (lambda: lars_array.load(tmp_path / "run", optimizer), "got an object of lars_torch.optimizer.LARS"),
    ):
        with pytest.raises(TypeError, match=message):
            call()
    with pytest.raises(ValueError, match="params must hold all parameters of the optimizer; it lacks '2'"):
        save(tmp_path / "run", optimizer, params=net[0])
    assert list(tmp_path.iterdir()) == []


def test_dtensors_are_left_to_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lars_torch.files

    net = model()
    optimizer = LARS(net.parameters(), **OPTIONS)
    save(tmp_path / "run", optimizer, params=net)
    monkeypatch.setattr(lars_torch.files, "is_dtensor", lambda x: True)
    for call in (
        lambda: save(tmp_path / "other", optimizer),
        lambda: load(tmp_path / "run", optimizer),
        lambda: load(tmp_path / "run", params=net),
    ):
        with pytest.raises(TypeError, match=r"saved and loaded by torch.distributed.checkpoint"):
            call()
    assert [x.name for x in tmp_path.iterdir()] == ["run"]


def test_a_file_alone(tmp_path: Path) -> None:
    net = model().to(torch.bfloat16)
    optimizer = LARS(net.parameters(), **OPTIONS)
    save(tmp_path / "run", optimizer, params=net, metadata={"epoch": 1})
    saved = load(tmp_path / "run")
    assert saved.metadata == {"epoch": 1}
    other = model().to(torch.bfloat16)
    other.load_state_dict(saved.params)
    assert all(torch.equal(other.state_dict()[name], x) for name, x in net.state_dict().items())
    optimizer.load_state_dict(saved.state)
    only = load(tmp_path / "run", params=other)
    assert only.params is None
    assert_same(only.state, saved.state)


def test_metadata_that_save_has_not_written_are_left_alone(tmp_path: Path) -> None:
    net = model()
    optimizer = LARS(net.parameters(), **OPTIONS)
    save(tmp_path / "run", optimizer, params=net)
    state = lars_array.load(tmp_path / "run").state
    for strange in (1, [1], "x"):
        lars_array.save(tmp_path / "run", state, metadata={"lars_torch": strange})
        assert load(tmp_path / "run", optimizer).metadata == {"lars_torch": strange}
    names = state["param_groups"][0]["names"]
    own = [{"names": names, "options": {"params": 1, "lr": 3.0, "initial_lr": 2.0}}]
    lars_array.save(tmp_path / "run", state, metadata={"lars_torch": own})
    load(tmp_path / "run", optimizer)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["initial_lr"], len(group["params"])) == (0.5, 2.0, 6)


def test_a_rule_of_ones_own(tmp_path: Path) -> None:
    def rule(S: Any, hyper: Any, xp: Any) -> Any:
        return lars_array.RULES["flash"].function(S, hyper, xp)

    nets = [model(seed=seed) for seed in (0, 1)]
    one, two = (LARS(net.parameters(), **OPTIONS, rule=rule) for net in nets)
    with pytest.raises(TypeError, match="rule of parameter group 0 must be data to be saved"):
        save(tmp_path / "run", one)
    save(tmp_path / "run", one, params=nets[0], omit=("rule",))
    load(tmp_path / "run", two, params=nets[1])
    assert two.param_groups[0]["rule"] is rule
    assert np.all(nets[0][0].weight.detach().numpy() == nets[1][0].weight.detach().numpy())


def test_other_options_go_to_the_groups_of_the_same_parameters(tmp_path: Path) -> None:
    def made(order: list[str]) -> tuple[dict[str, torch.Tensor], LARS]:
        params = {name: torch.ones(3, requires_grad=True) for name in order}
        rates = {"w": 0.5, "b": 0.7}
        return params, LARS([{"params": [params[name]], "lr": rates[name]} for name in order], lr=0.1)

    params, saved = made(["w", "b"])
    torch.optim.lr_scheduler.LambdaLR(saved, lambda step: 1.0)
    saved.param_groups[0]["initial_lr"] = torch.tensor(0.5)
    save(tmp_path / "run", saved, params=params)
    params, loading = made(["b", "w"])
    load(tmp_path / "run", loading, params=params)
    assert [group["initial_lr"] for group in loading.param_groups] == [0.7, torch.tensor(0.5)]
    assert isinstance(loading.param_groups[1]["initial_lr"], torch.Tensor)


def test_metadata_of_the_same_name_are_refused(tmp_path: Path) -> None:
    params = {"w": torch.ones(3, requires_grad=True)}
    with pytest.raises(ValueError, match="metadata must not hold the key 'lars_torch'"):
        save(tmp_path / "run", LARS(params.values(), lr=0.1), params=params, metadata={"lars_torch": "0.2.0"})


def test_a_schedule_in_a_file_is_refused_with_the_path(tmp_path: Path) -> None:
    p = np.ones(3)
    lars_array.save(tmp_path / "run", lars_array.LARS({"w": p}, lr=lars_array.warmup_cosine(0.1, 10)))
    params = {"w": torch.ones(3, dtype=torch.float64, requires_grad=True)}
    with pytest.raises(ValueError, match=r"lr must be a number.*run"):
        load(tmp_path / "run", LARS(params.values(), lr=0.1), params=params)
