"""Keys of groups and of checkpoints: those of other LARS, of other optimizers, of schedulers, and mistyped."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch

from lars_torch import LARS


def parameter(size: int = 3) -> torch.nn.Parameter:
    p = torch.nn.Parameter(torch.ones(size))
    p.grad = torch.ones(size)
    return p


# -------------------------------------------------------------------------------------------------------------- groups

MEANT = {
    "wd": "it is called weight_decay here",
    "trust_coeff": "it is called trust_coefficient here",
    "trust_coef": "it is called trust_coefficient here",
    "eta": "it is called trust_coefficient here",
    "eeta": "it is called trust_coefficient here",
    "epsilon": "it is called eps here",
    "learning_rate": "it is called lr here",
    "clip_lr": "it is called trust_clip here",
    "layer_adaptation": "it is called adapt here",
    "lars_exclude": "use adapt=False",
    "is_skipped": "use adapt=False",
    "exclude_bias_n_norm": "use param_groups(...), which excludes biases and norms",
    "weight_decay_filter": "use param_groups(..., no_decay=...)",
    "weigth_decay": "did you mean 'weight_decay'?",
    "momentun": "did you mean 'momentum'?",
}
# Of schedulers and training frameworks, and the options of optimizers that hand their groups to the one they wrap.
KEPT = ["initial_lr", "max_lr", "min_lr", "swa_lr", "base_momentum", "max_momentum", "initial_momentum", "lr_scale"]
KEPT += ["name", "foreach", "fused", "capturable", "rho", "adaptive"]


@pytest.mark.parametrize(
    ("key", "advice"), [*MEANT.items(), ("foo", "known are lr, momentum, dampening, weight_decay")]
)
def test_a_key_that_means_nothing_is_refused(key: str, advice: str) -> None:
    optimizer = LARS([parameter()], lr=0.1)
    with pytest.raises(ValueError) as caught:
        optimizer.add_param_group({"params": [parameter()], key: 0.5})
    assert str(caught.value).startswith(f"unknown hyper-parameter '{key}'; {advice}")
    assert str(caught.value).endswith("(parameter group 1)")
    assert len(str(caught.value)) <= 500 and len(optimizer.param_groups) == 1


@pytest.mark.parametrize("key", KEPT)
def test_keys_of_schedulers_and_wrappers_are_kept(key: str) -> None:
    optimizer = LARS([{"params": [parameter()], key: 0.5}], lr=0.1)
    optimizer.step()
    other = LARS([{"params": [parameter()], key: 0.25}], lr=0.2)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0][key] == 0.5
    other.step()


@pytest.mark.parametrize("key", MEANT)
@pytest.mark.parametrize("differentiable", [False, True])
def test_a_key_put_into_a_group_later_is_refused_if_it_may_mean_something(key: str, differentiable: bool) -> None:
    p = parameter()
    optimizer = LARS([p], lr=0.1, differentiable=differentiable)
    if not differentiable:
        optimizer.step()
    before = p.detach().clone()
    optimizer.param_groups[0][key] = 0.5
    with pytest.raises(ValueError, match=rf"unknown hyper-parameter '{key}'; .*\(parameter group 0\)"):
        optimizer.step()
    assert torch.equal(p, before)
    del optimizer.param_groups[0][key]
    optimizer.param_groups[0]["train_mode"] = True  # of a wrapper
    if not differentiable:
        optimizer.step()


def test_sam_passes_its_groups_on() -> None:
    """davda54's SAM, as its readers use it: the groups of the two optimizers are the same objects."""

    class SAM(torch.optim.Optimizer):
        def __init__(self, params: Any, base: Any, rho: float = 0.05, **options: Any) -> None:
            super().__init__(params, {"rho": rho, "adaptive": False, **options})
            self.base_optimizer = base(self.param_groups, **options)
            self.param_groups = self.base_optimizer.param_groups
            self.defaults.update(self.base_optimizer.defaults)

        def step(self, closure: Any = None) -> None:
            self.base_optimizer.step()

    p, q = parameter(), parameter()
    sam = SAM([p], LARS, lr=0.1, momentum=0.9)
    sam.load_state_dict(sam.state_dict())
    sam.step()
    torch.optim.SGD([q], lr=0.1, momentum=0.9).step()
    assert torch.equal(p, q)


# -------------------------------------------------------------------------------------------------------- plain values


class Config(list[Any]):
    """A list of another library, as OmegaConf's are: not to be read by ``torch.load(weights_only=True)``."""


