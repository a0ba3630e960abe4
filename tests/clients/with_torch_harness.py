"""torch's own tests of optimizers, `TestOptimRenewed`, asked of ours.

They are in PyTorch's repository and not in its wheels: PYTORCH names a checkout, of the release that is installed.
"""

from __future__ import annotations

import importlib
import os
import sys
import unittest
import warnings
from pathlib import Path
from typing import Any

from lars_torch import LARS

LIBRARIES = ("torch",)

# What the harness takes for granted: gradients that are sparse, a complex number as two real ones with a norm each, and
# kernels of fused optimizers on the device "meta".
ALLOWED = {"sparse": 2, "complex": 1, "fused": 1}


class DefaultLR(LARS):
    """LARS with a learning rate that need not be given."""

    def __init__(self, params: Any, lr: Any = 1e-3, **options: Any) -> None:
        super().__init__(params, lr, **options)


def check_renewed() -> str:
    checkout = os.environ.get("PYTORCH")
    if not checkout:
        return "not run: PYTORCH names no checkout"
    sys.path[:0] = [str(Path(checkout, "test"))]
    warnings.simplefilter("ignore")
    harness = importlib.import_module("torch.testing._internal.common_optimizers")
    info = next(info for info in harness.optim_db if info.optim_cls.__name__ == "SGD")
    info.optim_cls = DefaultLR  # with all that SGD is asked
    harness.optim_db[:] = [info]
    module = importlib.import_module("test_optim")
    tests = [
        test for name, test in vars(module).items() if name.startswith("TestOptimRenewed") and name.endswith("CPU")
    ]
    result = unittest.TestResult()
    unittest.TestSuite(map(unittest.defaultTestLoader.loadTestsFromTestCase, tests)).run(result)
    failed = [test.id().rpartition(".")[2] for test, _ in [*result.failures, *result.errors]]
    assert result.testsRun > 20, f"only {result.testsRun} tests were found"
    rest = [name for name in failed if not any(word in name for word in ALLOWED)]
    too_many = [word for word, most in ALLOWED.items() if sum(word in name for name in failed) > most]
    assert not rest and not too_many, f"{len(failed)} of {result.testsRun} failed: {', '.join(failed)}"
    return f"{result.testsRun} run, {len(result.skipped)} skipped, failed: {', '.join(failed) or 'none'}"
