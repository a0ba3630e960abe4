"""Steps that write elsewhere: what is refused or left out has changed nothing, and where parameters can't move to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import array_api_strict
import numpy as np
import pytest
from assertions import assert_refused, assert_same, fingerprint
from moving import HYPER, Pair, numbers, room_for

from lars_array import LARS, NonFiniteError
from lars_array.kernels import NUMPY_KERNELS as KERNELS


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("why", ["raise", "skip", "found_inf"])
def test_a_step_that_is_left_out_moves_nothing(why: str, kernel: str) -> None:
    params = numbers(0)
    optimizer = LARS(params, **HYPER, nonfinite="skip" if why == "skip" else "raise", kernel=kernel)
    here, there = params, room_for(params)
    optimizer.step(numbers(1), out=there)
    grads, room = numbers(2), room_for(params)
    if why != "found_inf":
        grads["w"][0, 0, 0] = np.inf
    before = fingerprint([here, there, room, optimizer.state_dict()["state"]])
    try:
        optimizer.step(grads, out=room, found_inf=why == "found_inf")
    except NonFiniteError:
        assert why == "raise"
    assert fingerprint([here, there, room, optimizer.state_dict()["state"]]) == before
    assert all(p is q for p, q in zip(optimizer.param_groups[0]["params"], there.values(), strict=True))
    assert (optimizer.steps, optimizer.skipped_steps) == (1, int(why != "raise"))
    optimizer.step(numbers(3), out=room)
    plain = LARS(numbers(0), **HYPER, kernel=kernel)
    for seed in (1, 3):
        plain.step(numbers(seed))
    assert_same(list(room.values()), plain.param_groups[0]["params"])


MISFITS: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], Any], type[Exception], str]] = {
    "no arrays": (lambda room, p: 3, TypeError, "out must be an iterable of arrays or a mapping; got 3"),
    "an array": (
        lambda room, p: np.ones(3),
        TypeError,
        "out must be an iterable of arrays or a mapping; got a single ndarray",
    ),
    "too few": (lambda room, p: [room["a"]], ValueError, "out must hold one entry for each of the 3 parameters; got 1"),
    "an unknown name": (
        lambda room, p: room | {"d": room["a"]},
        ValueError,
        "out must be named as the parameters are; got the unknown name 'd'",
    ),
    "a missing name": (
        lambda room, p: {name: room[name] for name in "ab"},
        ValueError,
        "out must hold every parameter, with None for one to be skipped; 'c' is missing",
    ),
    "None": (
        lambda room, p: room | {"a": None},
        ValueError,
        "out must hold an array for 'a', which has a gradient; got None",
    ),
    "without a gradient": (
        lambda room, p: room | {"c": np.ones((2, 2))},
        ValueError,
        "out must be None for 'c', which has no gradient; got ndarray",
    ),
    "a list": (lambda room, p: room | {"a": [1.0]}, TypeError, "out of 'a' must be an array; got [1.0]"),
    "a number": (
        lambda room, p: room | {"a": np.float64(3)},
        TypeError,
        f"out of 'a' must be an array; got {np.float64(3)!r}",
    ),
    "another library": (
        lambda room, p: room | {"a": array_api_strict.ones((3, 4))},
        TypeError,
        "out of 'a' must be an array of the library of ndarray, as the parameter; got Array",
    ),
    "another dtype": (
        lambda room, p: room | {"a": np.ones((3, 4), "f4")},
        TypeError,
        "out of 'a' must have the parameter's dtype dtype('float64'); got dtype('float32')",
    ),
    "another shape": (
        lambda room, p: room | {"a": np.ones((4, 3))},
        ValueError,
        "out of 'a' must have the parameter's shape (3, 4); got (4, 3)",
    ),
    "a masked array": (
        lambda room, p: room | {"a": np.ma.masked_array(np.ones((3, 4)))},
        TypeError,
        "parameter 'out of a' must be a plain array; got a masked one",
    ),
    "read-only": (
        lambda room, p: room | {"a": read_only((3, 4))},
        ValueError,
        "parameter 'out of a' must be writable; got a read-only array",
    ),
    "itself": (
        lambda room, p: room | {"a": p["a"]},
        ValueError,
        "out of 'a' must not share memory with parameter 'a'",
    ),
    "another parameter": (
        lambda room, p: room | {"b": p["a"].reshape(-1)[:5]},
        ValueError,
        "out of 'b' must not share memory with parameter 'a'",
    ),
    "a parameter that stays": (
        lambda room, p: room | {"b": p["wide"][3:8]},
        ValueError,
        "out of 'b' must not share memory with parameter 'c'",
    ),
    "a gradient": (
        lambda room, p: room | {"a": p["gradient of b"][:12].reshape(3, 4)},
        ValueError,
        "the gradient of 'b' must not share memory with out of 'a'",
    ),
    "a gradient, behind its first elements": (
        lambda room, p: room | {"b": p["gradient of b"][::4]},
        ValueError,
        "the gradient of 'b' must not share memory with out of 'b'",
    ),
    "a buffer": (
        lambda room, p: room | {"a": p["buffer"]},
        ValueError,
        "out of 'a' must not share memory with the momentum buffer of 'a'",
    ),
    "each other": (
        lambda room, p: room | {"b": room["a"].reshape(-1)[:5]},
        ValueError,
        "parameters must not overlap in memory; out of 'b' and out of 'a' do",
    ),
}


def read_only(shape: tuple[int, ...]) -> Any:
    x = np.ones(shape)
    x.flags.writeable = False
    return x


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("what", MISFITS)
@pytest.mark.parametrize("steps", [0, 1])
def test_what_parameters_can_not_move_to(what: str, steps: int, kernel: str) -> None:
    """Also once they have moved, and what was found out about memory is carried on."""
    make, kind, message = MISFITS[what]
    wide, slopes = np.arange(1.0, 9.0), np.arange(1.0, 21.0)
    params = {"a": np.ones((3, 4)), "b": np.ones(5), "c": wide[:4].reshape(2, 2)}
    grads = {"a": np.ones((3, 4)), "b": slopes[10:15], "c": None}
    optimizer = LARS(params, **HYPER, kernel=kernel)
    optimizer.step(grads)
    for _ in range(steps):
        params |= {name: np.zeros_like(params[name]) for name in "ab"}
        optimizer.step(grads, out={name: params[name] for name in "ab"} | {"c": None})
    room: dict[str, Any] = {name: np.zeros_like(params[name]) for name in "ab"} | {"c": None}
    buffer = optimizer.state_views()["a"]["momentum_buffer"]
    out = make(room, params | {"wide": wide, "gradient of b": slopes, "buffer": buffer})
    assert_refused(lambda: optimizer.step(grads, out=out), kind, message, optimizer, params, room, slopes)
    optimizer.step(grads, out=room)


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_known_of_memory_follows_the_parameters(kernel: str) -> None:
    """In place, to dense memory, to other, and with the first momentum buffers."""
    wide = np.zeros(10)
    optimizer = LARS({"p": np.ones(5)}, **HYPER, kernel=kernel)

    def assert_is_in_the_way(x: Any, whose: str, **where: Any) -> None:
        grads = where.pop("grads", [np.ones(5)])
        who = "out of 'p'" if where else "the gradient of 'p'"
        message = f"{who} must not share memory with {whose} 'p'"
        assert_refused(lambda: optimizer.step(grads, **where), ValueError, message, optimizer, x, wide)

    optimizer.step([np.ones(5)], out=[x := np.zeros(5)])
    v = optimizer.state_views()["p"]["momentum_buffer"]
    assert_is_in_the_way(v, "the momentum buffer of", out=[v])
    optimizer.step([np.ones(5)])
    optimizer.step([np.ones(5)], out=[y := np.zeros(5)])
    assert_is_in_the_way(y, "parameter", grads=[y])
    optimizer.step([np.ones(5)], out=[x])
    optimizer.step([np.ones(5)], out=[wide[::2]])
    assert_is_in_the_way(wide, "parameter", out=[wide[:5]])
    optimizer.step([np.ones(5)], out=[x])
    optimizer.step([np.ones(5)], out=[wide[5:]])


def test_stacked_parameters_are_looked_at_as_a_whole() -> None:
    p = np.ones((3, 4))
    optimizer = LARS({"p": p}, lr=0.5, layer_axes=1)
    message = "out of 'p' must have the parameter's shape (3, 4); got (4, 4)"
    assert_refused(lambda: optimizer.step([p], out=[np.ones((4, 4))]), ValueError, message, optimizer, p)
    message = "out of 'p[0]' must not share memory with parameter 'p[0]'"
    assert_refused(lambda: optimizer.step([p * 2], out=[p]), ValueError, message, optimizer, p)


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_may_lie_in_parameters_that_move(kernel: str) -> None:
    """They are only read: JAX gives the parameters themselves for the gradient of half their square."""
    pair = Pair(numbers(0), **HYPER, kernel=kernel)
    for _ in range(3):
        grads = {name: p[...] for name, p in pair.now.items()}
        pair.plain.step({name: p.copy() for name, p in grads.items()})
        before = fingerprint(grads)
        pair.moving.step(grads, out=pair.room)
        assert fingerprint(grads) == before
        pair.now, pair.room = pair.room, pair.now
        pair.assert_same()
    message = "the gradient of 'w' must not share memory with parameter 'w'"
    here = pair.now
    assert_refused(lambda: pair.moving.step(here), ValueError, message, pair.moving, here)
    pair.moving.step(pair.room)  # where nobody lies any more


def test_a_parameter_that_has_moved_is_watched_where_it_lies() -> None:
    p, q = np.ones(6), np.zeros(6)
    optimizer = LARS({"p": p}, **HYPER)
    optimizer.step([np.ones(6)], out=[q])
    q.flags.writeable = False
    message = "parameter 'p' must be writable; got a read-only array"
    assert_refused(lambda: optimizer.step([np.ones(6)]), ValueError, message, optimizer, p, q)
    q.flags.writeable = True
    q.shape = (2, 3)
    with pytest.raises(ValueError, match="parameter 'p' must keep its memory, shape and dtype"):
        optimizer.step([np.ones((2, 3))])
    q.shape = (6,)
    optimizer.step([np.ones(6)], out=[p])
