"""Types and layouts of CuPy arrays, of which no memory is needed."""

from __future__ import annotations

import numpy as np
import pytest

from lars_array._arrays import ArraySpecs

pytest.importorskip("cupy")

from benchmarks.no_device import array

ADDRESS = 0x7F00_0000_0000


def test_arrays_elsewhere_are_recognised() -> None:
    specs = ArraySpecs([array((4, 6)), array(3)])
    found = specs.addresses([array((4, 6), address=ADDRESS), array(3, address=ADDRESS + 512)])
    assert found is not None and found.tolist() == [ADDRESS, ADDRESS + 512]


@pytest.mark.parametrize("other", ["shape", "type", "strides", "device"])
def test_another_array_is_not(other: str) -> None:
    ways = {"shape": ((6, 4),), "type": ((4, 6), np.float64), "strides": ((4, 6), np.float32, None, (4, 16))}
    x = array((4, 6), device=1) if other == "device" else array(*ways[other])
    assert ArraySpecs([array((4, 6))]).addresses([x]) is None


def test_the_shape_is_all_of_an_array_that_can_be_set() -> None:
    x = array((4, 6))
    specs = ArraySpecs([x])
    assert specs.are_unchanged([x])
    for name in ("data", "dtype", "strides", "size"):
        with pytest.raises(AttributeError):
            setattr(x, name, getattr(x, name))
    x.shape = (6, 4)
    assert not specs.are_unchanged([x]) and specs.addresses([x]) is None


def test_arrays_of_numpy_may_always_have_changed() -> None:
    x = np.zeros(3)
    assert not ArraySpecs([x]).are_unchanged([x])
