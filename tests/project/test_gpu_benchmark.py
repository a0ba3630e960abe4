"""The GPU's benchmark and ``make gpu``, as far as they go without a GPU."""

from __future__ import annotations

import contextlib
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import cuda_on_cpu
import numpy as np
import pytest

import benchmarks.__main__ as command
from benchmarks import gpu, gpu_contestants, gpu_table
from benchmarks.cases import Case
from benchmarks.contestant import OPTIONS, Contestant, UnavailableError
from benchmarks.gpu_device import Gpu

ROOT = Path(__file__).parents[2]
SMALL = Case("small", lambda: [(7, 3), (5,), (40, 40)], rounds=3)


class NoGpu:
    """Tells made-up times: a step takes a millisecond, the device half of one, and the host alone a quarter."""

    def facts(self) -> dict[str, Any]:
        facts = {
            "name": "NVIDIA Made-Up 9000 (80 GB)",
            "compute_capability": "90",
            "multiprocessors": 1,
            "l2_mib": 50.0,
        }
        return facts | {"memory_gib": 80, "driver": 13000, "runtime": 12090}

    def free_bytes(self) -> int:
        return 10**9

    def copy_bandwidth(self) -> float:
        return 1e9

    def give_back(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def timed(self, step: Callable[[], object], *, ahead: bool) -> tuple[float, float, float]:
        step()
        return 1e-3, 5e-4, 2.5e-4


def on_the_cpu(params: list[Any], grads: list[Any], *, wrong: bool = False) -> Any:
    from torch_optimizer import LARS

    options = OPTIONS | ({"trust_coefficient": 0.5} if wrong else {})
    return gpu_contestants.torch_run(params, grads, lambda tensors: LARS(tensors, **options), device="cpu")


def absent(params: list[Any], grads: list[Any]) -> Any:
    raise UnavailableError("it is not here")


HERE = [
    Contestant(gpu_contestants.REFERENCE, on_the_cpu, float32_norms=True),
    Contestant("wrong", partial(on_the_cpu, wrong=True)),
    Contestant("absent", absent),
    Contestant("compiles for hours", absent, most_arrays=2),
]


@pytest.mark.filterwarnings("ignore:.*add_.*:UserWarning")  # torch_optimizer uses a signature of torch that is old
def test_who_is_right_is_timed_and_all_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "GPU", HERE)
    monkeypatch.setattr(gpu, "CASES", {"small": SMALL})
    assert gpu.main(None, None, None, tmp_path, NoGpu()) == 1, "one has failed"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "gpu-nvidia-made-up-9000-80-gb.json",
        "gpu-nvidia-made-up-9000-80-gb.md",
    ]
    document = json.loads((tmp_path / "gpu-nvidia-made-up-9000-80-gb.json").read_text())
    case = document["cases"]["small"]
    assert list(case["contestants"]) == [gpu_contestants.REFERENCE]
    row = case["contestants"][gpu_contestants.REFERENCE]
    assert [row[clock]["median_ms"] for clock in ("host", "device", "queued")] == [1.0, 0.5, 0.25]
    assert row["ratio"]["median"] == 1.0
    assert row["error"] < 1e-4
    assert case["skipped"] == {
        "absent": "it is not here",
        "compiles for hours": "compiling 3 arrays takes too long; the most is 2",
    }
    assert case["failed"]["wrong"].startswith("WrongArithmeticError")
    table = capsys.readouterr().out
    assert "NVIDIA Made-Up 9000" in table
    limit = 1e3 * 7 * 4 * (21 + 5 + 1600) / 1e9
    assert f"| {0.5 / limit:.2f} | 0.250 |" in table
    assert table.strip() == gpu_table.markdown(document).strip()
    monkeypatch.setattr(gpu, "CASES", {"small": SMALL, "other": SMALL})
    monkeypatch.setattr(NoGpu, "copy_bandwidth", lambda self: 2e9)
    gpu.main(["other"], 1, ["absent"], tmp_path, NoGpu())
    added = json.loads((tmp_path / "gpu-nvidia-made-up-9000-80-gb.json").read_text())
    assert list(added["cases"]) == ["small", "other"] and added["copy_bytes_per_s"] == 1e9
    assert added["cases"]["small"] == case
    monkeypatch.setattr(gpu, "commit", lambda: "another")
    gpu.main(["other"], 1, ["absent"], tmp_path, NoGpu())
    assert list(json.loads((tmp_path / "gpu-nvidia-made-up-9000-80-gb.json").read_text())["cases"]) == ["other"]


