"""`lars_array.collectives` in one process: calls of MPI and NCCL on stand-ins, and the pieces of flat vectors."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from array_api_compat import is_cupy_array
from assertions import assert_refused, assert_same, fingerprint
from hypothesis import given
from hypothesis import strategies as st

from lars_array import LARS
from lars_array.collectives import flat_pieces, mpi, nccl

IN_PLACE, STREAM = "in place", 7


class Comm:
    """Four processes that hold the same."""

    def __init__(self, add: Callable[[Any], Any] = lambda table: 4 * table) -> None:
        self.add, self.tables = add, list[Any]()

    def Get_size(self) -> int:  # noqa: N802
        return 4

    def Allreduce(self, sent: Any, table: Any) -> None:  # noqa: N802
        assert sent == IN_PLACE and type(table) is np.ndarray
        self.tables.append(table)
        table[...] = self.add(table)


class FarArray:
    """An array on a GPU, of which the host can copy all that its streams have computed."""

    def __init__(self, x: Any) -> None:
        self.there, self.calls, self.size = np.array(x), list[str](), np.size(x)
        self.data = SimpleNamespace(ptr=self.there.ctypes.data)

    def get(self) -> Any:
        self.calls.append("wait and copy here")
        return self.there.copy()

    def set(self, x: Any) -> None:
        self.calls.append("copy there")
        self.there[...] = x


@pytest.fixture(autouse=True)
def mpi4py(monkeypatch: pytest.MonkeyPatch) -> None:
    fake: Any = ModuleType("mpi4py")
    fake.MPI = SimpleNamespace(IN_PLACE=IN_PLACE)
    monkeypatch.setitem(sys.modules, "mpi4py", fake)


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, cuda, communicators = (ModuleType(name) for name in ("cupy", "cupy.cuda", "cupy.cuda.nccl"))
    fake.__dict__.update(ndarray=FarArray, cuda=cuda)
    cuda.__dict__.update(nccl=communicators, get_current_stream=lambda: SimpleNamespace(ptr=STREAM))
    communicators.__dict__.update(NCCL_FLOAT64=8, NCCL_SUM=0)
    for module in (fake, cuda, communicators):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def optimizer_of(all_reduce: Any) -> tuple[Any, LARS]:
    w = np.array([3.0, 4.0])
    return w, LARS({"w": w}, 0.1, 0.9, weight_decay=0.1, all_reduce=all_reduce)


# ----------------------------------------------------------------------------------------------------------- MPI, NCCL


def test_importing_it_loads_neither_mpi4py_nor_cupy() -> None:
    script = "import sys, lars_array.collectives as c; print(c.__all__, {'mpi4py', 'cupy'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout == "['flat_pieces', 'mpi', 'nccl'] set()\n"


def test_mpi_adds_the_table_itself() -> None:
    comm, table = Comm(), np.ones((2, 3))
    all_reduce = mpi(comm)
    assert all_reduce.size == 4
    all_reduce(table)
    assert comm.tables[0] is table
    assert (table == 4).all()


def test_norms_are_those_of_all_processes() -> None:
    w, optimizer = optimizer_of(mpi(Comm()))
    optimizer.step([w.copy()])
    assert optimizer.norms()["w"].parameter == 10


def test_copies_of_an_optimizer_share_the_communicator() -> None:
    comm = Comm()
    w, optimizer = optimizer_of(mpi(comm))
    copy.deepcopy(optimizer).step([w.copy()])
    assert len(comm.tables) == 2
    backend = SimpleNamespace(all_reduce=print)
    assert copy.deepcopy(nccl(backend))._comm is backend


def test_a_pickled_optimizer_has_the_communicator_that_mpi4py_pickles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Comm, "__reduce__", lambda comm: (Comm, ()), raising=False)
    w, optimizer = optimizer_of(mpi(Comm()))
    optimizer.step([w.copy()])
    resumed = pickle.loads(pickle.dumps(optimizer))
    resumed.step([w.copy()])
    assert resumed.norms()["w"].parameter > 9


@pytest.mark.parametrize("add", [lambda table: table, lambda table: 4 * table / 4], ids=["nothing", "mean"])
def test_a_communicator_that_does_not_add_is_refused(add: Any) -> None:
    w, optimizer = optimizer_of(mpi(Comm(add)))
    message = "all_reduce must add over its 4 processes; got a sum over 1"
    assert_refused(lambda: optimizer.step([w.copy()]), RuntimeError, message, w, optimizer)


def test_errors_of_a_communicator_go_through_and_the_next_step_works() -> None:
    calls = iter([1.0, 1.0, ConnectionError("process 2 is gone"), 1.0])

    def add(table: Any) -> Any:
        found = next(calls)
        if isinstance(found, Exception):
            table[...] = np.nan
            raise found
        return 4 * table

    (w, optimizer), (theirs, reference) = optimizer_of(mpi(Comm(add))), optimizer_of(mpi(Comm()))
    for each in (optimizer, reference):
        each.step([np.ones(2)])
    assert_refused(lambda: optimizer.step([np.ones(2)]), ConnectionError, "process 2 is gone", w, optimizer)
    for each in (optimizer, reference):
        each.step([np.ones(2)])
    assert_same([w, optimizer], [theirs, reference])


def test_mpi_adds_arrays_of_cupy_on_the_host_and_waits_once(cupy: None) -> None:
    table = FarArray([[1.0, 2.0, 3.0]])
    assert is_cupy_array(table)
    mpi(Comm())(table)
    assert table.there.tolist() == [[4.0, 8.0, 12.0]]
    assert table.calls == ["wait and copy here", "copy there"]


def test_nccl_adds_in_place_on_the_current_stream(cupy: None) -> None:
    calls: list[Any] = []
    comm = SimpleNamespace(size=lambda: 4, allReduce=lambda *arguments: calls.append(arguments))
    table, all_reduce = FarArray(np.ones((5, 3))), nccl(comm)
    all_reduce(table)
    assert all_reduce.size == 4
    assert calls == [(table.data.ptr, table.data.ptr, 15, 8, 0, STREAM)]
    assert table.calls == []


def test_nccl_takes_the_backend_of_cupyx(cupy: None) -> None:
    calls: list[Any] = []
    backend = SimpleNamespace(_n_devices=4, all_reduce=lambda *arguments: calls.append(arguments))
    table, all_reduce = FarArray(np.ones((5, 3))), nccl(backend)
    all_reduce(table)
    assert all_reduce.size == 4
    assert calls == [(table, table)]
    assert table.calls == []


def test_cupyx_has_what_is_called() -> None:
    distributed = pytest.importorskip("cupyx.distributed")
    signature = inspect.signature(distributed.NCCLBackend.all_reduce)
    defaults = {name: x.default for name, x in signature.parameters.items() if x.default is not x.empty}
    assert list(signature.parameters) == ["self", "in_array", "out_array", "op", "stream"]
    assert defaults == {"op": "sum", "stream": None}
    assert "self._n_devices = n_devices" in inspect.getsource(distributed.NCCLBackend.__mro__[1])


def test_what_is_no_communicator_is_refused() -> None:
    message = "comm must be a communicator of mpi4py, such as MPI.COMM_WORLD; got 3"
    assert_refused(lambda: mpi(3), TypeError, message)
    message = "comm must be an NCCLBackend of cupyx.distributed or an NcclCommunicator of cupy.cuda.nccl; got None"
    assert_refused(lambda: nccl(None), TypeError, message)


# -------------------------------------------------------------------------------------------------------- flat vectors

TABLE = [("weight", 0, 6), ("empty", 6, 0), ("bias", 8, 3)]


def test_pieces_are_views_of_the_buffer() -> None:
    buffer = np.zeros(6)
    pieces = flat_pieces(buffer, 4, TABLE)
    for k, piece in enumerate(pieces.values(), start=1):
        piece += k
    assert {name: piece.tolist() for name, piece in pieces.items()} == {"weight": [1, 1], "empty": [], "bias": [3, 3]}
    assert buffer.tolist() == [1, 1, 0, 0, 3, 3]


def test_a_slice_of_padding_has_all_layers_with_nothing_in_them() -> None:
    for start in (11, 100):
        pieces = flat_pieces(np.zeros(4), start, TABLE)
        assert list(pieces) == ["weight", "empty", "bias"]
        assert not any(map(len, pieces.values()))
    assert not any(map(len, flat_pieces(np.zeros(0), 3, TABLE).values()))


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6)), max_size=6),
    st.lists(st.integers(0, 45), max_size=4),
    st.integers(0, 3),
)
def test_pieces_of_all_slices_are_the_layers(layers: Any, cuts: list[int], padding: int) -> None:
    table, end = [], 0
    for k, (gap, length) in enumerate(layers):
        table.append((f"layer {k}", end + gap, length))
        end += gap + length
    vector = np.arange(end + padding)
    bounds = [0, *sorted(min(cut, len(vector)) for cut in cuts), len(vector)]
    found = [flat_pieces(vector[a:b], a, table) for a, b in pairwise(bounds)]
    for pieces in found:
        assert list(pieces) == [name for name, _, _ in table]
    for name, offset, length in table:
        assert_same(np.concatenate([pieces[name] for pieces in found]), vector[offset : offset + length])


def test_arrays_of_any_library(xp: Any) -> None:
    pieces = flat_pieces(xp.arange(5), 4, TABLE)
    assert [[int(x[i]) for i in range(x.shape[0])] for x in pieces.values()] == [[0, 1], [], [4]]


def test_steps_over_pieces_leave_padding_alone() -> None:
    buffer, grads = np.ones(12), np.full(12, np.nan)
    for piece in flat_pieces(grads, 0, TABLE).values():
        piece[...] = 1
    LARS(flat_pieces(buffer, 0, TABLE), 0.1, weight_decay=0.1).step(flat_pieces(grads, 0, TABLE))
    assert (buffer[[6, 7, 11]] == 1).all()
    assert (buffer[[0, 5, 8, 10]] < 1).all()


BUFFER = np.zeros(4)
ORDER = "the layers of table must be in order and must not overlap"
FORM = "table must hold (layer, offset, length), with a name first; got"
MISFITS: dict[str, tuple[Any, type[Exception], str]] = {
    "a list": (([0.0], 0, TABLE), TypeError, "buffer must be an array; got [0.0]"),
    "two axes": ((np.zeros((2, 3)), 0, TABLE), ValueError, "buffer must have one axis; got shape (2, 3)"),
    "negative start": ((BUFFER, -1, TABLE), ValueError, "start must not be negative; got -1"),
    "start of another type": ((BUFFER, 1.0, TABLE), TypeError, "start must be an integer; got 1.0"),
    "start that is true": ((BUFFER, True, TABLE), TypeError, "start must be an integer; got True"),
    "overlap": (
        (BUFFER, 0, [("a", 0, 3), ("b", 2, 2)]),
        ValueError,
        f"{ORDER}; 'b' begins at 2, and 'a' before it ends at 3",
    ),
    "out of order": (
        (BUFFER, 0, [("a", 5, 1), ("b", 0, 2)]),
        ValueError,
        f"{ORDER}; 'b' begins at 0, and 'a' before it ends at 6",
    ),
    "twice": ((BUFFER, 0, [("a", 0, 1), ("a", 1, 1)]), ValueError, "table must have each layer once; got 'a' twice"),
    "negative offset": (
        (BUFFER, 0, [("a", -1, 3)]),
        ValueError,
        "the offset of 'a' in table must not be negative; got -1",
    ),
    "negative length": (
        (BUFFER, 0, [("a", 0, -3)]),
        ValueError,
        "the length of 'a' in table must not be negative; got -3",
    ),
    "half a length": (
        (BUFFER, 0, [("a", 0, 0.5)]),
        TypeError,
        "the length of 'a' in table must be an integer; got 0.5",
    ),
    "two entries": ((BUFFER, 0, [("a", 3)]), TypeError, f"{FORM} ('a', 3)"),
    "no name": ((BUFFER, 0, [(0, 3, 1)]), TypeError, f"{FORM} (0, 3, 1)"),
    "a mapping": ((BUFFER, 0, {"a": (0, 1)}), TypeError, f"{FORM} 'a'"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_misfits_are_refused(name: str) -> None:
    arguments, kind, message = MISFITS[name]
    assert_refused(lambda: flat_pieces(*arguments), kind, message)


def test_numbers_of_numpy_are_integers_too() -> None:
    table = [("a", np.int64(0), np.int32(3))]
    assert fingerprint(flat_pieces(np.ones(2), np.int64(1), table)) == fingerprint({"a": np.ones(2)})