NUMBERS = [np.float64(0.5), np.float32(0.5), np.array(0.5), np.int64(1), torch.tensor(0.5)]


@pytest.mark.parametrize("value", NUMBERS, ids=repr)
def test_checkpoints_hold_plain_values(value: Any) -> None:
    options = {
        "nesterov": np.bool_(False),
        "rule": np.str_("flash"),
        "trust_bounds": Config([np.float32(0), np.int64(1)]),
    }
    optimizer = LARS(
        [{"params": [parameter()], "trust_bounds": Config([0, 2])}], lr=value, weight_decay=value, **options
    )
    optimizer.add_param_group({"params": [parameter()], "layer_axes": np.int64(0)})
    optimizer.step()
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = np.float64(0.25)  # as schedules of NumPy compute it
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    groups = torch.load(file, weights_only=True)["param_groups"]
    assert [group["trust_bounds"] for group in groups] == [(0.0, 2.0), (0.0, 1.0)]
    assert all(type(bound) is float for group in groups for bound in group["trust_bounds"])
    assert [type(groups[1][key]) for key in ("lr", "initial_lr", "rule", "nesterov")] == [float, float, str, bool]
    assert groups[1]["weight_decay"] == value
    optimizer.step()


# --------------------------------------------------------------------------------------------------------- checkpoints

