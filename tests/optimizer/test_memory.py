"""Who may share memory with whom: what is written to may be nobody else's."""

from __future__ import annotations

import random
import re
import time
from typing import Any

import numpy as np
import pytest
from assertions import assert_close, assert_refused, assert_same, flash_run, to_numpy
from numpy.lib.stride_tricks import as_strided

from lars_array import LARS

HYPER: dict[str, Any] = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1}
A = np.arange(1.0, 25.0)


def assert_overlap_is_refused(p: Any, q: Any) -> None:
    for params in ({"p": p, "q": q}, {"q": p, "p": q}):
        with pytest.raises(ValueError, match=r"^parameters must not overlap in memory; parameter '[pq]' and parameter"):
            LARS(params, lr=0.5)
    optimizer = LARS({"p": p}, **HYPER)
    optimizer.step([p * 0])
    with pytest.raises(ValueError, match=r"^parameters must not overlap in memory; ") as caught:
        optimizer.add_param_group({"params": {"q": q}})
    group = {"params": {"q": q}}
    assert_refused(lambda: optimizer.add_param_group(group), ValueError, str(caught.value), optimizer, p, q)


def test_the_same_array_twice() -> None:
    p = A.copy()
    message = "every parameter must be given once; parameter 'b' and parameter 'a' are the same array"
    assert_refused(lambda: LARS({"a": p, "b": p}, lr=0.5), ValueError, message, p)
    optimizer = LARS({"a": p}, lr=0.5)
    assert_refused(lambda: optimizer.add_param_group({"params": {"b": p}}), ValueError, message, optimizer, p)


@pytest.mark.parametrize(
    ("p", "q"),
    [
        (lambda a: a, lambda a: a[:]),
        (lambda a: a[:13], lambda a: a[12:]),
        (lambda a: a[12:], lambda a: a[:13]),
        (lambda a: a, lambda a: a[5:6]),
        (lambda a: a.reshape(4, 6), lambda a: a.reshape(4, 6).T),
        (lambda a: a.reshape(4, 6), lambda a: a.reshape(4, 6)[2]),
        (lambda a: a.reshape(4, 6)[:, :4], lambda a: a.reshape(4, 6)[:, 3:]),
        (lambda a: a[::2], lambda a: a[::3]),
        (lambda a: a[::-1], lambda a: a[:1]),
        (lambda a: a[:2], lambda a: a.view(np.complex128)[0:1]),
        (lambda a: a, lambda a: a.view(np.float32)[47:]),
        (lambda a: a, lambda a: a[3:4].reshape(())),
    ],
)
def test_views_that_overlap(p: Any, q: Any) -> None:
    a = A.copy()
    assert_overlap_is_refused(p(a), q(a))


def test_a_part_of_what_lies_together_can_be_kept_by_hand() -> None:
    optimizer = LARS({"w": A.copy(), "b": A.copy()}, **HYPER)
    optimizer.step([A, A])
    views = optimizer.state_views()
    optimizer.attach_state({"w": views["w"]})
    optimizer.step([A, A])
    assert np.shares_memory(views["w"]["momentum_buffer"], optimizer.state_views()["w"]["momentum_buffer"])
    for name, own in views.items():
        with pytest.raises(ValueError, match=f"must not share memory with the momentum buffer of '{name}'"):
            optimizer.step([A, own["momentum_buffer"]])
    taken = {"momentum_buffer": views["b"]["momentum_buffer"], "previous_lr": 0.5}
    with pytest.raises(ValueError, match=r"^every parameter must be given once; the momentum buffer of '[wb]' and"):
        optimizer.attach_state({"w": taken})


def test_an_overlap_is_found_behind_other_arrays() -> None:
    # The long one reaches over all that begin after it.
    a = np.zeros(100)
    params = {"long": a[:90:3], **{str(k): a[3 * k + 1 : 3 * k + 2] for k in range(30)}, "last": a[60:61]}
    with pytest.raises(ValueError, match="not overlap in memory; parameter 'last' and parameter 'long'"):
        LARS(params, lr=0.5)
    del params["last"]
    LARS(params, lr=0.5)


@pytest.mark.parametrize(
    ("p", "q"),
    [
        (lambda a: a[::2], lambda a: a[1::2]),
        (lambda a: a[:12], lambda a: a[12:]),
        (lambda a: a.reshape(4, 6)[:, :3], lambda a: a.reshape(4, 6)[:, 3:]),
        (lambda a: a.reshape(4, 6)[:2].T, lambda a: a[:11:-1]),
        (lambda a: a[::-2], lambda a: a[::2]),
        (lambda a: a[:0], lambda a: a),
        (lambda a: a.reshape(2, 3, 4)[:, 0, :], lambda a: a.reshape(2, 3, 4)[:, 2, ::-1]),
    ],
)
def test_views_side_by_side_are_welcome(p: Any, q: Any) -> None:
    a = A.copy()
    ours = [p(a), q(a)]
    initial = [x.copy() for x in ours]
    grads = [x / 8 + 1 for x in initial]
    optimizer = LARS(ours, **HYPER)
    for _ in range(2):
        optimizer.step(grads)
    for x, x0, g in zip(ours, initial, grads, strict=True):
        assert_close(x, flash_run(x0, [g] * 2, **HYPER))


