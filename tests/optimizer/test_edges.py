"""What few will meet, and nobody should lose an afternoon to."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from lars_array import LARS
from lars_array.optimizer import required


def test_a_learning_rate_that_is_missing_is_missing_in_another_process_too() -> None:
    assert pickle.loads(pickle.dumps(required)) is required
    optimizer = pickle.loads(pickle.dumps(LARS([{"params": [np.ones(2)], "lr": 0.5}])))
    with pytest.raises(ValueError, match="parameter group 1 didn't specify a value of required optimization parameter"):
        optimizer.add_param_group({"params": [np.ones(2)]})


def test_a_parameter_that_became_read_only_is_named() -> None:
    p, q = np.ones(2), np.ones(2)
    optimizer = LARS({"p": p, "q": q}, lr=0.5)
    q.flags.writeable = False
    with pytest.raises(ValueError, match=r"^parameter 'q' must be writable; got a read-only array$"):
        optimizer.step([p + 1, p + 1])
    assert (p == 1).all()


def test_numpys_arithmetic_makes_scalars_of_arrays_without_axes() -> None:
    p = np.array(3.0)
    optimizer = LARS([p], lr=0.25)
    gradient = 2 * p
    assert isinstance(gradient, np.float64)
    optimizer.step([gradient])
    assert p == 1.5 and gradient == 6.0


def test_parameters_of_two_libraries_are_not_mixed() -> None:
    strict = pytest.importorskip("array_api_strict")
    with pytest.raises(TypeError, match=r"must be arrays of one library; 'b' and 'a' are Array and ndarray"):
        LARS({"a": np.ones(2), "b": strict.ones(2)}, lr=0.5)
