"""One file moves between NumPy, CuPy, torch and JAX: parameters, float32 buffers and masters bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import array_api_strict
import cuda_on_cpu
import ml_dtypes
import numpy as np
import pytest
from assertions import assert_close, assert_same
from references import gaussian

import lars_array

jax = pytest.importorskip("jax")
torch = pytest.importorskip("torch")
import lars_jax  # noqa: E402
import lars_torch  # noqa: E402

OPTIONS: dict[str, Any] = {"lr": 0.25, "momentum": 0.9, "weight_decay": 0.1, "master_weights": True, "rule": "nvidia"}
OPTIONS["nonfinite"] = "propagate"
TYPES = {"w": np.float32, "half": np.float16, "brain": ml_dtypes.bfloat16, "bias": np.float32}
SHAPES = {"w": (5, 3), "half": (4, 2), "brain": (7,), "bias": ()}


def arrays(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(gaussian(rng, SHAPES[name], "f8").astype(kind)) for name, kind in TYPES.items()}


class OnNumPy:
    """An optimizer and its parameters, all given and returned as NumPy arrays."""

    def put(self, x: Any) -> Any:
        return x.copy()

    def host(self, x: Any) -> Any:
        return np.array(x)

    def __init__(self, params: dict[str, Any], **options: Any) -> None:
        self.params = {name: self.put(p) for name, p in params.items()}
        self.optimizer = lars_array.LARS(self.params, **options)

    def step(self, grads: dict[str, Any]) -> None:
        self.optimizer.step({name: self.put(g) for name, g in grads.items()})

    def save(self, path: Path) -> None:
        lars_array.save(path, self.optimizer, params=self.params)

    def load(self, path: Path) -> None:
        lars_array.load(path, self.optimizer, params=self.params)

    def state(self) -> Any:
        return self.optimizer.state_views()

    def seen(self) -> dict[str, Any]:
        """Return parameters, buffers and masters by name."""
        self.optimizer.synchronize()
        kept = ("momentum_buffer", "master")
        state = {f"{k} {name}": self.host(x) for name, own in self.state().items() for k, x in own.items() if k in kept}
        return {name: self.host(p) for name, p in self.params.items()} | state


class OnCuPy(OnNumPy):
    def put(self, x: Any) -> Any:
        import cupy

        return cupy.asarray(x)

    def host(self, x: Any) -> Any:
        return x.get()


class OnFar(OnNumPy):
    """The CUDA kernel on the CPU."""

    def put(self, x: Any) -> Any:
        return cuda_on_cpu.far(x)


class OnTorch(OnNumPy):
    def __init__(self, params: dict[str, Any], **options: Any) -> None:
        self.params = {name: torch.nn.Parameter(self.put(p)) for name, p in params.items()}
        self.optimizer: Any = lars_torch.LARS(self.params.values(), **options)

    def put(self, x: Any) -> Any:
        if x.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(x.copy().view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(x.copy())

    def host(self, x: Any) -> Any:
        x = x.detach()
        return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy().copy()

    def step(self, grads: dict[str, Any]) -> None:
        for name, p in self.params.items():
            p.grad = self.put(grads[name])
        self.optimizer.step()

    def save(self, path: Path) -> None:
        lars_torch.save(path, self.optimizer, params=self.params)

    def load(self, path: Path) -> None:
        lars_torch.load(path, self.optimizer, params=self.params)

    def seen(self) -> dict[str, Any]:
        found = {name: self.host(p) for name, p in self.params.items()}
        for name, p in self.params.items():
            own = self.optimizer.state.get(p, {})
            found |= {f"{kind} {name}": self.host(own[kind]) for kind in ("momentum_buffer", "master") if kind in own}
        return found


class OnJax(OnNumPy):
    def __init__(self, params: dict[str, Any], **options: Any) -> None:
        self.optimizer: Any = lars_jax.LARS({name: self.put(p) for name, p in params.items()}, **options)

    def put(self, x: Any) -> Any:
        return jax.numpy.asarray(x)

    @property
    def params(self) -> Any:
        return self.optimizer.params

    @params.setter
    def params(self, value: Any) -> None:
        raise AttributeError

    def save(self, path: Path) -> None:
        lars_jax.save(path, self.optimizer)

    def load(self, path: Path) -> None:
        lars_jax.load(path, self.optimizer)

    def step(self, grads: dict[str, Any]) -> None:
        self.optimizer.step({name: self.put(g) for name, g in grads.items()})

    def state(self) -> Any:
        return self.optimizer.state_dict()["state"]


FRAMEWORKS: dict[str, Any] = {"numpy": OnNumPy, "torch": OnTorch, "jax": OnJax, "far": OnFar, "cupy": OnCuPy}
GPU = [pytest.mark.gpu]
PAIRS = [
    pytest.param(one, two, marks=GPU if "cupy" in (one, two) else [], id=f"{one}-{two}")
    for one, two in product(FRAMEWORKS, FRAMEWORKS)
    if not {"cupy", "far"} <= {one, two}  # one has the kernel of the other
]


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[None]:
    if "far" not in request.node.callspec.params.values():
        yield
        return
    if reason := cuda_on_cpu.missing():
        pytest.skip(reason)
    with cuda_on_cpu.pretended():
        yield


@pytest.mark.parametrize(("one", "two"), PAIRS)
@pytest.mark.usefixtures("device")
def test_a_file_moves(tmp_path: Path, one: str, two: str) -> None:
    params, grads = arrays(0), [arrays(1 + k) for k in range(5)]
    order = list(params) if one != two else list(params)[::-1]  # which may be another where it is loaded
    source = FRAMEWORKS[one](params, **OPTIONS)
    for g in grads[:3]:
        source.step(g)
    before = source.seen()
    assert {"master half", "master brain", "momentum_buffer half"} <= before.keys()
    source.save(tmp_path / "run")
    assert_same(source.seen(), before)
    blank = {name: np.zeros_like(params[name]) for name in order}
    target = FRAMEWORKS[two](blank, **OPTIONS | {"lr": 7.0, "momentum": 0.1, "weight_decay": 0.0})
    target.load(tmp_path / "run")
    assert_same(dict(sorted(target.seen().items())), dict(sorted(before.items())))
    assert target.optimizer.steps == 3
    for g in grads[3:]:
        source.step(g)
        target.step({name: g[name] for name in order})
    if {one, two} & {"far", "cupy"} and one != two:
        after = source.seen()
        for name, x in target.seen().items():
            half = x.dtype.itemsize == 2
            assert_close(x.astype(np.float64), after[name].astype(np.float64), 2e-2 if half else 1e-6)
    else:
        assert_same(dict(sorted(target.seen().items())), dict(sorted(source.seen().items())))


@pytest.mark.parametrize(("one", "two"), [*product(["numpy", "torch", "jax"], repeat=2)])
def test_a_file_that_was_moved_twice_is_the_same(tmp_path: Path, one: str, two: str) -> None:
    source, target, last = (FRAMEWORKS[name](arrays(0), **OPTIONS) for name in (one, two, one))
    source.step(arrays(1))
    source.save(tmp_path / "one")
    target.load(tmp_path / "one")
    target.save(tmp_path / "two")
    last.load(tmp_path / "two")
    assert_same(last.seen(), source.seen())
    first, second = lars_array.load(tmp_path / "one"), lars_array.load(tmp_path / "two")
    assert_same(dict(sorted(second.params.items())), dict(sorted(first.params.items())))
    by_name = [dict(sorted(saved.state["state"].items())) for saved in (first, second)]
    for state in by_name:
        for own in state.values():
            own["previous_lr"] = np.float32(own["previous_lr"])
    assert_same(*([{n: dict(sorted(own.items())) for n, own in state.items()} for state in by_name]))


@pytest.mark.parametrize("library", ["strict", "torch"])
def test_arrays_of_other_libraries_in_the_portable_kernel(tmp_path: Path, library: str) -> None:
    xp = {"strict": array_api_strict, "torch": torch}[library]
    names = ("w", "bias") if library == "strict" else ("w", "bias", "half")  # of those that it has
    params = {name: xp.asarray(arrays(0)[name].copy()) for name in names}
    optimizer = lars_array.LARS(params, **OPTIONS)
    optimizer.step({name: xp.asarray(arrays(1)[name]) for name in names})
    lars_array.save(tmp_path / "run", optimizer, params=params)
    others = {name: xp.zeros_like(p) for name, p in params.items()}
    resumed = lars_array.LARS(others, lr=1.0)
    lars_array.load(tmp_path / "run", resumed, params=others)
    assert_same(others, params)
    assert_same(resumed.state_views(), optimizer.state_views())


def test_complex_and_double_precision(tmp_path: Path) -> None:
    kinds = {"c": np.complex64, "z": np.complex128, "d": np.float64}
    options = OPTIONS | {"master_weights": False}
    params = {name: gaussian(np.random.default_rng(0), (4, 3), np.dtype(kind)) for name, kind in kinds.items()}
    with jax.enable_x64(True):
        for one, two in product(["numpy", "torch", "jax"], repeat=2):
            source = FRAMEWORKS[one](params, **options)
            source.step(params)
            source.save(tmp_path / "run")
            target = FRAMEWORKS[two]({name: np.zeros_like(p) for name, p in params.items()}, **options)
            target.load(tmp_path / "run")
            source.step(params)
            target.step(params)
            assert_same(target.seen(), source.seen())
