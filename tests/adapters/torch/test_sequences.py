"""Whatever users do to parameters, gradients, groups and state between steps: beside torch's SGD."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule
from torch.nn import Parameter

from lars_torch import LARS


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _transposed(x: torch.Tensor) -> torch.Tensor:
    return x.mT.contiguous().mT if x.ndim > 1 else x.clone()


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x.clone()


def _window(x: torch.Tensor) -> torch.Tensor:
    """Return a part of something larger."""
    larger = x.new_zeros([n + 2 for n in x.shape])
    return larger[tuple(slice(1, n + 1) for n in x.shape)].copy_(x) if x.ndim else larger.copy_(x)


LAYOUTS: list[Callable[[torch.Tensor], torch.Tensor]] = [_dense, _transposed, _channels_last, _window]
SHAPES = [(), (0,), (1,), (5,), (3, 4), (2, 3, 4), (2, 3, 2, 2), (0, 3)]
layouts, seeds, some = st.sampled_from(LAYOUTS), st.integers(0, 2**31), st.integers(0, 2**31)


class Beside(RuleBasedStateMachine):
    """Two optimizers on equal parameters; each operation is done to both."""

    def __init__(self) -> None:
        super().__init__()
        options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
        self.ours, self.theirs = self.new_group([(5,), (2, 3)], 0, _dense)
        self.lars = LARS([{"params": list(self.ours)}], **options, adapt=False)
        self.sgd = torch.optim.SGD([{"params": list(self.theirs)}], **options)

    def new_group(self, shapes: list[tuple[int, ...]], seed: int, arrange: Any) -> tuple[list[Any], list[Any]]:
        generator = torch.Generator().manual_seed(seed)
        tensors = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
        return [Parameter(arrange(x)) for x in tensors], [Parameter(x.clone()) for x in tensors]

    def both(self) -> list[tuple[Any, list[Any]]]:
        return [(self.lars, self.ours), (self.sgd, self.theirs)]

    # ---------------------------------------------------------------------------------------- steps and gradients

    @rule(seed=seeds, arrange=layouts, missing=some)
    def new_gradients(self, seed: int, arrange: Any, missing: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for i, (p, q) in enumerate(zip(self.ours, self.theirs, strict=True)):
            g = torch.randn(q.shape, dtype=torch.float64, generator=generator)
            p.grad, q.grad = (None, None) if missing >> i & 1 else (arrange(g), g)

    @rule()
    def gradients_in_place(self) -> None:
        for _, params in self.both():
            for p in params:
                if p.grad is not None:
                    p.grad.mul_(-0.5).add_(0.1)

    @rule(to_none=st.booleans())
    def zero_grad(self, to_none: bool) -> None:
        for optimizer, _ in self.both():
            optimizer.zero_grad(set_to_none=to_none)

    @rule()
    def step(self) -> None:
        for optimizer, _ in self.both():
            optimizer.step()
        for p, q in zip(self.ours, self.theirs, strict=True):
            assert_close(p, q)
            ours, theirs = (known(optimizer, x) for optimizer, x in ((self.lars, p), (self.sgd, q)))
            assert ours.keys() == theirs.keys()
            for key, x in theirs.items():
                assert_close(ours[key], x)

    @rule(seed=seeds, arrange=layouts, missing=some)
    def gradients_and_step(self, seed: int, arrange: Any, missing: int) -> None:
        self.new_gradients(seed, arrange, missing)
        self.step()

    @rule(arrange=layouts)
    def all_gradients_and_step(self, arrange: Any) -> None:
        self.gradients_and_step(len(self.ours), arrange, 0)

    def teardown(self) -> None:
        self.all_gradients_and_step(_dense)

    # ------------------------------------------------------------------------------------------------- parameters

    @rule(arrange=layouts)
    def other_memory(self, arrange: Any) -> None:
        for p in self.ours:
            p.data = arrange(p.data)

    @rule()
    def other_values(self) -> None:
        for _, params in self.both():
            for p in params:
                p.detach().mul_(0.9)

    @rule(frozen=some)
    def freeze(self, frozen: int) -> None:
        for _, params in self.both():
            for i, p in enumerate(params):
                p.requires_grad_(not frozen >> i & 1)

    @rule()
    def other_objects(self) -> None:
        """Put other parameters in the groups' lists, as accelerate does."""
        for optimizer, params in self.both():
            new = {p: Parameter(p.detach().clone()) for p in params}
            for group in optimizer.param_groups:
                group["params"] = [new[p] for p in group["params"]]
            for p, q in new.items():
                if p in optimizer.state:
                    optimizer.state[q] = optimizer.state.pop(p)
            params[:] = new.values()

    # ----------------------------------------------------------------------------------------------------- groups

    @rule(shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3), seed=seeds, arrange=layouts)
    def add_group(self, shapes: list[tuple[int, ...]], seed: int, arrange: Any) -> None:
        for (optimizer, params), new in zip(self.both(), self.new_group(shapes, seed, arrange)):
            optimizer.add_param_group({"params": new})
            params += new

    @rule(which=some)
    def remove_group(self, which: int) -> None:
        for optimizer, params in self.both():
            if len(optimizer.param_groups) > 1:
                for p in optimizer.param_groups.pop(which % len(optimizer.param_groups))["params"]:
                    optimizer.state.pop(p, None)
                    del params[next(i for i, q in enumerate(params) if p is q)]

    @rule()
    def turn_groups_round(self) -> None:
        for optimizer, _ in self.both():
            optimizer.param_groups.reverse()

    @rule(
        which=some,
        option=st.sampled_from(
            [
                {"lr": 0.0},
                {"lr": 0.3},
                {"lr": torch.tensor(0.2, dtype=torch.float64)},
                {"momentum": 0.0, "nesterov": False},
                {"momentum": 0.5},
                {"momentum": 0.9, "dampening": 0.0, "nesterov": True},
                {"dampening": 0.3, "nesterov": False},
                {"weight_decay": 0.1},
                {"maximize": True},
                {"maximize": False},
            ]
        ),
    )
    def option(self, which: int, option: dict[str, Any]) -> None:
        for optimizer, _ in self.both():
            optimizer.param_groups[which % len(optimizer.param_groups)].update(option)

    # ------------------------------------------------------------------------------------------------------ state

    @rule()
    def through_a_file(self) -> None:
        for optimizer, _ in self.both():
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            optimizer.load_state_dict(torch.load(file, weights_only=True))

    @rule(ours=st.booleans())
    def from_the_other(self, ours: bool) -> None:
        source, target = (self.sgd, self.lars) if ours else (self.lars, self.sgd)
        target.load_state_dict(copy.deepcopy(source.state_dict()))
        for group in self.lars.param_groups:
            group["adapt"] = False

    @rule(how=st.sampled_from([copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]))
    def copies(self, how: Any) -> None:
        (self.lars, self.ours), (self.sgd, self.theirs) = map(how, self.both())

    @rule(gone=some)
    def forget(self, gone: int) -> None:
        for optimizer, params in self.both():
            for i, p in enumerate(params):
                if gone >> i & 1:
                    optimizer.state.pop(p, None)

    @rule(gone=some)
    def no_buffer(self, gone: int) -> None:
        for optimizer, params in self.both():
            for i, p in enumerate(params):
                if gone >> i & 1 and p in optimizer.state:
                    optimizer.state[p]["momentum_buffer"] = None

    @rule(in_place=st.booleans())
    def other_buffers(self, in_place: bool) -> None:
        for optimizer, params in self.both():
            for p in params:
                for key, v in known(optimizer, p).items():
                    optimizer.state[p][key] = v.mul_(0.5) if in_place else v * 0.5


def known(optimizer: Any, p: Any) -> dict[str, Any]:
    return {key: x for key, x in optimizer.state.get(p, {}).items() if x is not None}


def assert_close(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


TestBeside = Beside.TestCase
TestBeside.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def test_other_objects_in_the_lists_of_groups() -> None:
    both = Beside()
    both.option(0, {"momentum": 0.0})
    both.all_gradients_and_step(_dense)
    both.other_objects()
    both.all_gradients_and_step(_dense)


def test_groups_of_one_size_in_another_order() -> None:
    both = Beside()
    both.add_group([(5,), (2, 3)], 1, _dense)
    both.option(0, {"lr": 0.3})
    both.all_gradients_and_step(_dense)
    both.turn_groups_round()
    both.all_gradients_and_step(_dense)
