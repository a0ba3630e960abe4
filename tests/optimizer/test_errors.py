"""What is refused of parameters and gradients, in which words, and that nothing is changed by it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import array_api_strict
import numpy as np
import pytest
from assertions import assert_refused, assert_same

from lars_array import LARS, NonFiniteError, init, update
from lars_array.kernels import NUMPY_KERNELS as KERNELS

HYPER: dict[str, Any] = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1}
TYPES = "float64, float32, float16, bfloat16, complex128, complex64"


def trained(**options: Any) -> tuple[LARS, Any, Any]:
    w, b = np.array([[3.0, 4.0]]), np.array([0.6, 0.8])
    optimizer = LARS({"w": w, "b": b}, **HYPER | options)
    optimizer.step([GW, GB])
    return optimizer, w, b


GW, GB = np.array([[0.3, 0.4]]), np.array([0.05, -0.12])
# array_api_strict pretends to have two.
DEVICE = array_api_strict.Device("device1")


@pytest.mark.parametrize(
    ("grads", "kind", "message"),
    [
        ([GW], ValueError, "grads must hold one entry for each of the 2 parameters; got 1"),
        ([], ValueError, "grads must hold one entry for each of the 2 parameters; got 0"),
        ([GW, GB, GB], ValueError, "grads must hold one entry for each of the 2 parameters; got 3"),
        ({"w": GW}, ValueError, "grads must hold every parameter, with None for one to be skipped; 'b' is missing"),
        ({}, ValueError, "grads must hold every parameter, with None for one to be skipped; 'w' is missing"),
        ([("b", GB)], ValueError, "grads must hold every parameter, with None for one to be skipped; 'w' is missing"),
        (
            {"w": GW, "b": GB, "c": GB},
            ValueError,
            "grads must be named as the parameters are; got the unknown name 'c'",
        ),
        ({"w": GW, "B": GB}, ValueError, "grads must be named as the parameters are; got the unknown name 'B'"),
        ([("w", GW), ("b", GB), ("w", GW)], ValueError, "grads must hold each name once; got ['w', 'b', 'w']"),
        (3.0, TypeError, "grads must be an iterable of arrays or a mapping; got 3.0"),
        ("wb", TypeError, "grads must be an iterable of arrays or a mapping; got 'wb'"),
        (GW, TypeError, "grads must be an iterable of arrays or a mapping; got a single ndarray"),
        ([GW, [0.05, -0.12]], TypeError, "the gradient of 'b' must be an array; got [0.05, -0.12]"),
        ([GW, 0.05], TypeError, "the gradient of 'b' must be an array; got 0.05"),
        ([GW, GW], ValueError, "the gradient of 'b' must have the parameter's shape (2,); got (1, 2)"),
        ([GB, GW], ValueError, "the gradient of 'w' must have the parameter's shape (1, 2); got (2,)"),
        ([GW, GB[:1]], ValueError, "the gradient of 'b' must have the parameter's shape (2,); got (1,)"),
        (
            [GW, GB.astype(np.int64)],
            TypeError,
            "the gradient of 'b' must be of one of the real types float64, float32, float16, bfloat16; "
            "got dtype('int64')",
        ),
        (
            [GW, GB + 0j],
            TypeError,
            "the gradient of 'b' must be of one of the real types float64, float32, float16, bfloat16; "
            "got dtype('complex128')",
        ),
    ],
)
def test_gradients_that_do_not_fit(grads: Any, kind: type[Exception], message: str) -> None:
    optimizer, w, b = trained()
    assert_refused(lambda: optimizer.step(grads), kind, message, optimizer, w, b)
    assert_refused(lambda: optimizer.step(closure=lambda: (0.0, grads)), kind, message, optimizer, w, b)
    params = {"w": w, "b": b}
    state = init(params)
    assert_refused(lambda: update(params, grads, state, **HYPER), kind, message, w, b, state)


@pytest.mark.parametrize("xp", ["strict", "torch", "jax"], indirect=True)
def test_a_gradient_of_another_library(xp: Any) -> None:
    optimizer, w, b = trained()
    g = xp.ones(2, dtype=xp.float64)
    library = type(g).__module__.split(".")[0]
    message = f"the gradient of 'b' must be an array of numpy, as the parameter; got {library}"
    assert_refused(lambda: optimizer.step([GW, g]), TypeError, message, optimizer, w, b)


@pytest.mark.parametrize("masked", ["parameter", "gradient"])
def test_a_masked_array(masked: str) -> None:
    if masked == "parameter":
        message = "parameter 'w' must be a plain array; got a masked one"
        assert_refused(lambda: LARS({"w": np.ma.masked_array([1.0, 2.0], [False, True])}, lr=1.0), TypeError, message)
        return
    for kernel in KERNELS:
        optimizer, w, b = trained(kernel=kernel)
        grads = [GW, np.ma.masked_array([1.0, np.nan], [False, True])]
        with pytest.raises(TypeError, match="gradient of 'b' must be a plain array; got a masked one") as caught:
            optimizer.step(grads)
        assert_refused(lambda o=optimizer, g=grads: o.step(g), TypeError, str(caught.value), optimizer, w, b)


def test_a_gradient_on_another_device() -> None:
    p = array_api_strict.ones(2)
    optimizer = LARS({"p": p}, lr=0.5)
    g = array_api_strict.ones(2, device=DEVICE)
    message = "the gradient of 'p' must be on the parameter's device "
    message += f"{p.device!r}; got {DEVICE!r}"
    assert_refused(lambda: optimizer.step([g]), ValueError, message, optimizer, p)


def test_parameters_on_two_devices() -> None:
    p, q = array_api_strict.ones(2), array_api_strict.ones(3, device=DEVICE)
    message = f"parameters must lie on one device; 'q' and 'p' lie on {DEVICE!r} and {p.device!r}"
    assert_refused(lambda: LARS({"p": p, "q": q}, lr=0.5), ValueError, message)
    optimizer = LARS({"p": p}, lr=0.5)
    group = {"params": {"q": q}}
    assert_refused(lambda: optimizer.add_param_group(group), ValueError, message, optimizer, p, q)


def test_parameters_that_all_lie_on_another_device_are_welcome() -> None:
    p = array_api_strict.ones(2, device=DEVICE)
    optimizer = LARS({"p": p}, **HYPER)
    for _ in range(2):
        optimizer.step([array_api_strict.ones(2, device=DEVICE)])
    optimizer.load_state_dict(optimizer.state_dict())
    assert p.device == DEVICE == optimizer.state_dict()["state"]["p"]["momentum_buffer"].device
    assert list(optimizer.norms()) == ["p"] == list(optimizer.trust_ratios())


def test_parameters_of_two_libraries() -> None:
    params = {"p": np.ones(2), "q": array_api_strict.ones(2)}
    message = "parameters must be arrays of one library; 'q' and 'p' are Array and ndarray"
    assert_refused(lambda: LARS(params, lr=0.5), TypeError, message)


@pytest.mark.parametrize("kind", ["int64", "uint8", "bool", "object", "str", "S3", "datetime64[s]", "longdouble"])
def test_a_parameter_of_a_type_that_is_not_computed_on(kind: str) -> None:
    p = np.ones(2).astype(kind)
    message = f"parameter 'p' must be of one of the types {TYPES}; got {p.dtype!r}"
    for call in (lambda: LARS({"p": p}, lr=0.5), lambda: init({"p": p})):
        assert_refused(call, TypeError, message, p)


@pytest.mark.parametrize("p", [3.0, [1.0, 2.0], None, "w", np.float64(3.0), {"w": 1}, ("w", np.ones(2), 1)], ids=repr)
def test_a_parameter_that_is_no_array(p: Any) -> None:
    message = f"parameter '1' must be an array; got {p!r}"
    assert_refused(lambda: LARS([np.ones(2), p], lr=0.5), TypeError, message)
    assert_refused(lambda: init([np.ones(2), p]), TypeError, message)


@pytest.mark.parametrize(
    ("params", "kind", "message"),
    [
        (np.ones((2, 2)), TypeError, "params must be an iterable of arrays or a mapping; got a single ndarray"),
        (3.0, TypeError, "params must be an iterable of arrays or a mapping; got 3.0"),
        (None, TypeError, "params must be an iterable of arrays or a mapping; got None"),
        ("wb", TypeError, "params must be an iterable of arrays or a mapping; got 'wb'"),
        ({"params": [np.ones(2)]}, TypeError, "params must be an iterable of groups, not one group; "),
        ([], ValueError, "optimizer got an empty parameter list"),
        ({}, ValueError, "optimizer got an empty parameter list"),
        ((), ValueError, "optimizer got an empty parameter list"),
        (iter(()), ValueError, "optimizer got an empty parameter list"),
        ([{"params": []}], ValueError, "optimizer got an empty parameter list"),
        ([{"w": np.ones(2)}], ValueError, "a parameter group must have the key 'params'; got the keys ['w']"),
        ([{}], ValueError, "a parameter group must have the key 'params'; got the keys []"),
        ({0: np.ones(2)}, TypeError, "names of parameters must be strings; got 0"),
        ([("w", np.ones(2)), ("w", np.ones(2))], ValueError, "names of parameters must differ; got 'w' twice"),
        ([("w", np.ones(2)), np.ones(2)], TypeError, "parameter '0' must be an array; got ('w', array([1., 1.]))"),
        ([np.ones(2), {"params": np.ones(2)}], TypeError, "parameter '1' must be an array; got {'params': "),
        ([{"params": np.ones(2)}], TypeError, "params must be an iterable of arrays or a mapping; got a single "),
        ([{"params": {"1": np.ones(2)}}, {"params": [np.ones(2)]}], ValueError, "names of parameters must differ; "),
    ],
)
def test_parameters_in_no_known_form(params: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match="^" + re.escape(message)) as caught:
        LARS(params, lr=0.5)
    assert caught.type is kind


def test_a_parameter_called_params_is_no_group() -> None:
    p = np.ones(2)
    LARS({"params": p}, lr=0.5).step([np.ones(2)])
    assert_same(p, np.full(2, 0.5))


NONFINITE: list[tuple[list[Any], Callable[[Any, Any], None], str]] = [
    ([GW, GB * [np.nan, 1]], lambda w, b: None, "the gradient of 'b' has 1 non-finite entries of 2"),
    ([GW * np.inf, GB * -np.inf], lambda w, b: None, "the gradient of 'w' has 2 non-finite entries of 2"),
    ([GW, GB], lambda w, b: b.fill(np.nan), "the parameter of 'b' has 2 non-finite entries of 2"),
    ([GW * 1e200, GB], lambda w, b: None, "the update of 'w' overflows dtype('float64') or the float64 of its norms"),
]


@pytest.mark.parametrize(("grads", "spoil", "message"), NONFINITE, ids=[message for *_, message in NONFINITE])
def test_what_is_not_finite_is_named_and_counted(grads: Any, spoil: Callable[[Any, Any], None], message: str) -> None:
    optimizer, w, b = trained()
    spoil(w, b)
    message += "; nothing was changed"
    assert_refused(lambda: optimizer.step(grads), NonFiniteError, f"{message} (step 1)", optimizer, w, b)
    assert issubclass(NonFiniteError, ValueError)
    params = {"w": w, "b": b}
    state = init(params)
    assert_refused(lambda: update(params, grads, state, **HYPER), NonFiniteError, message, w, b, state)
    optimizer, w, b = trained(nonfinite="skip")
    spoil(w, b)
    before = optimizer.state_dict(), w.copy(), b.copy()
    optimizer.step(grads)
    assert_same((optimizer.state_dict() | {"skipped_steps": 0}, w, b), before)
    assert (optimizer.steps, optimizer.skipped_steps) == (1, 1)


def test_the_layer_that_is_named_is_one_that_has_a_gradient() -> None:
    optimizer, w, b = trained()
    message = "the gradient of 'b' has 1 non-finite entries of 2; nothing was changed (step 1)"
    assert_refused(lambda: optimizer.step([None, GB * [1, np.nan]]), NonFiniteError, message, optimizer, w, b)