OTHERS = ["Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "ASGD", "Rprop", "Adamax", "NAdam", "RAdam", "LBFGS"]


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("kind", OTHERS)
def test_checkpoints_of_other_optimizers_are_refused_by_their_keys(kind: str, steps: int) -> None:
    other = getattr(torch.optim, kind)([parameter()], lr=0.001)
    for _ in range(steps):
        other.step(lambda: torch.zeros(()))
    ours = LARS([parameter()], lr=0.1, momentum=0.9)
    ours.step()
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(ValueError, match=r"state_dict must be of LARS or SGD; got one with '") as caught:
        ours.load_state_dict(other.state_dict())
    assert len(str(caught.value)) <= 500
    assert ours.state_dict()["param_groups"] == before["param_groups"]
    assert torch.equal(ours.state_dict()["state"][0]["momentum_buffer"], before["state"][0]["momentum_buffer"])


def test_the_keys_of_adam_are_named() -> None:
    other = torch.optim.Adam([parameter()])
    other.step()
    with pytest.raises(ValueError, match=r"'amsgrad', 'betas', .*'exp_avg', 'exp_avg_sq', 'step'"):
        LARS([parameter()], lr=0.1).load_state_dict(other.state_dict())


def loaded(group: dict[str, Any], state: dict[str, Any]) -> Any:
    ours = LARS([parameter()], lr=0.1, momentum=0.9)
    saved = {"params": [0], "lr": 0.25, "momentum": 0.5, "weight_decay": 0.125, **group}
    ours.load_state_dict({"state": {0: state}, "param_groups": [saved]})
    ours.step()
    return ours


# The groups of FAIR's (Barlow Twins, VICReg, MoCo v3, MAE), of solo-learn, mmselfsup, ROCm's apex and timm.
PEERS = {
    "fair": (
        {"eta": 0.002, "weight_decay_filter": None, "lars_adaptation_filter": False},
        {"trust_coefficient": 0.002},
    ),
    "solo": (
        {"eta": 0.002, "clip_lr": True, "exclude_bias_n_norm": False},
        {"trust_coefficient": 0.002, "trust_clip": True},
    ),
    "mmselfsup": ({"eta": 0.002, "lars_exclude": True}, {"trust_coefficient": 0.002, "adapt": False}),
    "rocm": ({"is_skipped": False, "trust_coefficient": 0.002}, {"trust_coefficient": 0.002, "adapt": True}),
    "timm": ({"trust_coeff": 0.002, "always_adapt": True}, {"trust_coefficient": 0.002, "always_adapt": True}),
    "nus": ({"eeta": 0.002, "epsilon": 0.5}, {"trust_coefficient": 0.002, "eps": 0.5}),
}


@pytest.mark.parametrize("peer", PEERS)
def test_groups_of_other_lars_are_translated(peer: str) -> None:
    theirs, ours = PEERS[peer]
    optimizer = loaded(theirs, {"mu" if peer == "fair" else "momentum_buffer": torch.full((3,), 2.0)})
    group = optimizer.param_groups[0]
    assert {key: group[key] for key in ours} == ours and (group["lr"], group["momentum"]) == (0.25, 0.5)
    assert not set(theirs) - set(ours) & set(group) - {"always_adapt"}
    (own,) = optimizer.state.values()
    assert own.keys() == {"momentum_buffer"} and (own["momentum_buffer"] > 1).all()  # half of 2, and the gradient


@pytest.mark.parametrize("key", ["exclude_bias_n_norm", "weight_decay_filter", "lars_adaptation_filter"])
def test_exclusions_by_shape_in_a_checkpoint_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown hyper-parameter '{key}'; use param_groups\("):
        loaded({"eta": 0.002, key: True}, {})


def test_what_a_wrapper_keeps_in_our_state_is_loaded() -> None:
    optimizer = LARS([parameter()], lr=0.1, momentum=0.9)
    optimizer.step()
    (own,) = optimizer.state.values()
    own["slow_buffer"] = torch.full((3,), 5.0)
    other = LARS([parameter()], lr=0.1)
    other.load_state_dict(optimizer.state_dict())
    other.step()
    assert (next(iter(other.state.values()))["slow_buffer"] == 5.0).all()


@pytest.mark.parametrize("given", [None, [], {}, {"weight": torch.ones(3)}, {"state": {}}], ids=repr)
def test_what_is_no_checkpoint(given: Any) -> None:
    with pytest.raises(TypeError, match="state_dict must be a mapping with the keys 'state' and 'param_groups'; got"):
        LARS([parameter()], lr=0.1).load_state_dict(given)


# --------------------------------------------------------------------------------------------------------------- names


def named(*names: str, groups: int = 1) -> tuple[dict[str, Any], LARS]:
    params = {name: torch.nn.Parameter(torch.full((3,), float(ord(name[-1])))) for name in names}
    pairs = list(params.items())
    each = [{"params": pairs[k::groups], "lr": 0.1 * (k + 1)} for k in range(groups)]
    return params, LARS(each, momentum=0.9)


@pytest.mark.parametrize("groups", [1, 2])
def test_states_go_by_name(groups: int) -> None:
    params, first = named("a", "b", "c", "d", groups=groups)
    for k, p in enumerate(params.values()):
        p.grad = torch.full((3,), float(k))
    first.step()
    others, second = named("d", "c", "b", "a", groups=groups)
    second.load_state_dict(first.state_dict())
    for name in params:
        assert torch.equal(second.state[others[name]]["momentum_buffer"], first.state[params[name]]["momentum_buffer"])
    assert [group["lr"] for group in second.param_groups] == [0.1, 0.2][:groups]
    assert second.param_groups[0]["param_names"][0] == "d"


def test_a_checkpoint_of_lars_array_goes_by_name() -> None:
    import lars_array

    near = lars_array.LARS({"a": np.ones(3), "b": np.ones(3)}, lr=0.1, momentum=0.9)
    near.step({"a": np.full(3, 1.0), "b": np.full(3, 2.0)})
    params = {name: torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for name in ("b", "a")}
    far = LARS(list(params.items()), lr=0.1)
    far.load_state_dict(near.state_dict())
    assert [float(far.state[params[name]]["momentum_buffer"][0]) for name in ("a", "b")] == [1.0, 2.0]


def test_names_that_are_not_the_same() -> None:
    _, first = named("a", "b")
    _, second = named("a", "c")
    with pytest.raises(ValueError, match="same parameters by name; 'b' is missing in the optimizer"):
        second.load_state_dict(first.state_dict())
    _, prefixed = named("module.a", "module.b")  # nothing to go by: torch's order
    prefixed.load_state_dict(first.state_dict())


def test_names_may_repeat_as_in_torch() -> None:
    def pair() -> Any:
        return [
            {"params": [("w", parameter()), ("b", parameter(2))]},
            {"params": [("w", parameter()), ("c", parameter(4))]},
        ]

    optimizer = LARS(pair(), lr=0.1, momentum=0.9, weight_decay=0.1)
    optimizer.step()
    assert list(optimizer.norms()) == ["w (0)", "b", "w (2)", "c"] == list(optimizer.trust_ratios())
    other = LARS(pair(), lr=0.2)
    other.load_state_dict(optimizer.state_dict())
    other.step()
    optimizer.param_groups[1]["params"][0].grad = torch.ones(3).to_sparse()
    with pytest.raises(TypeError, match=r"the gradient of 'w \(2\)' must be dense.*\(parameter group 1, step 2\)"):
        optimizer.step()
    with pytest.raises(ValueError, match="layer_of needs different names; 'w' is the name of 2 parameters"):
        LARS(pair(), lr=0.1, layer_of=lambda name: name)
