"""Every trajectory of the original implementations, reproduced."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from golden_cases import Case, call_of
from golden_runs import NEGATIVE, POSITIVE, assert_reproduces, names, run_functional, run_in_place

# A case that is not reproduced is named here, with the reason why it is not worth a rule.
LEFT_OUT: dict[str, str] = {}


@pytest.mark.parametrize("case", POSITIVE, ids=names(POSITIVE))
def test_numpy_reproduces_the_original(case: Case) -> None:
    if case.name in LEFT_OUT:
        pytest.skip(LEFT_OUT[case.name])
    call = call_of(case)
    assert_reproduces(case, call, *run_in_place(case, call, np, "float64"), tolerance=1e-12)
    assert_reproduces(case, call, *run_in_place(case, call, np, "float64", "portable"), tolerance=1e-12)
    assert_reproduces(case, call, *run_functional(case, call, np, "float64"), tolerance=1e-12)
    assert_reproduces(case, call, *run_in_place(case, call, np, "float32"), tolerance=1e-5)


@pytest.mark.parametrize("case", POSITIVE, ids=names(POSITIVE))
@pytest.mark.parametrize("xp", ["strict", "strictest", "torch", "jax"], indirect=True)
def test_portable_path_reproduces_the_original(case: Case, xp: Any) -> None:
    if case.name in LEFT_OUT:
        pytest.skip(LEFT_OUT[case.name])
    call = call_of(case)
    if "jax" not in xp.__name__:
        assert_reproduces(case, call, *run_in_place(case, call, xp, "float64", "portable"), tolerance=1e-12)
    assert_reproduces(case, call, *run_functional(case, call, xp, "float64"), tolerance=1e-12)


@pytest.mark.parametrize("case", NEGATIVE, ids=names(NEGATIVE))
def test_a_faulty_reference_is_not_reproduced(case: Case) -> None:
    call = call_of(case)
    with pytest.raises(AssertionError, match="off by"):
        assert_reproduces(case, call, *run_in_place(case, call, np, "float64"), tolerance=1e-6)


def test_the_set_is_complete() -> None:
    if len(POSITIVE) == 269:
        assert len(LEFT_OUT) <= 14
    assert set(LEFT_OUT) <= set(names(POSITIVE))
