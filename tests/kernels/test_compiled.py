"""The compiled kernel beyond the numbers: its tasks, its calls, half precision as bits, its cache on disk."""

from __future__ import annotations

import compileall
import contextlib
import functools
import os
import re
import shutil
import subprocess
import sys
import threading
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from references import LAYOUTS, assert_same_bits, gaussian

import lars_array
from lars_array import LARS, RULES, Rule
from lars_array._arrays import ArraySpecs
from lars_array.core import momentum_form
from lars_array.kernels import NUMPY_KERNELS as KERNELS
from lars_array.kernels import choose
from lars_array.kernels import threads as threads_module
from lars_array.kernels.compiled import headers, loops, table
from lars_array.kernels.compiled import kernel as kernel_module
from lars_array.kernels.compiled.intrinsics import array_at, load, stored
from lars_array.kernels.compiled.loops import MEASURE, OWN, PIECE, WHOLE, WRITE
from lars_array.kernels.compiled.tasks import CACHE, LONG, MOST_PARTS, ROOM_FROM, tasks

numba = pytest.importorskip("numba")

AROUND = st.integers(-2, 2).map(lambda k: ROOM_FROM * PIECE + k)
SIZES = st.one_of(st.integers(0, 3000), AROUND, st.integers(0, 40).map(lambda k: k * PIECE))


# ---------------------------------------------------------------------------------------------------------------- tasks