def test_one_after_the_other_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NoGpu, "free_bytes", lambda self: 40_000)
    case = gpu.measure("small", SMALL, [HERE[0], HERE[0]], 2, NoGpu())
    assert not case["interleaved"]
    monkeypatch.setattr(NoGpu, "free_bytes", lambda self: 10)
    assert gpu.measure("small", SMALL, HERE[:1], 2, NoGpu())["skipped"]


def test_cases() -> None:
    sizes = {name: (len(case.sizes), sum(case.sizes)) for name, case in gpu.CASES.items()}
    assert sizes == {"resnet50": (161, 25_557_032), "vit-l": (296, 304_326_632), "1b": (201, 1_100_048_384)}


def test_names_are_unique() -> None:
    names = [c.name for c in gpu_contestants.GPU]
    assert len(set(names)) == len(names)
    assert {*gpu_contestants.OWN_STREAM, gpu_contestants.REFERENCE} <= set(names)


def test_the_command_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        Gpu()
    except UnavailableError as error:
        assert command.main(["gpu"]) == 2
        assert capsys.readouterr().err == f"nothing can be measured here: {error}\n"
    assert command.main(["gpu", "--list"]) == 0
    assert "1b" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(["gpu", "--case", "tiny"])
    assert "case must be one of resnet50, vit-l, 1b; got 'tiny'" in capsys.readouterr().err


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that ``make gpu`` runs."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "gpu"))
    return importlib.import_module("on_a_gpu")


