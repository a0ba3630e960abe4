"""One optimizer step: checks the arrays, runs a kernel, and updates the state.

`stepper` chooses a program for the arrays of a step or makes one, `arrays` says whether a program fits them, and
`program` takes the step. None of them owns parameters or state: both are arguments, as in torch's functional
optimizers. `stateful` is what the optimizers that do own them share.

Adapters import from here, also names that other modules define.
"""

from lars_array._interrupts import SignalScope, defer_signals, uninterrupted
from lars_array._messages import listed, shown, warn
from lars_array._stepper.program import StepProgram
from lars_array._stepper.stateful import StatefulOptimizer
from lars_array._stepper.stepper import Stepper, reads_previous_lr
from lars_array.kernels import check_kernel_name
from lars_array.kernels.lent import on_threads_of
from lars_array.nonfinite import finite_layers, max_finite
from lars_array.state.shards import refusals_are_told
from lars_array.state.store import KEPT, ParamState

__all__ = [
    "KEPT",
    "ParamState",
    "SignalScope",
    "StatefulOptimizer",
    "StepProgram",
    "Stepper",
    "check_kernel_name",
    "defer_signals",
    "finite_layers",
    "listed",
    "max_finite",
    "on_threads_of",
    "reads_previous_lr",
    "refusals_are_told",
    "shown",
    "uninterrupted",
    "warn",
]