@given(
    sizes=st.lists(SIZES, max_size=400),
    threads=st.integers(1, 9),
    what=st.sampled_from([MEASURE, WRITE, MEASURE | WRITE]),
)
def test_tasks_do_everything_once_and_wait_for_nothing_that_comes_later(
    sizes: list[int], threads: int, what: int
) -> None:
    sizes = sorted(sizes, reverse=True)
    rows = range(len(sizes))
    done: dict[tuple[int, int], set[int]] = {(kind, row): set() for row in rows for kind in (MEASURE, WRITE)}
    for does, row, stop, first, last in tasks(sizes, what, threads).tolist():
        assert row < stop <= len(sizes)
        for r in range(row, stop):
            pieces = -(-sizes[r] // PIECE)
            if last != WHOLE:
                assert pieces >= ROOM_FROM, "there is no room for partial sums of smaller layers"
                assert stop == row + 1
            if first == OWN:  # of as many tasks as there are parts, one takes this part
                assert what == MEASURE | WRITE and does == WRITE
                first = len(done[WRITE, r])
                last = min(first + last, pieces)
            mine = set(range(pieces)) if last == WHOLE else set(range(first, last))
            assert last == WHOLE or 0 <= first < last <= pieces
            for kind in (MEASURE, WRITE):
                if does & kind:
                    assert not mine & done[kind, r], "twice"
                    done[kind, r] |= mine
            if what & MEASURE and does & WRITE:
                assert len(done[MEASURE, r]) == pieces, "written before it is known with what"
    for row, size in enumerate(sizes):
        for kind in (MEASURE, WRITE):
            assert len(done[kind, row]) == (-(-size // PIECE) if what & kind else 0)


def test_layers_too_large_for_a_cache_are_shared() -> None:
    shared = tasks([CACHE // 2 + 1, 1000], MEASURE | WRITE, 2)
    assert {what for what, *_ in shared.tolist()} == {MEASURE, WRITE, MEASURE | WRITE}
    assert tasks([PIECE] * 9, MEASURE | WRITE, 2)[:, 0].tolist() == [MEASURE | WRITE] * 9
    assert len(tasks([100] * 10_000, MEASURE | WRITE, 2)) == 40, "small layers go together"
    assert len(tasks([0] * 1000, WRITE, 2)) == 4


@pytest.mark.parametrize("threads", [1, 2, 7, 64])
@pytest.mark.parametrize("pieces", [5, 36, 600, 100_000])
def test_parts_are_long_but_there_are_enough_for_all_threads(pieces: int, threads: int) -> None:
    ways = tasks([pieces * PIECE], MEASURE, threads)
    parts = np.diff(ways[:, 3:]).ravel() if ways[0, 4] != WHOLE else np.array([pieces])
    assert len(parts) <= MOST_PARTS
    if pieces <= LONG * MOST_PARTS:
        assert parts.max() <= LONG
        assert len(parts) >= min(pieces, 2 * threads)
    assert parts[:-1].tolist() == [parts[0]] * (len(parts) - 1) and parts.sum() == pieces


@given(measured_by=st.lists(st.integers(0, 3), min_size=1, max_size=30), step=st.integers(1, 3), data=st.data())
def test_a_thread_writes_its_own_parts_first_and_every_part_is_written_once(
    measured_by: list[int], step: int, data: st.DataObject
) -> None:
    parts = len(measured_by)
    claimed = np.zeros(parts * step, np.int64)
    own = [np.array([step * i for i, by in enumerate(measured_by) if by == thread], np.int64) for thread in range(4)]
    left, written = [len(mine) for mine in own], []
    for _ in range(parts):
        thread = data.draw(st.integers(0, 3))
        free = [part for part in own[thread][: left[thread]].tolist() if part not in written]
        part, left[thread] = loops._part_to_write(claimed, parts, step, own[thread], left[thread])
        others = [k * step for k in range(parts) if k * step not in written]
        assert part == (free[-1] if free else others[0])
        written.append(part)
    assert sorted(written) == [step * k for k in range(parts)]


# --------------------------------------------------------------------------------------------------- passes over memory

CALLS: list[tuple[dict[str, Any], list[int]]] = [
    ({"nonfinite": "propagate"}, [MEASURE | WRITE]),
    ({"nonfinite": "propagate", "rule": "simclr-popular", "momentum": 0.9}, [MEASURE | WRITE]),
    ({}, [MEASURE, WRITE]),
    ({"nonfinite": "skip", "momentum": 0.9, "nesterov": True}, [MEASURE, WRITE]),
    ({"rule": "barlow"}, [MEASURE, WRITE]),
    ({"max_grad_norm": 0.1, "nonfinite": "propagate"}, [MEASURE, WRITE]),
    # By how much gradients are clipped is known only after the first look.
    ({"rule": "barlow", "max_grad_norm": 0.1}, [MEASURE, MEASURE, WRITE]),
]


@pytest.mark.parametrize(("options", "expected"), CALLS, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_step_is_one_call_a_thread_and_touches_everything_once(
    options: dict[str, Any], expected: list[int], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LARS_ARRAY_THREADS", str(threads))
    calls: list[Any] = []
    params = [np.ones(size, np.float32) for size in (2_000_000, 70_000, 3, 0)]
    optimizer = LARS(params, lr=0.1, weight_decay=0.1, kernel="compiled", **options)
    gradients = [np.ones_like(p) for p in params]
    optimizer.step(gradients)
    monkeypatch.setattr(table, "work", lambda *given: (calls.append(given), loops.work(*given))[1])
    for _ in range(2):
        calls.clear()
        optimizer.step(gradients)
        by_list = {id(arguments[1]): arguments for arguments in calls}  # the cursor: threads of one walk share it
        assert len(calls) <= len(by_list) * threads
        assert len(by_list) == len(expected)
        for what, (todo, _, (places, sizes, *_), *_) in zip(expected, by_list.values(), strict=True):
            assert np.bitwise_or.reduce(todo[:, 0]) == what
            assert [_elements(todo, kind, sizes) for kind in (MEASURE, WRITE)] == [
                2_070_003 if what & kind else 0 for kind in (MEASURE, WRITE)
            ]
            assert set(places[:, 0]) == {p.__array_interface__["data"][0] for p in params}
        calls.clear()
        optimizer.norms(), optimizer.trust_ratios(), optimizer.state_dict()
        assert not calls


def _elements(todo: Any, kind: int, sizes: Any) -> int:
    """Return how many elements are measured or written by a list of tasks."""
    total, parts_of = 0, Counter[int]()
    for _, row, stop, first, last in todo[(todo[:, 0] & kind) != 0].tolist():
        if last == WHOLE:
            total += int(sizes[row:stop].sum())
            continue
        if first == OWN:  # as many such tasks as parts: it does not matter here who takes which
            first, last = parts_of[row] * last, (parts_of[row] + 1) * last
            parts_of[row] += 1
        total += int(min(last * PIECE, sizes[row]) - first * PIECE)
    return total


@pytest.mark.parametrize("rule", RULES)
def test_taking_a_step_at_once_gives_the_bits_of_the_stages(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    shapes = [(ROOM_FROM * PIECE + 5,), (300, 301), (7,), (0,), ()]
    start = [gaussian(rng, shape, "f4") for shape in shapes]
    steps = [[gaussian(rng, shape, "f4") for shape in shapes] for _ in range(3)]
    results = []
    for nonfinite in ("propagate", "raise", "skip"):
        if nonfinite == "skip":
            monkeypatch.delattr(kernel_module.Kernel, "fused")
        params = [p.copy() for p in start]
        decayed = {"params": params[:3], "weight_decay": 0.1, "nesterov": True}
        groups = [decayed, {"params": params[3:], "rule": "flash"}]
        optimizer = LARS(groups, lr=0.3, momentum=0.9, rule=rule, nonfinite=nonfinite, kernel="compiled")
        for gradients in steps:
            optimizer.step(gradients)
        results.append((params, optimizer.norms(), optimizer.trust_ratios()))
    for params, *numbers in results[1:]:
        for ours, theirs in zip(params, results[0][0], strict=True):
            assert_same_bits(ours, theirs, rule)
        assert numbers == [*results[0][1:]]


# ----------------------------------------------------------------------------------------- what lies where, and changes


def test_an_array_of_another_type_or_order_does_not_hold_up_the_others() -> None:
    rng = np.random.default_rng(1)
    layouts = ["C", "Fortran", "strided", "big-endian", "unaligned", "C"]
    dtypes = ["f4", "f8", "f4", "f4", "f4", "f2"]
    start = [gaussian(rng, (30, 40), dtype) for dtype in dtypes]
    results = []
    for kernel in ("compiled", "portable"):
        params = [LAYOUTS[layout](p.copy()) for p, layout in zip(start, layouts, strict=True)]
        params = [p.astype(p.dtype.newbyteorder(">")) if x == "big-endian" else p for p, x in zip(params, layouts)]
        optimizer = LARS(params, 0.1, 0.9, weight_decay=0.1, rule="barlow", kernel=kernel)
        for turn in range(4):  # gradients that lie now like this, now like that
            gradients = [np.full_like(p, 0.1 * (turn + 1)) for p in params]
            if turn % 2:
                gradients[0] = np.asfortranarray(gradients[0])
                gradients[-1] = np.repeat(gradients[-1], 2, axis=1)[:, ::2]
            optimizer.step(gradients)
        results.append([np.array(p, dtype="f8") for p in params])
    for ours, theirs, dtype in zip(*results, dtypes, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3 if dtype == "f2" else 1e-6)


@pytest.mark.parametrize("kernel", ["compiled", "blocked"])
@pytest.mark.parametrize("size", [2, 4, 8, 100_000])
def test_a_parameter_that_was_resized_is_refused(size: int, kernel: str) -> None:
    p = np.ones(200_000 if size == 2 else 4)
    optimizer = LARS([p], lr=0.5, momentum=0.9, kernel=kernel, nonfinite="propagate")
    optimizer.step([np.ones_like(p)])
    p.resize(size, refcheck=False)
    before = p.copy()
    for g in (np.ones(size), np.ones(4), p[:]):
        with (
            pytest.raises(ValueError, match="parameter '0' was modified in place: expected shape")
            if size != 4
            else (pytest.raises(ValueError, match="must") if g.base is p else contextlib.nullcontext())
        ):
            optimizer.step([g])
        if size != 4:
            assert_same_bits(p, before, "refused")
    assert optimizer.steps == (3 if size == 4 else 1)


@pytest.mark.parametrize("kernel", ["compiled", "blocked"])
def test_a_parameter_whose_shape_was_changed_in_place_is_refused(kernel: str) -> None:
    p = np.ones((3, 4))
    optimizer = LARS([p], lr=0.5, momentum=0.9, kernel=kernel)
    optimizer.step([np.ones((3, 4))])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        p.shape = (4, 3)
    with pytest.raises(ValueError, match="parameter '0' was modified in place: expected shape"):
        optimizer.step([np.ones((4, 3))])
    assert p.tolist() == np.full((4, 3), 0.5).tolist()


def test_a_parameter_that_becomes_read_only_is_refused() -> None:
    p = np.ones(4)
    optimizer = LARS([p], lr=0.5, kernel="compiled")
    p.flags.writeable = False
    with pytest.raises(ValueError, match="writable"):
        optimizer.step([np.ones(4)])
    assert p.tolist() == [1.0] * 4


def test_a_gradient_in_a_buffer_or_parameter_is_refused() -> None:
    whole = np.ones(12)
    p, beside = whole[:4], whole[4:8]
    optimizer = LARS([p], lr=0.5, momentum=0.9, kernel="compiled")
    optimizer.step([beside])
    for bad in (whole[3:7], whole[:4], p, optimizer.state_views()["0"]["momentum_buffer"]):
        before = whole.copy()
        with pytest.raises(ValueError, match="must not share memory"):
            optimizer.step([bad])
        assert_same_bits(whole, before, "refused")
    optimizer.step([beside])


# ----------------------------------------------------------------------------------------------- half precision as bits


@numba.njit
def _loaded(bits: Any) -> Any:
    x = np.empty(bits.size, np.float32)
    for i in range(bits.size):
        x[i] = load(bits[i])
    return x


@numba.njit
def _stored(x: Any, like: Any) -> Any:
    bits = np.empty(x.size, like.dtype)
    for i in range(x.size):
        bits[i] = stored(x[i], bits[i])
    return bits


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_precision_is_what_numpy_makes_of_it(name: str) -> None:
    kind, as_bits = {
        "float16": (np.float16, np.uint16),
        "bfloat16": (pytest.importorskip("ml_dtypes").bfloat16, np.int16),
    }[name]
    every = np.arange(1 << 16, dtype=np.uint16)
    wide = every.view(kind).astype(np.float32)
    numbers = ~np.isnan(wide)
    ours = _loaded(every.view(as_bits))
    assert_same_bits(ours[numbers], wide[numbers], name)
    assert np.isnan(ours[~numbers]).all()

    # Each number, the ones halfway to the next, their neighbours, and any others.
    halfway = wide[numbers].astype(np.float64)
    halfway = ((halfway[1:] + halfway[:-1]) / 2).astype(np.float32)
    anything = np.random.default_rng(0).integers(0, 1 << 32, 1 << 18, dtype=np.uint32).view(np.float32)
    nothing = np.float32([np.nan, np.inf, -np.inf, 0.0, -0.0, 3.4e38, -3.4e38, 1e-45])
    x = np.concatenate([wide, halfway, np.nextafter(halfway, np.float32(np.inf)), anything, nothing])
    with np.errstate(all="ignore"):
        want = x.astype(kind)
    ours = _stored(x, np.empty(0, as_bits)).view(kind)
    numbers = ~np.isnan(x)
    assert_same_bits(ours[numbers], want[numbers], name)
    assert np.isnan(ours[~numbers].astype(np.float32)).all()


def test_memory_at_an_address() -> None:
    x = np.arange(5, dtype=np.float32)
    for offset in (0, 2):
        y = numba.njit(lambda address, like: array_at(address, 3, like).copy())(x.ctypes.data + 4 * offset, x[:0])
        assert_same_bits(y, x[offset : offset + 3], "array_at")


# -------------------------------------------------------------------------------------- other processes, other machines

STEP = """
import sys, numpy as np
from lars_array import LARS, kernels
p = np.arange(1.0, 4.0)
optimizer = LARS([p], lr=0.5, momentum=0.9, adapt=False)
for _ in range(2):
    optimizer.step([np.ones(3)])
print(type(optimizer._stepper._programs[0]._kernel).__module__.split(".")[2], *p.tolist())
"""


@functools.cache
def usual_output() -> list[str]:
    return output(STEP)


def output(code: str, where: Path | None = None, **environment: str) -> list[str]:
    command, given = [sys.executable, "-W", "error", "-c", code], os.environ | environment
    done = subprocess.run(command, cwd=where, env=given, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.split()


def test_without_numba_the_blocked_kernel_is_taken() -> None:
    missing = "import sys; sys.modules['numba'] = None\n"
    kernel, *values = output(missing + STEP)
    assert kernel == "blocked" and [float(x) for x in values] == pytest.approx([-0.45, 0.55, 1.55])
    report = "from lars_array.kernels import report; print([r for r in report() if not r[1]])"
    assert "pip install 'lars-array[fast]'" in " ".join(output(missing + report))
    forced = missing + "from lars_array import LARS; import numpy as np; LARS([np.ones(3)], lr=1, kernel='compiled')"
    with pytest.raises(subprocess.CalledProcessError) as failure:
        output(forced)
    assert "ValueError: kernel 'compiled' can't be used here: it needs numba" in failure.value.stderr


def test_with_numba_switched_off_the_blocked_kernel_is_taken() -> None:
    assert output(STEP, NUMBA_DISABLE_JIT="1")[0] == "blocked"
    assert usual_output()[0] == "compiled"


def test_where_nothing_can_be_kept_on_disk_it_is_compiled_again(tmp_path: Path) -> None:
    nowhere = "import numba.core.caching as c; c.CacheImpl._locator_classes = []\n"
    full = (
        "import numba.core.caching as c\n"
        "def save(*_): raise OSError(28, 'No space left on device')\n"
        "c.IndexDataCacheFile.save = save\n"
    )
    for trouble in (nowhere, full):
        assert output(trouble + STEP, NUMBA_CACHE_DIR=str(tmp_path)) == usual_output()
        assert not list(tmp_path.rglob("*.nb?"))


LOGGED = """
import logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(name)s %(message)s")
import numba.core.event as event
class Listener(event.Listener):
    on_start = lambda self, found: print("event")
    on_end = lambda self, found: None
event.register("numba:compile", Listener())
"""


def test_the_first_process_says_that_it_compiles_and_the_second_does_not(tmp_path: Path) -> None:
    first, second = (" ".join(output(LOGGED + STEP, NUMBA_CACHE_DIR=str(tmp_path))) for _ in range(2))
    assert "lars_array compiling work with numba, which takes up to a minute, once for these types" in first
    assert re.search(rf"lars_array compiled work in \d+\.\d s, kept in {re.escape(str(tmp_path))}", first)
    assert first.count("compiling work") == first.count("compiled work") == 1 and first.count("event") > 10
    assert "compiling" not in second and "compiled work" not in second and "event" not in second
    assert " ".join(usual_output()) in first and " ".join(usual_output()) in second
    nowhere = "import numba.core.caching as c; c.CacheImpl._locator_classes = []\n"
    assert "s, not kept: no folder is writable, see NUMBA_CACHE_DIR" in " ".join(output(nowhere + LOGGED + STEP))


def test_without_source_files_it_is_compiled_all_the_same(tmp_path: Path) -> None:
    package = Path(lars_array.__file__).parent
    shutil.copytree(package, tmp_path / "lars_array", ignore=shutil.ignore_patterns("__pycache__", "demo"))
    compileall.compile_dir(tmp_path, legacy=True, quiet=1)
    for source in tmp_path.rglob("*.py"):
        source.unlink()
    assert output(STEP, tmp_path, PYTHONPATH=str(tmp_path)) == usual_output()


def test_what_is_kept_on_disk_is_not_used_when_the_equations_change(tmp_path: Path) -> None:
    package = Path(lars_array.__file__).parent
    shutil.copytree(package, tmp_path / "lars_array", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {"PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    before = output(STEP, tmp_path, **environment)
    assert list((tmp_path / "cache").rglob("*.nbc")), "this test is about what is kept"
    core = tmp_path / "lars_array" / "core.py"
    core.write_text(core.read_text().replace("return kappa * v + lam * g", "return -kappa * v - lam * g"))
    after = output(STEP, tmp_path, **environment)
    assert [float(x) + float(y) for x, y in zip(before[1:], after[1:], strict=True)] == pytest.approx([2.0, 4.0, 6.0])


@pytest.mark.parametrize("name", ["compiled", "blocked", "portable"])
def test_the_environment_chooses_a_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LARS_ARRAY_KERNEL", name)
    assert choose([np.ones(3)]) is choose([np.ones(3)], name)
    assert choose([np.ones(3)], "portable").__module__ == "lars_array.kernels.portable", "an argument comes first"


def test_the_environment_is_told_what_it_chooses_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LARS_ARRAY_KERNEL", "fast")
    message = "LARS_ARRAY_KERNEL must be one of compiled, blocked, cuda, portable; got 'fast'"
    with pytest.raises(ValueError, match=message):
        LARS([np.ones(3)], lr=0.1)
    monkeypatch.setenv("LARS_ARRAY_KERNEL", "compiled")
    strict = pytest.importorskip("array_api_strict").ones(3)
    with pytest.raises(ValueError, match="LARS_ARRAY_KERNEL 'compiled' can't be used here: it takes NumPy arrays only"):
        LARS([strict], lr=0.1)


def test_arrays_are_built_as_expected() -> None:
    assert kernel_module._problem() is None
    x, y = np.ones((3, 4))[1:], np.ones(())
    assert headers.addresses([x, y, x]).tolist() == [x.ctypes.data, y.ctypes.data, x.ctypes.data]


def spoilt(how: str, x: Any) -> Any:
    """Return an array that differs from `x` in one thing only that a step depends on."""
    if how == "read-only":
        x = x.copy()
        x.flags.writeable = False
        return x
    if how == "subclass":
        return x.view(np.matrix)
    return {
        "dtype": x.view(np.int32),
        "byte order": x.view(x.dtype.newbyteorder()),
        "shape": np.ones((5, 6), np.float32),
        "axes": x[None],
        "fewer axes": x.reshape(-1),
        "strides": np.asfortranarray(x),
        "unaligned": np.zeros(x.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(x.shape),
        "no array": None,
    }[how]


@pytest.mark.parametrize(
    "how",
    "dtype,byte order,shape,axes,fewer axes,strides,unaligned,read-only,subclass,no array".split(","),
)
@pytest.mark.parametrize("kind", ["compiled", "asked"])
def test_an_array_of_another_type_or_layout_is_noticed(kind: str, how: str) -> None:
    x, y = np.ones((4, 6), np.float32), np.ones(3)
    specs = headers.HeaderSpecs([x, y, x]) if kind == "compiled" else ArraySpecs([x, y, x])
    another = np.zeros((4, 6), np.float32)
    assert specs.addresses([another, y, x]).tolist() == [a.ctypes.data for a in (another, y, x)]
    assert specs.addresses([x, y]) is None
    assert specs.addresses([x, y, spoilt(how, x)]) is None
    assert specs.spans.tolist() == [[0, a.nbytes] for a in (x, y, x)]
    assert [specs.form(i) for i in range(3)] == [(a.dtype, a.shape) for a in (x, y, x)]
    assert specs.same(2, another)
    if how not in ("subclass", "no array"):  # an array does not become one of these in place
        assert not specs.same(2, spoilt(how, x))


def test_spans_reach_as_far_as_strides_do() -> None:
    x = np.zeros((4, 6), np.float32)
    arrays = [x, x[:, ::2], x[::-1], x.T, x[:0], x[1:2, 3:4], np.zeros(())]
    expected = [[0, 96], [0, 3 * 24 + 2 * 8 + 4], [-72, 24], [0, 96], [0, 0], [0, 4], [0, 8]]
    for specs in (headers.HeaderSpecs(arrays), ArraySpecs(arrays)):
        assert specs.spans.tolist() == expected


# ---------------------------------------------------------------------------------------- nothing by halves, in threads


def test_several_types_are_compiled_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [np.ones(3, np.float32), np.ones(3)]
    optimizer = LARS(params, lr=0.5, kernel="compiled", nonfinite="propagate")

    compiled_for = table._likes

    def fails(*types: Any) -> Any:
        if types[0] == np.float64:
            raise KeyboardInterrupt
        return compiled_for(*types)

    monkeypatch.setattr(table, "_likes", fails)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step([np.ones_like(p) for p in params])
    monkeypatch.undo()
    assert [p.tolist() for p in params] == [[1.0] * 3] * 2 and optimizer.steps == 0
    optimizer.step([np.ones_like(p) for p in params])
    assert [p.tolist() for p in params] == [[0.5] * 3] * 2


@pytest.mark.parametrize("kernel", ["compiled", "blocked"])
def test_without_threads_one_does_it_all(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setenv("LARS_ARRAY_THREADS", "3")
    monkeypatch.setattr(threads_module, "_pool", threads_module.ThreadPool())
    monkeypatch.setattr(threading.Thread, "start", fails)
    p = np.ones(3_000_000, np.float32)
    LARS([p], lr=0.5, kernel=kernel).step([np.ones_like(p)])
    assert np.all(p == 0.5)


def test_the_third_sum_repeats_the_second_where_no_rule_reads_it() -> None:
    rule = Rule(lambda S, h, xp: momentum_form(S[:, 2], h.lr, h.weight_decay, h, xp), norm_of="gradient")
    results = []
    for kernel in KERNELS:
        p = np.ones(3)
        LARS([p], 0.1, rule=rule, rescale_grad=0.5, kernel=kernel).step([np.ones(3)])
        results.append(p.tolist())
    assert results == [pytest.approx([0.85] * 3)] * len(KERNELS)
    p = np.ones(3)
    LARS([p], 0.1, adapt=False, rescale_grad=1e160, kernel="compiled").step([np.full(3, 1e-160)])
    assert p.tolist() == pytest.approx([0.9] * 3)