def test_a_part_that_fails_or_takes_too_long_costs_no_other(
    parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripts = {
        "good": "print('well')",
        "bad": "import sys; sys.exit(3)",
        "long": "import time; print('begun', flush=True); time.sleep(60)",
        "skipped": "import sys; sys.exit(5)",
        "late": "import time; time.sleep(60)",
        "never": "",
    }
    monkeypatch.setattr(parts, "PARTS", dict.fromkeys(scripts, 20) | {"long": 2.0})

    def commands(part: str) -> list[list[str]]:
        if part in ("late", "never"):
            assert json.loads((tmp_path / "parts.json").read_text())["good"] == "passed", "kept by now"
        return [[sys.executable, "-c", scripts[part], *(["pytest"] if part == "skipped" else [])]]

    start = time.monotonic()
    found = parts.run_parts(list(scripts), commands, tmp_path, seconds=6.0)
    assert 6 <= time.monotonic() - start < 15
    assert found == {
        "good": "passed",
        "bad": "failed: 3",
        "long": "stopped, the time was up",
        "skipped": parts.NOTHING,
        "late": "stopped, the time was up",
        "never": "not run, the time was up",
    }
    assert json.loads((tmp_path / "parts.json").read_text()) == found
    assert (tmp_path / "good.log").read_text().endswith("well\n")
    assert (tmp_path / "long.log").read_text().endswith("begun\n"), "what a part has printed stays"
    assert "\nlong: stopped, the time was up\n" in capsys.readouterr().out


def test_parts_are_ten_minutes_and_run_what_is_there(parts: Any) -> None:
    assert sum(seconds for part, seconds in parts.PARTS.items() if part not in parts.OTHERS) <= parts.SECONDS
    assert list(parts.PARTS)[:5] == ["jax", "graphs", "sharding", "one-launch", "resnet50"]
    assert set(parts.MEASURED) == set(gpu.CASES)
    run = {part: parts.commands(part, Path("/out"), ["--rounds", "3"]) for part in parts.PARTS}
    named = {word for commands in run.values() for command in commands for word in command if word.endswith(".py")}
    assert {f"tests/gpu/{path.name}" for path in (ROOT / "tests" / "gpu").glob("test_*.py")} <= named
    assert all((ROOT / name).exists() for name in named)
    assert run["1b"][0][-4:] == ["--out", "/out", "--rounds", "3"]
    assert [command[4] for command in run["sanitizers"]] == ["memcheck", "racecheck"]
    others = {c.name for c in gpu_contestants.GPU if not any(part in c.name for part in parts.CONTESTANTS)}
    assert others == {"timm, foreach", "timm, torch.compile"}


def on_a_gpu(*arguments: str) -> Any:
    command = [sys.executable, "tests/gpu/on_a_gpu.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_make_gpu_says_what_is_missing(parts: Any) -> None:
    done = on_a_gpu("everything")
    assert (done.returncode, done.stderr) == (2, f"parts are {', '.join(parts.PARTS)}; got 'everything'\n")
    try:
        import cupy
    except ImportError:
        expected = "lacks cupy-cuda12x or cupy-cuda13x"
    else:
        if cupy.cuda.is_available():
            return
        expected = "there is no CUDA device"
    done = on_a_gpu("tests")
    assert done.returncode == 2 and expected in done.stderr


def test_files_that_need_a_gpu_are_found_and_need_little_else() -> None:
    """They are collected without most of what other tests need."""
    script = (
        "import sys; sys.path.insert(0, 'tests/gpu'); import on_a_gpu, pytest\n"
        "for name in ('jax', 'optax', 'array_api_strict', 'numba', 'torch_optimizer'): sys.modules[name] = None\n"
        "files = [name for name in on_a_gpu.marked() if name.startswith('tests/gpu/test_')]\n"
        "assert 'tests/gpu/test_kernel.py' in files, files\n"
        "sys.exit(pytest.main(['--collect-only', '-q', '-m', 'gpu', '-p', 'no:cacheprovider', *files]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.filterwarnings("ignore:.*add_.*:UserWarning")
@pytest.mark.parametrize(
    "name", ["lars_torch", "torch_optimizer", "timm, foreach", "torch SGD, fused", "optax, jax.jit"]
)
def test_contestants_compute_what_they_claim(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, where they are the same code."""
    import jax

    devices = jax.devices
    monkeypatch.setattr(jax, "devices", lambda kind=None: devices("cpu"))
    monkeypatch.setattr(gpu_contestants, "torch_run", partial(gpu_contestants.torch_run, device="cpu"))
    (contestant,) = (c for c in gpu_contestants.GPU if c.name == name)
    case = gpu.measure("small", SMALL, [contestant], 1, NoGpu())
    if name in case["skipped"]:
        pytest.skip(case["skipped"][name])
    assert not case["failed"]
    assert case["contestants"][name]["error"] < 1e-4


@pytest.mark.skipif(bool(cuda_on_cpu.missing()), reason=str(cuda_on_cpu.missing()))
@pytest.mark.parametrize("name", [c.name for c in gpu_contestants.GPU if "CuPy" in c.name])
def test_ours_compute_what_they_claim(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a stand-in for CuPy, whose graphs are calls."""
    module: Any = ModuleType("cupy")
    captured: list[Any] = []

    class Stream(contextlib.nullcontext):  # type: ignore[type-arg]
        null = None

        def __init__(self, non_blocking: bool = False) -> None:
            super().__init__()

        def begin_capture(self) -> None:
            device.launches.clear()
            device.launch = lambda *call: captured.append(call)  # type: ignore[method-assign]

        def end_capture(self) -> Any:
            del device.launch
            return SimpleNamespace(launch=lambda stream: [device.launch(*call) for call in captured])

    found = SimpleNamespace(attributes={"L2CacheSize": 20_000}, synchronize=lambda: None)
    module.cuda = SimpleNamespace(Device=lambda: found, Stream=Stream)
    module.array, module.asnumpy, module.ndarray = cuda_on_cpu.far, np.asarray, type(None)
    monkeypatch.setitem(sys.modules, "cupy", module)
    (contestant,) = (c for c in gpu_contestants.GPU if c.name == name)
    with cuda_on_cpu.pretended() as device:
        case = gpu.measure("small", SMALL, [contestant], 1, NoGpu())
    assert not case["failed"] and not case["skipped"]
    assert case["contestants"][name]["error"] < 1e-4
    assert bool(captured) == ("graph" in name)
    assert any(name.startswith("step") for name, _ in device.launches) == ("one launch" in name)
