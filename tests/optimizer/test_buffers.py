"""New momentum buffers: where they lie."""

from __future__ import annotations

import copy
import pickle
import weakref
from typing import Any

import numpy as np
import pytest

from lars_array import LARS
from lars_array.buffers import ALIGNMENT, CLOSE, LARGE, Rows, new_buffers


def made(params: list[Any]) -> list[Any]:
    buffers = new_buffers(params, np)
    for p, v in zip(params, buffers, strict=True):
        assert type(v) is np.ndarray and v.shape == p.shape and not v.any()
    return buffers


def test_they_lie_together_and_apart_from_each_other() -> None:
    params = [np.ones(shape, np.float32) for shape in [(3,), (5, 7), (), (0, 4), (16,)]]
    buffers = made(params)
    places = [v.__array_interface__["data"][0] for v in buffers]
    assert [place % CLOSE for place in places] == [0] * 5
    assert max(places) - min(places) < 5 * 7 * 4 + 5 * CLOSE
    for k, v in enumerate(buffers):
        v[...] = k
    assert [set(v.reshape(-1).tolist()) for v in buffers] == [{0.0}, {1.0}, {2.0}, set(), {4.0}]


def test_large_ones_begin_with_a_line_of_cache() -> None:
    buffers = made([np.ones(shape, np.float32) for shape in [(3,), (LARGE // 4 + 1,), (3,), (50, LARGE)]])
    assert [v.__array_interface__["data"][0] % ALIGNMENT for v in buffers][1::2] == [0, 0]


def test_they_are_made_when_asked_for_and_are_the_same_memory() -> None:
    (p, q) = buffers = made([np.ones((2, 3)), np.ones(4)])
    buffers[0][1, 2] = 5.0
    assert p[1, 2] == 5.0 and not q.any()
    assert not hasattr(buffers[0].base, "dtype") or buffers[0].base.size > p.size  # none keeps memory of its own


def test_rows_hold_what_they_are_given() -> None:
    rows, x = Rows(4), np.ones(3)
    assert list(rows) == [None] * 4 and not rows.present().any()
    rows[1] = x
    rows.put([2, 3], new_buffers([np.ones(2), np.ones((2, 2), order="F")], np))
    assert rows[1] is x and rows[2].shape == (2,) and rows[3].flags.f_contiguous
    assert rows.present().tolist() == [False, True, True, True]
    twin = rows.at([3, 0, 1])
    rows[3][...] = 7
    assert twin[0].tolist() == [[7, 7], [7, 7]] and twin[1] is None and twin[2] is x
    rows[1] = None
    assert rows[1] is None and twin[2] is x
    assert list(rows.at(range(4), where=np.array([True, True, True, False])).present()) == [False, False, True, False]
    longer = rows.extended(2)
    assert len(longer) == 6 and np.shares_memory(longer[3], rows[3]) and longer[5] is None


def test_rows_know_whose_memory_is_where() -> None:
    rows = Rows(5)
    rows.put([0, 2, 3], new_buffers([np.ones(3), np.ones(0), np.ones(5)], np))
    rows[4] = np.ones(2)
    (row, alone), (nobodys, memory) = rows.stretches()
    assert row == 4 and alone is rows[4] and nobodys is None
    places = rows.places(lambda arrays: [x.ctypes.data for x in arrays])
    assert places.tolist() == [rows[0].ctypes.data, 0, rows[2].ctypes.data, rows[3].ctypes.data, rows[4].ctypes.data]
    assert [rows.row_at(memory, rows[i].ctypes.data + 7) for i in (0, 3)] == [0, 3]
    rows[0] = np.ones(3)  # now the rest of that memory may be anybody's
    assert sorted(row for row, _ in rows.stretches()) == [0, 2, 3, 4]


def test_memory_that_no_row_lies_in_is_let_go() -> None:
    rows = Rows(2)
    rows.put([0, 1], new_buffers([np.ones(3), np.ones(3)], np))
    old = weakref.ref(rows[0].base)
    rows.put([0, 1], new_buffers([np.ones(3), np.ones(3)], np))
    assert old() is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda rows: pickle.loads(pickle.dumps(rows))])
def test_copies_of_rows_are_independent(copied: Any) -> None:
    rows = new_buffers([np.ones(3), np.ones((2, 2))], np)
    twin = copied(rows)
    rows[1][...] = 3
    assert not twin[1].any() and twin[1].shape == (2, 2)
    twin[0] = None
    assert rows[0] is not None


def test_they_are_of_the_type_computed_in() -> None:
    kinds = [np.float16, np.float32, np.float64, np.complex64, np.complex128]
    buffers = made([np.ones((2, 3), kind) for kind in kinds])
    assert [v.dtype for v in buffers] == [np.float32, np.float32, np.float64, np.complex64, np.complex128]


@pytest.mark.parametrize("turn", [lambda a: a.T, lambda a: a.transpose(1, 0, 2), lambda a: a[::2, :, ::3]])
def test_they_have_the_order_of_their_parameters(turn: Any) -> None:
    p = turn(np.ones((4, 6, 9), np.float32))
    assert np.argsort(made([p])[0].strides).tolist() == np.argsort(p.strides).tolist()


def test_copies_of_a_state_share_no_memory_with_it() -> None:
    optimizer = LARS([np.ones(3), np.ones(4)], lr=0.1, momentum=0.9)
    optimizer.step([np.ones(3), np.ones(4)])
    state = optimizer.state_dict()["state"]
    before = state["0"]["momentum_buffer"].copy()
    optimizer.step([np.ones(3), np.ones(4)])
    assert np.array_equal(state["0"]["momentum_buffer"], before)