def test_gradients_may_be_interleaved_with_parameters_and_shared_among_themselves() -> None:
    a = A.copy()
    p, q, g = a[::3], a[1::3], a[2::3]
    optimizer = LARS([p, q], **HYPER)
    optimizer.step([g, g])
    optimizer.step([g, g[::-1]])
    assert_same(g, A[2::3])


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((3, 3), (8, 8)), ((2, 3), (16, 8)), ((3,), (0,)), ((3,), (4,)), ((2, 2, 2), (16, 8, 16)), ((2, 2), (-8, 8))],
)
def test_an_array_that_overlaps_itself(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    a = A.copy()
    p = as_strided(a[8:], shape, strides)
    message = f"parameter 'p' must not overlap itself; got strides {strides!r} for shape {shape!r}"
    assert_refused(lambda: LARS({"p": p}, lr=0.5), ValueError, message, a)


@pytest.mark.parametrize("p", [A.reshape(4, 6).T, A[::-1], A.reshape(2, 3, 4)[:, 1:, ::2], A[:1], A[:0], A[3]])
def test_odd_strides_are_welcome(p: Any) -> None:
    LARS([np.array(p)], lr=0.5)
    LARS([p if isinstance(p, np.ndarray) else np.array(p)], lr=0.5)
    one = as_strided(A.copy(), (1, 3, 1), (0, 8, 3))
    LARS([one], lr=0.5)


def test_a_read_only_array() -> None:
    p, q = A.copy(), A.copy()
    p.flags.writeable = False
    message = "parameter 'p' must be writable; got a read-only array"
    assert_refused(lambda: LARS({"p": p}, lr=0.5), ValueError, message, p)
    optimizer = LARS({"q": q}, lr=0.5)
    assert_refused(lambda: optimizer.add_param_group({"params": {"p": p}}), ValueError, message, optimizer, p, q)
    broadcast = {"p": np.broadcast_to(np.ones(1), (3,))}
    assert_refused(lambda: LARS(broadcast, lr=0.5), ValueError, message)
    optimizer.step([p])  # a gradient may be


def test_an_array_that_became_read_only_since() -> None:
    p, q = A.copy(), A.copy()
    optimizer = LARS({"p": p, "q": q}, **HYPER)
    optimizer.step([A, A])
    q.flags.writeable = False
    with pytest.raises(ValueError, match=r"writ|read-only") as caught:
        optimizer.step([A, A])
    assert_refused(lambda: optimizer.step([A, A]), caught.type, str(caught.value), optimizer, p, q)


def test_immutable_arrays_are_sent_to_the_functions() -> None:
    p = pytest.importorskip("jax").numpy.ones(2)
    kind = type(p).__name__
    message = f"parameter 'p' must be writable; {kind} is not, use lars_jax, or lars_array.init and lars_array.update"
    assert_refused(lambda: LARS({"p": p}, lr=0.5), TypeError, message)


@pytest.mark.parametrize("xp", ["numpy", "torch", "strict"], indirect=True)
@pytest.mark.parametrize("whose", ["its own parameter", "another parameter", "a momentum buffer"])
@pytest.mark.parametrize("part", ["itself", "a view"])
def test_a_gradient_in_memory_that_is_written_to(xp: Any, whose: str, part: str) -> None:
    p, q = (xp.asarray([1.0, 2.0, 3.0], dtype=xp.float64, copy=True) for _ in "pq")
    optimizer = LARS({"p": p, "q": q}, **HYPER)
    zeros = xp.zeros(3, dtype=xp.float64)
    optimizer.step([zeros, zeros])
    buffer = optimizer.state_views()["p"]["momentum_buffer"]
    owner = {"its own parameter": q, "another parameter": p, "a momentum buffer": buffer}[whose]
    names = {"its own parameter": "parameter 'q'", "another parameter": "parameter 'p'"}
    name = names.get(whose, "the momentum buffer of 'p'")
    g = owner if part == "itself" else xp.reshape(owner, (3,))
    message = f"the gradient of 'q' must not share memory with {name}"
    assert_refused(lambda: optimizer.step([zeros, g]), ValueError, message, optimizer, p, q)


@pytest.mark.parametrize("g", [lambda a: a[1:4], lambda a: a[:6:2], lambda a: a[2::-1], lambda a: a.reshape(2, 3)[1]])
def test_a_gradient_that_overlaps_in_part(g: Any) -> None:
    a = A[:6].copy()
    p, q = a[2:5], np.ones(3)
    optimizer = LARS({"q": q, "p": p}, **HYPER)
    message = "the gradient of 'q' must not share memory with parameter 'p'"
    assert_refused(lambda: optimizer.step([g(a), None]), ValueError, message, optimizer, a, q)


@pytest.mark.parametrize("bad", ["expanded", "requires grad"])
def test_tensors_that_can_not_be_written_to(bad: str) -> None:
    torch = pytest.importorskip("torch")
    p = torch.ones(3)
    q = torch.ones(1).expand(3) if bad == "expanded" else torch.ones(3, requires_grad=True)
    with pytest.raises((ValueError, TypeError), match=r"^parameter 'q' must not "):
        LARS({"p": p, "q": q}, lr=0.5)


def test_a_gradient_that_requires_gradients_does_not_reach_into_parameters() -> None:
    torch = pytest.importorskip("torch")
    p = torch.ones(3, dtype=torch.float64)
    optimizer = LARS([p], **HYPER)
    g = torch.ones(3, dtype=torch.float64, requires_grad=True)
    try:
        optimizer.step([g * 2])
    except (ValueError, TypeError) as refusal:
        assert re.search("gradient of '0'", str(refusal))
    assert not p.requires_grad
    assert_same(to_numpy(g.detach()), np.ones(3))


def any_view(a: Any, rng: random.Random) -> Any:
    """Return part of an array of 120 elements, in one to three axes."""
    x = a.reshape(rng.choice([(120,), (8, 15), (12, 10), (2, 6, 10), (4, 5, 6), (3, 8, 5)]))
    parts = []
    for n in x.shape:
        first = rng.randrange(n)
        parts.append(
            rng.choice([slice(first, rng.randint(first + 1, n), rng.choice([1, 2, 3])), slice(first, None, -1)])
        )
    return x[tuple(parts)].T if rng.random() < 0.3 else x[tuple(parts)]


def test_overlaps_are_found_exactly() -> None:
    rng, counts = random.Random(1), [0, 0]
    for _ in range(1000):
        a = np.zeros(120)
        views = [any_view(a, rng) for _ in range(rng.randint(2, 5))]
        overlaps = any(np.shares_memory(x, y) for i, x in enumerate(views) for y in views[:i])
        counts[overlaps] += 1
        if overlaps:
            with pytest.raises(ValueError, match="must not overlap in memory"):
                LARS(views, lr=0.5)
            continue
        optimizer = LARS(views, lr=0.5)
        gradients = [np.zeros_like(p) for p in views]
        i = rng.randrange(len(views))
        free = [x for x in (any_view(a, rng) for _ in range(20)) if x.shape == views[i].shape]
        for gradients[i] in free:
            owners = [k for k, p in enumerate(views) if np.shares_memory(p, gradients[i])]
            if owners:
                with pytest.raises(ValueError, match=f"gradient of '{i}' must not share memory with parameter '"):
                    optimizer.step(gradients)
            else:
                optimizer.step(gradients)
    assert min(counts) > 100


def table(shape: tuple[int, ...]) -> list[Any]:
    return list(np.moveaxis(np.zeros(shape), -1, 0))


@pytest.mark.parametrize(
    "views",
    [
        lambda: table((100, 1500)),
        lambda: [column for matrix in table((40, 40, 40)) for column in matrix.T],
        lambda: [a[i::40, j::40] for a in [np.zeros((400, 400))] for i in range(40) for j in range(40)],
    ],
    ids=["columns", "of a cube", "interleaved"],
)
def test_a_thousand_parts_of_one_array_are_checked_at_once(views: Any) -> None:
    params = views()
    start = time.perf_counter()
    optimizer = LARS(params, lr=0.5, momentum=0.9, kernel="blocked")
    optimizer.step([np.ones_like(p) for p in params])
    assert time.perf_counter() - start < 2  # it took ten; on a free machine it takes a tenth
    whole = np.zeros((100, 3000))  # gradients between parameters
    optimizer = LARS(list(whole[:, ::2].T), lr=0.5, kernel="blocked")
    start = time.perf_counter()
    optimizer.step(list(whole[:, 1::2].T))
    assert time.perf_counter() - start < 2
    with pytest.raises(ValueError, match="gradient of '7' must not share memory with parameter '7'"):
        optimizer.step([whole[:, 2 * i + (i != 7)] for i in range(1500)])
