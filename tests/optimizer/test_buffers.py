"""New momentum buffers: where they lie."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lars_array import LARS
from lars_array.state.store import ALIGNMENT, CLOSE, LARGE, allocate_buffers


def made(params: list[Any]) -> list[Any]:
    buffers = allocate_buffers(params)
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


def test_they_share_one_block_of_memory() -> None:
    p, q = made([np.ones((2, 3)), np.ones(4)])
    p[1, 2] = 5.0
    assert not q.any()
    assert p.base is q.base and p.base.nbytes > p.nbytes + q.nbytes


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
