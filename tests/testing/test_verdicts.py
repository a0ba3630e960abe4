"""The verdict of the kit on LARS of other packages, where they are installed, and on the adapters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.peers.timm_lars import lars_class
from lars_array.testing import assert_conforms, optax_step, torch_step


def without_vectors(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """pytorch-optimizer leaves layers with one axis to SGD."""
    return {"weight_decay": 0.0, "adapt": False} if len(shape) <= 1 else {}


def assert_verdict(message: str, step: Any, rule: str, **options: Any) -> None:
    """The kit refuses the step, and the first lines of its message are these."""
    with pytest.raises(AssertionError) as caught:
        assert_conforms(step, rule, **options)
    found = str(caught.value)
    assert found.startswith(f"step does not conform to rule {rule!r}; {message}\nthis explains all"), found


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_torch_optimizer_conforms_to_flash(dtype: str) -> None:
    assert_conforms(torch_step(pytest.importorskip("torch_optimizer").LARS), "torch-optimizer", dtype=dtype)


def timm_step() -> Any:
    pytest.importorskip("torch")
    lars = lars_class()  # without timm it raises an error that counts as a skip

    def make(tensors: list[Any], *, trust_coefficient: float, **hyper: Any) -> Any:
        return lars(tensors, trust_coeff=trust_coefficient, **hyper)

    return torch_step(make)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_timm_conforms_to_its_rule(dtype: str) -> None:
    assert_conforms(timm_step(), "timm", dtype=dtype)


def test_timm_decays_at_zero_gradients_where_flash_does_not() -> None:
    message = "wrong weight decay: it still acts where the gradient is zero\nits steps are those of rule 'timm'"
    assert_verdict(message, timm_step(), "flash")


def kozistr_step() -> Any:
    return torch_step(pytest.importorskip("pytorch_optimizer").LARS)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_pytorch_optimizer_conforms_to_kozistr_without_vectors(dtype: str) -> None:
    assert_conforms(kozistr_step(), "kozistr", layer_options=without_vectors, dtype=dtype)


def test_pytorch_optimizer_differs_from_flash_by_its_rule_and_vectors() -> None:
    vectors = "wrong layers with one axis: they are neither decayed nor adapted"
    assert_verdict(vectors, kozistr_step(), "kozistr")
    message = f"its steps are those of rule 'kozistr', but for one thing\n{vectors}"
    assert_verdict(message, kozistr_step(), "flash", options=["dampening", "nesterov"])


@contextlib.contextmanager
def of_optax(x64: bool = True) -> Iterator[Any]:
    lars = pytest.importorskip("optax").lars
    with pytest.importorskip("jax").enable_x64(x64):
        yield optax_step(lars)


def test_optax_conforms_to_its_rule() -> None:
    with of_optax() as step:
        assert_conforms(step, "optax")
    with of_optax(x64=False) as step:
        assert_conforms(step, "optax", dtype="float32")


def test_optax_has_another_ratio_and_buffer_than_flash() -> None:
    with of_optax() as step:
        message = "its steps are those of rule 'optax' or 'simclr', ..."
        assert_verdict(message, step, "flash", options=["eps", "nesterov"])


def test_lars_torch_conforms() -> None:
    assert_conforms(torch_step(pytest.importorskip("lars_torch").LARS), "flash")


def test_lars_jax_conforms() -> None:
    lars = pytest.importorskip("lars_jax").lars
    with pytest.importorskip("jax").enable_x64(True):
        assert_conforms(optax_step(lars), "flash")
