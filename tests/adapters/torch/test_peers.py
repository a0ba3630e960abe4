"""A small network trained by our optimizer beside the live classes of other libraries, through the rules of that name.

In float64 both train a copy of the network, each on its own gradients: whatever differs between the optimizers shows in
the gradients that follow. In float32 both are given the gradients of one network, since rounding alone makes trainings
drift apart; and both are held against the other library's class in float64 on the same gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import OneCycleLR

from lars_torch import LARS, param_groups

STEPS = 50
DECAY, PEAK = 1e-3, 0.3
Groups = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for so small a network two only wait for each other
    yield
    torch.set_num_threads(threads)


def network(dtype: torch.dtype) -> nn.Module:
    """Return a network without biases before a norm: their gradients are rounding, which LARS would enlarge."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    ).to(dtype)


def batches(dtype: torch.dtype) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield handwritten digits."""
    from sklearn.datasets import load_digits

    images, digits = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=dtype).reshape(-1, 1, 8, 8) / 16, torch.tensor(digits)
    for step in range(STEPS):
        rows = slice(32 * step, 32 * (step + 1))
        yield x[rows], y[rows]


def torch_optimizer(groups: Groups, **options: Any) -> Any:
    return pytest.importorskip("torch_optimizer").LARS(groups, **options)


def timm(groups: Groups, **options: Any) -> Any:
    from benchmarks.peers.timm_lars import lars_class

    try:
        lars = lars_class()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    return lars(groups, trust_coeff=options.pop("trust_coefficient"), **options)


def pytorch_optimizer(groups: Groups, **options: Any) -> Any:
    del options["eps"]  # it has none
    return pytest.importorskip("pytorch_optimizer").LARS(groups, **options)


def by_module(model: nn.Module) -> Groups:
    return param_groups(model, DECAY)


def together(model: nn.Module) -> Groups:
    return [{"params": list(model.parameters()), "weight_decay": DECAY}]


def by_module_all_adapted(model: nn.Module) -> Groups:
    return param_groups(model, DECAY, no_adapt=None)


def by_ndim(model: nn.Module) -> Groups:
    """The exclusion that pytorch-optimizer has built in."""
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0, "adapt": False},
    ]


Case = tuple[Callable[..., Any], Callable[[nn.Module], Groups], dict[str, Any], dict[str, Any]]
FLASH = {"rule": "torch-optimizer"}
TIMM = {"rule": "timm"}
KOZISTR = {"rule": "kozistr", "eps": 0.0}

# The other class, its parameter groups, what both are given beside lr, and what we are given to be like it.
CASES: dict[str, Case] = {
    "torch_optimizer": (torch_optimizer, by_module, {"momentum": 0.9}, FLASH),
    "torch_optimizer without momentum": (torch_optimizer, by_module, {}, FLASH),
    "torch_optimizer nesterov": (torch_optimizer, together, {"momentum": 0.9, "nesterov": True}, FLASH),
    "torch_optimizer dampening": (torch_optimizer, together, {"momentum": 0.8, "dampening": 0.5}, FLASH),
    "timm": (timm, by_module, {"momentum": 0.9}, TIMM),
    "timm foreach": (timm, by_module, {"momentum": 0.9, "foreach": True}, TIMM),
    "timm trust_clip": (timm, together, {"momentum": 0.9, "trust_clip": True}, TIMM),
    "timm always_adapt": (timm, by_module_all_adapted, {"momentum": 0.9}, TIMM),
    "timm nesterov": (timm, together, {"momentum": 0.9, "nesterov": True}, TIMM),
    "pytorch_optimizer": (pytorch_optimizer, by_ndim, {"momentum": 0.9}, KOZISTR),
    "pytorch_optimizer nesterov": (pytorch_optimizer, by_ndim, {"momentum": 0.9, "nesterov": True}, KOZISTR),
    "pytorch_optimizer dampening": (pytorch_optimizer, by_ndim, {"momentum": 0.9, "dampening": 0.3}, KOZISTR),
}


class Training:
    """A network, an optimizer and a schedule of learning rate and momentum."""

    def __init__(self, dtype: Any, make: Callable[..., Any], grouped: Callable[[nn.Module], Groups], **options: Any):
        self.model = network(dtype)
        options = {"lr": PEAK, "trust_coefficient": 0.1, "eps": 1e-8} | options
        self.optimizer = make(grouped(self.model), **options)
        self.schedule = OneCycleLR(self.optimizer, PEAK, total_steps=STEPS, cycle_momentum="momentum" in options)

    def backward(self, x: torch.Tensor, y: torch.Tensor) -> float:
        self.optimizer.zero_grad()
        loss = cross_entropy(self.model(x), y)
        loss.backward()
        return loss.item()

    def take_gradients(self, model: nn.Module) -> None:
        for p, q in zip(self.model.parameters(), model.parameters(), strict=True):
            p.grad = q.grad.to(p.dtype, copy=True)

    def step(self) -> None:
        self.optimizer.step()
        self.schedule.step()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all that a step writes to."""
        found = {}
        for name, p in self.model.named_parameters():
            found[name] = p.detach()
            found |= {f"{key} of {name}": x for key, x in self.optimizer.state.get(p, {}).items()}
        return found


def assert_close(ours: Training, theirs: Training, tolerance: float) -> None:
    """Compare in the largest difference, relative to the largest entry of each tensor."""
    mine, others = ours.tensors(), theirs.tensors()
    assert mine.keys() == others.keys()
    for name, other in others.items():
        off = (mine[name].double() - other.double()).abs().max()
        assert off <= tolerance * other.abs().max(), f"{name} is off by {off}, where it is {other.abs().max()} at most"


def ours_and_theirs(name: str, dtype: Any) -> tuple[Training, Training]:
    make, grouped, options, own = CASES[name]
    return Training(dtype, LARS, grouped, **options | own), Training(dtype, make, grouped, **options)


@pytest.mark.parametrize("name", CASES)
def test_two_trainings_in_float64_stay_together(name: str) -> None:
    ours, theirs = ours_and_theirs(name, torch.float64)
    losses = []
    for x, y in batches(torch.float64):
        for training in (ours, theirs):
            losses.append(training.backward(x, y))
            training.step()
    assert_close(ours, theirs, 1e-12)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", CASES)
def test_float32_on_the_same_gradients(name: str) -> None:
    ours, theirs = ours_and_theirs(name, torch.float32)
    _, exact = ours_and_theirs(name, torch.float64)
    for x, y in batches(torch.float32):
        theirs.backward(x, y)
        ours.take_gradients(theirs.model)  # before theirs is stepped: pytorch-optimizer writes into its gradients
        exact.take_gradients(theirs.model)
        for training in (ours, theirs, exact):
            training.step()
    assert_close(ours, theirs, 1e-6)
    assert_close(ours, exact, 1e-6)


@pytest.mark.parametrize("wrong", [{"rule": "optax"}, {"rule": "paper"}, {"eps": 1e-6}, {"weight_decay": 0.00101}])
def test_what_differs_is_noticed(wrong: dict[str, Any]) -> None:
    ours, theirs = (Training(torch.float64, make, together, momentum=0.9) for make in (LARS, timm))
    for group in ours.optimizer.param_groups:
        group.update(TIMM | wrong)
    for x, y in batches(torch.float64):
        for training in (ours, theirs):
            training.backward(x, y)
            training.step()
    with pytest.raises(AssertionError, match="off by"):
        assert_close(ours, theirs, 1e-6)
