"""The CUDA kernels, compiled by g++ and run on the CPU: what they compute, whatever lies where."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import cuda_on_cpu
import ml_dtypes
import numpy as np
import pytest
from assertions import assert_same, fingerprint
from cuda_on_cpu import PAIRS, THREADS, far, gradients, kernel_of
from golden_cases import call_of
from golden_runs import POSITIVE, assert_reproduces, run_in_place
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lars_array import RULES, core
from lars_array.core import Hyper, Rule, resolve
from lars_array.hyperparams import at_step, inputs_of
from lars_array.kernels.cuda import tables
from lars_array.kernels.cuda.source import STRUCTURES, pair_name
from lars_array.nonfinite import CAUSES, GRADIENT
from lars_array.state.device import DeviceState
from lars_array.state.device_rows import DeviceRows

pytestmark = pytest.mark.skipif(bool(cuda_on_cpu.missing()), reason=str(cuda_on_cpu.missing()))

TYPES = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
COMPUTED = {"float64": np.float64, "float32": np.float32, "float16": np.float32, "bfloat16": np.float32}
PIECE_LENGTH = 4 * THREADS + 4 * 7  # a whole round of all threads, and one of some


@pytest.fixture(scope="module", autouse=True)
def small_pieces() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "PIECE_LENGTH", PIECE_LENGTH)
        yield


@pytest.fixture(scope="module", params=[0, 1, 2], ids=["forwards", "backwards", "rotated"])
def device(request: pytest.FixtureRequest) -> Iterator[cuda_on_cpu.Device]:
    with cuda_on_cpu.pretended(order=request.param) as found:
        yield found


def drawn(rng: np.random.Generator, size: int, dtype: Any, offset: int = 0) -> Any:
    """Return random numbers that begin `offset` elements behind an aligned place, between others that must stay."""
    memory = np.full(size + offset + 9, 77, dtype)
    begin = -memory.__array_interface__["data"][0] % 16 // memory.itemsize + offset
    x = memory[begin : begin + size].view(cuda_on_cpu.FarArray)
    x[...] = (rng.standard_normal(size) * 10.0 ** rng.integers(-3, 3)).astype(dtype)
    return x


def surroundings(x: Any) -> bytes:
    """Return what lies around such an array."""
    memory, begin = x.base, (x.__array_interface__["data"][0] - x.base.__array_interface__["data"][0]) // x.itemsize
    return bytes(memory[:begin].tobytes() + memory[begin + x.size :].tobytes())


class Layer:
    """Arrays of one layer, and how much each is out of line."""

    def __init__(self, seed: int, size: int, pair: tuple[str, str], *, buffered: bool, mastered: bool) -> None:
        rng = np.random.default_rng(seed)
        kind = COMPUTED[pair[0]]
        self.p = drawn(rng, size, TYPES[pair[0]], rng.integers(0, 5))
        self.g = drawn(rng, size, TYPES[pair[1]], rng.integers(0, 5))
        self.v = drawn(rng, size, kind, rng.integers(0, 5)) if buffered else None
        self.master = None
        if mastered and pair[0] in ("float16", "bfloat16"):
            self.master = drawn(rng, size, np.float32, rng.integers(0, 5))

    @property
    def read(self) -> Any:
        """What the maths is done on."""
        return self.p if self.master is None else self.master

    @property
    def arrays(self) -> list[Any]:
        return [x for x in (self.p, self.g, self.v, self.master) if x is not None]


@st.composite
def models(draw: Any) -> list[Layer]:
    sizes = st.one_of(
        st.integers(0, 9), st.integers(PIECE_LENGTH - 5, PIECE_LENGTH + 5), st.integers(0, 4 * PIECE_LENGTH)
    )
    one = st.tuples(st.integers(0, 2**31), sizes, st.sampled_from(PAIRS), st.booleans(), st.booleans())
    return [
        Layer(seed, size, pair, buffered=buffered, mastered=mastered)
        for seed, size, pair, buffered, mastered in draw(st.lists(one, min_size=1, max_size=6))
    ]


def kernel_for(layers: list[Layer]) -> Any:
    return kernel_of(*([getattr(layer, name) for layer in layers] for name in ("p", "g", "v", "master")))


def gradients_of(layers: list[Layer]) -> Any:
    return gradients([layer.g for layer in layers])


@settings(max_examples=150)
@given(models(), st.booleans(), st.integers(0, 99))
def test_sums_are_those_of_float64(device: Any, layers: list[Layer], third: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    operand = tuple(rng.standard_normal(len(layers)) for _ in range(3)) if third else None
    before = fingerprint([layer.arrays for layer in layers])
    S = kernel_for(layers).sums(gradients_of(layers), operand)
    assert fingerprint([layer.arrays for layer in layers]) == before
    for i, layer in enumerate(layers):
        p, g = (np.asarray(x, np.float64) for x in (layer.read, layer.g))
        d, size_of_d = g, np.abs(g)
        if operand is not None:
            gamma, w, h = (x[i] for x in operand)
            v = np.zeros(len(p)) if layer.v is None else np.asarray(layer.v, np.float64)
            d, size_of_d = gamma * g + w * p + h * v, abs(gamma * g) + abs(w * p) + abs(h * v)
        for ours, x, size in zip(S[i], (p, g, d), (p, g, size_of_d), strict=True):
            assert abs(ours - np.sum(x**2)) <= 1e-14 * np.sum(size**2)


@settings(max_examples=150)
@given(models(), st.integers(0, 99), st.sampled_from([None, True, False]))
def test_apply_has_the_bits_of_core(device: Any, layers: list[Layer], seed: int, taken: bool | None) -> None:
    C = np.random.default_rng(seed).standard_normal((len(layers), 6))
    around = [[surroundings(x) for x in layer.arrays] for layer in layers]
    untouched = fingerprint([layer.g for layer in layers])
    expected = []
    for layer, c in zip(layers, C, strict=True):
        slope = np.asarray(layer.g).astype(COMPUTED[layer.p.dtype.name])
        wide = np.asarray(layer.read).astype(slope.dtype)
        new, v = core.apply(wide, slope, None if layer.v is None else np.asarray(layer.v), c, xp=np)
        if taken is False:
            new, v = wide, layer.v
        p = np.asarray(layer.p) if taken is False else new.astype(layer.p.dtype)
        expected.append([p, np.asarray(layer.g), *(np.asarray(x) for x in (v,) if x is not None)])
        expected[-1] += [] if layer.master is None else [new if taken is not False else np.asarray(layer.master)]
    kernel_for(layers).apply(gradients_of(layers), far(C), None if taken is None else far(taken))
    assert_same([[np.asarray(x) for x in layer.arrays] for layer in layers], expected)
    assert [[surroundings(x) for x in layer.arrays] for layer in layers] == around
    assert fingerprint([layer.g for layer in layers]) == untouched


def test_sums_depend_on_sizes_alone() -> None:
    """Not on who comes first, and not on where arrays begin."""
    results = []
    for order in (0, 1, 2):
        for offset in (0, 1, 3):
            with cuda_on_cpu.pretended(order=order):
                rng = np.random.default_rng(5)
                arrays = [drawn(rng, 3 * PIECE_LENGTH + 11, np.float32, offset) for _ in range(2)]
                operand = tuple(np.array([x]) for x in (0.3, 0.1, 0.0))
                kernel = kernel_of(arrays[:1], arrays[1:])
                results.append(kernel.sums(gradients(arrays[1:]), operand).tobytes())
    assert len(set(results)) == 1


@pytest.mark.parametrize("threads", [64, 256])
def test_other_numbers_of_threads(threads: int, tmp_path: Any) -> None:
    """256 is what devices get."""
    path = cuda_on_cpu.build(tmp_path, pairs=[("float32", "float32")], THREADS=threads, ROWS=32)
    rng = np.random.default_rng(0)
    arrays = [drawn(rng, size, np.float32) for size in (5, 3 * PIECE_LENGTH + 11)]
    grads = [drawn(rng, x.size, np.float32) for x in arrays]
    with cuda_on_cpu.pretended(path=path) as found, pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(found), "rows", 32)
        S = kernel_of(arrays, grads).sums(gradients(grads))
    for row, p, g in zip(S, arrays, grads, strict=True):
        expected = [np.sum(np.asarray(x, np.float64) ** 2) for x in (p, g, g)]
        np.testing.assert_allclose(np.asarray(row), expected, rtol=1e-14)


# -------------------------------------------------------------------------------------------------------- coefficients


class Step:
    """A step that is queued: what `DeviceRows.step` hands to the kernel."""

    def __init__(self, layers: list[Layer], options: dict[str, Any], *, previous_lr: Any, first: Any) -> None:
        self.layers, self.group, count = layers, at_step(options, 0), len(layers)
        self.state = DeviceState(first, previous_lr, like=far(np.zeros(1)))
        self.state.write([self.group], captured=False)
        keeps, numbers = [layer.v is not None for layer in layers], list(range(count))
        lists = list(map(str, numbers)), [0] * count, numbers, numbers, keeps
        self.rows = DeviceRows(*lists, [], np.zeros(count, int), None, None, far(np.zeros(1)))

    def enqueue(self, found_inf: Any = None) -> Any:
        """Return the sums, coefficients and gradient factors, or None."""
        rules, clips = [resolve(self.group["rule"])], self.group["max_grad_norm"] is not None
        kernel = kernel_for(self.layers)
        given = gradients_of(self.layers), self.rows, rules, [self.group["nonfinite"]], self.state, found_inf
        found = kernel.enqueue(*given, clips=clips)
        return None if found is None else (found[0], kernel._steps[1].C, found[1])


NUMBERS = st.sampled_from([0.0, 1e-30, 1e-4, 0.1, 0.9, 1.0, 3.0, 1e8])
OPTIONS = st.fixed_dictionaries(
    {
        "lr": NUMBERS,
        "momentum": st.sampled_from([0.0, 0.5, 0.9]),
        "dampening": st.sampled_from([0.0, 0.3]),
        "weight_decay": NUMBERS,
        "trust_coefficient": NUMBERS,
        "eps": NUMBERS,
        "rule": st.sampled_from(sorted(RULES)),
        "trust_clip": st.booleans(),
        "trust_bounds": st.sampled_from([None, (0.0, 0.5), (0.1, np.inf)]),
        "always_adapt": st.booleans(),
        "adapt": st.booleans(),
        "maximize": st.booleans(),
        "rescale_grad": st.sampled_from([1.0, 0.125, 0.3]),
        "max_grad_norm": st.sampled_from([None, 1e-3, 1e9]),
    }
)


@settings(max_examples=300)
@given(OPTIONS, st.lists(st.sampled_from(["normal", "zero p", "zero g", "zero", "nan", "inf"]), min_size=1, max_size=9))
@example({"lr": 0.1, "rule": "flash"}, ["normal"] * 20)  # more rows than a block has
def test_coefficients_have_the_bits_of_the_rule(device: Any, options: dict[str, Any], kinds: list[str]) -> None:
    layers = [Layer(i, 3 + i, ("float32", "float32"), buffered=True, mastered=False) for i in range(len(kinds))]
    for layer, kind in zip(layers, kinds, strict=True):
        if kind in ("zero p", "zero"):
            layer.p[...] = 0
        if kind in ("zero g", "zero"):
            layer.g[...] = 0
        if kind in ("nan", "inf"):
            layer.g[0] = float(kind)
    rng = np.random.default_rng(1)
    previous_lr, first = rng.choice([0.0, 0.1, 2.0], len(layers)), rng.integers(0, 2, len(layers)).astype(bool)
    before = [layer.p.copy() for layer in layers]
    step = Step(layers, options | {"nonfinite": "skip"}, previous_lr=previous_lr, first=first)
    S, C, gamma = step.enqueue()
    count = len(layers)
    prepared = inputs_of([step.group], [0] * count, list(first), list(previous_lr), like=S, xp=np)
    with np.errstate(all="ignore"):
        norm = None if not prepared.clips else np.asarray(S)
        expected = core.gradient_factor(prepared.hyper, norm, xp=np)
        np.testing.assert_allclose(np.asarray(gamma), expected, rtol=1e-15)
        theirs = core.coefficients(np.asarray(S), prepared.hyper, prepared.rules, np.asarray(gamma), xp=np)
        operand = core._operand(prepared.hyper, prepared.rules, np.asarray(gamma), np)
        reads_third = any(rule.norm_of != "gradient" for rule in prepared.rules)
        at_first = [np.asarray(layer.v) for layer in layers]
        if reads_third:
            weights = [np.zeros(count) if x is None else x for x in operand]
            for i, layer in enumerate(layers):
                d = weights[0][i] * np.asarray(layer.g, np.float64) + weights[1][i] * np.asarray(before[i], np.float64)
                if weights[2][i] == 0 and np.isfinite(d).all():
                    np.testing.assert_allclose(float(S[i, 2]), np.sum(d**2), rtol=1e-12, atol=1e-300)
    assert len(at_first) == count
    assert_same(np.asarray(C).tobytes(), theirs.tobytes())


def test_coefficients_are_skipped_or_taken_as_one(device: Any) -> None:
    """Verdict, counts, last learning rates and used buffers."""
    layers = [Layer(i, 5, ("float32", "float32"), buffered=i != 1, mastered=False) for i in range(3)]
    options = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1}
    for policy, bad, found in (("skip", False, 0.0), ("skip", True, 0.0), ("raise", True, 0.0), ("raise", True, 1.0)):
        if bad:
            layers[2].g[1] = np.nan
        first, previous_lr = np.ones(3, bool), np.zeros(3)
        given_options = options | {"nonfinite": policy}
        for number in (np.float32(found), np.float64(found), np.float16(found), np.bool_(found)):
            step = Step(layers, given_options, previous_lr=previous_lr, first=first)
            before = fingerprint([layer.arrays for layer in layers])
            step.enqueue(far(number))
            taken = not bad and not found
            assert (fingerprint([layer.arrays for layer in layers]) != before) == taken
            assert_same(np.asarray(step.state.first), np.array([False, True, False] if taken else [True] * 3))
            assert_same(np.asarray(step.state.previous_lr), np.full(3, 0.5 if taken else 0.0))
            rejected = policy == "raise" and not found and bad
            offender = 2 * len(CAUSES) + GRADIENT
            expected = [int(taken), int(not taken and not rejected), int(rejected), offender if rejected else 0]
            assert np.asarray(step.state.counts).tolist() == expected


def test_state_is_that_of_parameters_and_offenders_are_reported_by_row(device: Any) -> None:
    """Two rows of the parameter 3, and one of the parameter 1, in a model of five; the others have no gradient."""
    for broken in (False, True):
        layers = [Layer(i, 5, ("float32", "float32"), buffered=True, mastered=False) for i in range(3)]
        if broken:
            layers[1].g[1] = np.inf
        step = Step(layers, {"lr": 0.5, "momentum": 0.9}, previous_lr=[0.0] * 5, first=[True] * 5)
        lists = ["b", "d[0]", "d[1]"], [0] * 3, [1, 3, 3], [1, 7, 8], [True] * 3
        step.rows = DeviceRows(*lists, [], np.zeros(5, int), None, None, far(np.zeros(1)))
        step.enqueue()
        kept = np.array([False, not broken, False, not broken, False])
        assert_same(np.asarray(step.state.first), ~kept)
        assert_same(np.asarray(step.state.previous_lr), 0.5 * kept)
        offender = 7 * len(CAUSES) + GRADIENT if broken else 0
        assert np.asarray(step.state.counts).tolist() == [int(not broken), 0, int(broken), offender]


def test_a_rule_that_is_no_tape_is_left_to_arrays(device: Any) -> None:
    layers = [Layer(0, 5, ("float32", "float32"), buffered=True, mastered=False)]

    def mean(S: Any, hyper: Hyper, xp: Any) -> Any:
        return RULES["flash"].function(S / xp.mean(S), hyper, xp)

    def long(S: Any, hyper: Hyper, xp: Any) -> Any:
        x = S[:, 0]
        for k in range(200):
            x = x + float(k)
        C = RULES["flash"].function(S, hyper, xp)
        return xp.stack([x, *(C[:, i] for i in range(1, 6))], axis=1)

    for function in (mean, long):
        options = {"lr": 0.1, "rule": Rule(function)}
        step = Step(layers, options, previous_lr=np.zeros(1), first=np.ones(1, bool))
        before = fingerprint([layer.arrays for layer in layers])
        assert step.enqueue() is None
        assert fingerprint([layer.arrays for layer in layers]) == before


@pytest.mark.parametrize("case", POSITIVE, ids=lambda case: case.name)
def test_every_original_is_reproduced(case: Any) -> None:
    call = call_of(case)
    xp = SimpleNamespace(
        asarray=lambda x, dtype=None: far(np.asarray(x, dtype)), float64=np.float64, reshape=np.reshape
    )
    with cuda_on_cpu.pretended() as device:
        trajectory, buffers = run_in_place(case, call, xp, "float64")
    assert_reproduces(case, call, trajectory, buffers, 1e-12)
    assert [name for name, _ in device.launches].count("apply_float64_float64") == len(trajectory)


# ------------------------------------------------------------------------------------------------- types and sizes


def test_half_precision_is_rounded_as_numpy_does() -> None:
    """All float16 numbers, and float32 ones at and around each halfway point, as both half types."""
    whole = np.arange(1 << 16, dtype=np.uint16)
    wide = whole.view(np.float16).astype(np.float32)
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    odd = np.array([0, 1, 2**31, 0x7F800000, 0xFF800000, 0x7F800001, 0x7FC00000, 0x7F7FFFFF, 0x477FEFFF], np.uint32)
    halfway = [(wide.view(np.uint32) + np.uint32(offset)) for offset in (0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000)]
    numbers = np.concatenate([bits, odd, *halfway]).view(np.float32)
    with cuda_on_cpu.pretended():
        for name in ("float16", "bfloat16"):
            p = far(np.zeros(len(numbers), TYPES[name]))
            master, g = far(numbers), far(np.zeros(len(numbers), np.float32))
            kernel_of([p], [g], None, [master]).apply(gradients([g]), far(np.zeros((1, 6))))
            with np.errstate(all="ignore"):
                expected = np.asarray(master).astype(TYPES[name])
            finite = np.isfinite(numbers)  # what is not finite becomes nan: C has zeros
            assert np.isnan(np.asarray(p).astype(np.float32)[~finite]).all()
            assert_same(np.asarray(p)[finite], expected[finite])
            assert_same(np.asarray(master)[finite], numbers[finite])
        every = far(whole.view(np.float16))
        g, v = (far(np.zeros(1 << 16, np.float32)) for _ in range(2))
        kernel_of([every], [g], [v]).apply(gradients([g]), far(np.array([[0, 0, 1.0, 0, 0, 0]])))
        assert_same(np.asarray(v)[~np.isnan(wide)], wide[~np.isnan(wide)] + np.float32(0))  # no -0.0


def test_an_array_of_more_than_two_to_the_31_elements() -> None:
    """Its last piece: memory that nobody has looked at takes no room."""
    size = 2**31 + 2**20 + 5
    try:
        p, g = (np.zeros(size, np.float16).view(cuda_on_cpu.FarArray) for _ in range(2))
    except MemoryError:
        pytest.skip("no address space for it")
    with cuda_on_cpu.pretended() as device:
        found = kernel_of([p], [g])._stage_tables(gradients([g]))
        length = int(tables.piece_lengths(np.array([size]))[0])
        last = int(found.model["piece_count"][0]) - 1
        begin = last * length
        assert 2**31 < begin < size
        p[begin:], g[begin:] = 3, 5
        wrapped = begin - 2**31  # where an index of 32 bits might lead
        p[begin - 1], p[wrapped] = 7, 7
        found.C[...] = [[0, 0, 0, 0, 1, 0]]
        device.launch(pair_name("sums", "float16", "float16"), 1, found.model, last)
        tail = size - begin
        assert_same(np.asarray(found._fields["partial"])[last], np.array([9.0, 25.0, 0.0]) * tail)
        device.launch(pair_name("apply", "float16", "float16"), 1, found.model, last, 1, 0)
        assert_same(np.asarray(p[begin:]), np.full(tail, -2, np.float16))
        assert (p[begin - 1], p[wrapped]) == (7, 7)


def test_complex_numbers_are_pairs_of_real_ones(device: Any) -> None:
    rng = np.random.default_rng(0)
    for dtype in (np.complex64, np.complex128):
        p, g, v = (far((rng.standard_normal(7) + 1j * rng.standard_normal(7)).astype(dtype)) for _ in range(3))
        C = rng.standard_normal((1, 6))
        expected = core.apply(*(np.asarray(x).copy() for x in (p, g, v)), C[0], xp=np)
        kernel = kernel_of([p], [g], [v])
        S = kernel.sums(gradients([g]))
        theirs = core.sums([np.asarray(p)], [np.asarray(g)], [None], xp=np)
        np.testing.assert_allclose(np.asarray(S), theirs, rtol=1e-14)
        kernel.apply(gradients([g]), far(C))
        # NumPy multiplies a complex number by a real one as if that were complex too.
        np.testing.assert_allclose(np.asarray(p), expected[0], rtol=1e-6 if dtype == np.complex64 else 1e-14)
        np.testing.assert_allclose(np.asarray(v), expected[1], rtol=1e-6 if dtype == np.complex64 else 1e-14)


def test_the_structures_have_no_hidden_room() -> None:
    """g++ and NVRTC assert sizes and offsets; here, that the dtypes say what they are about."""
    sizes = {name: dtype.itemsize for name, dtype in STRUCTURES.items()}
    assert (sizes["Array"], sizes["Row"], sizes["Piece"], sizes["Model"]) == (48, 40, 8, 192)
