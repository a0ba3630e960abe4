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

# What the harness takes for granted: gradients that are sparse, and kernels of fused optimizers on the device "meta".
ALLOWED = {
    "test_rosenbrock_sparse_with_lrsched_False_DefaultLR_cpu_float64",
    "test_rosenbrock_sparse_with_lrsched_True_DefaultLR_cpu_float64",
    "test_fused_error_on_params_on_meta_DefaultLR_cpu_float32",
}
# An input of `test_errors` for which torch warns, and LARS refuses.
REFUSED = "a param group cannot have duplicate parameters"


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
    wrong_inputs = info.optim_error_inputs_func
    info.optim_error_inputs_func = lambda *args, **options: [
        x for x in wrong_inputs(*args, **options) if x.optimizer_error_input.desc != REFUSED
    ]
    harness.optim_db[:] = [info]
    module = importlib.import_module("test_optim")
    tests = [
        test for name, test in vars(module).items() if name.startswith("TestOptimRenewed") and name.endswith("CPU")
    ]
    result = unittest.TestResult()
    unittest.TestSuite(map(unittest.defaultTestLoader.loadTestsFromTestCase, tests)).run(result)
    failed = [test.id().rpartition(".")[2] for test, _ in [*result.failures, *result.errors]]
    assert result.testsRun > 20, f"only {result.testsRun} tests were found"
    assert set(failed) <= ALLOWED, f"{len(failed)} of {result.testsRun} failed: {', '.join(failed)}"
    return f"{result.testsRun} run, {len(result.skipped)} skipped, failed: {', '.join(failed) or 'none'}"
