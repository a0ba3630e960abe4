"""The tests of a GPU, without one: the same bodies over the kernels on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import cuda_on_cpu
import numpy as np
import pytest
from cuda_bodies import BODIES, Place

pytestmark = pytest.mark.skipif(bool(cuda_on_cpu.missing()), reason=str(cuda_on_cpu.missing()))


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_on_the_cpu(body: Callable[[Place], None]) -> None:
    with cuda_on_cpu.pretended() as device:
        body(Place(cuda_on_cpu.far, np.asarray))
    assert any(name.startswith("apply") for name, _ in device.launches)
