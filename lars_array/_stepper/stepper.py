"""The programs of steps: a step is taken by one that fits its arrays, or by a new one.

Each is valid as long as the same parameters take part in steps and arrays keep their types and layouts; a step then
needs nothing but the addresses of its arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from numbers import Real
from typing import Any

import numpy as np

from lars_array import kernels
from lars_array._arrays import device_context, is_array, is_half, is_on_accelerator
from lars_array._messages import shown
from lars_array._stepper.arrays import Groups, absent_from, kept_by
from lars_array._stepper.program import FOUND, StepProgram, exchange_nothing
from lars_array.core import resolve
from lars_array.kernels.base import Gradients
from lars_array.state.shards import SkippedError
from lars_array.state.store import ParamState
from lars_array.telemetry import StepResult

__all__ = ["Stepper", "reads_previous_lr"]

MOST_PROGRAMS = 4  # that are kept: other parameters may have gradients in every other step


class Stepper:
    """Takes steps with parameters and state that are passed to it.

    Parameters
    ----------
    kernel : str, optional
        As for `lars_array.LARS`.
    """

    def __init__(self, kernel: str | None = None) -> None:
        self._kernel_name = kernel
        self._kernel: Any = None
        self._programs: list[StepProgram] = []  # the last used first, none of the same parameters as another

    def choose_kernel(self, params: Sequence[Any]) -> None:
        """Choose the kernel for `params`; raise ValueError if the one asked for can't take them."""
        self._kernel = kernels.choose(params, self._kernel_name)

    def step(self, state: ParamState, grads: Sequence[Any], groups: Groups, found_inf: Any = None) -> StepResult | None:
        """Take one step: either all of it is done or, where it is rejected, nothing.

        Parameters
        ----------
        state : ParamState
            Parameters and their state; the arrays are modified in place.
        grads : sequence of arrays or None
            One a parameter; None for one that is skipped. Not modified.
        groups : sequence of mappings
            Complete and checked hyper-parameters. The same object as long as nothing in it has changed.
        found_inf : number or array of shape (), optional
            The step is skipped where it isn't zero.

        Returns
        -------
        StepResult or None
            None where the step is skipped. On a device that is decided later: `state.device` has the counts.

        Raises
        ------
        ValueError, TypeError
            For arrays that do not fit, naming the parameter.
        NonFiniteError
            For sums that are not finite, where the group's `nonfinite` is "raise".
        RefusedElsewhereError
            If another process has refused the step.
        """
        if found_inf is not None:
            _check_found_inf(found_inf)
            stays = is_array(found_inf) and is_on_accelerator(found_inf) and is_on_accelerator(state.params[0])
            found_inf = found_inf if stays else FOUND if bool(found_inf) else None
        shards = state.shards
        has_none = all(g is None for g in grads)
        if has_none and not shards:
            return None if found_inf is FOUND else StepResult.of_nothing()
        with device_context(state.params[0]), np.errstate(all="ignore"):  # non-finite numbers are reported by name
            try:
                if has_none:
                    return exchange_nothing(state, groups, found_inf)
                program, gradients = self.bind(state, grads, groups)
                if found_inf is FOUND and not shards:
                    return None
                return program.run(state, gradients, groups, found_inf)
            except SkippedError:
                return None

    def bind(self, state: ParamState, grads: Sequence[Any], groups: Groups) -> tuple[StepProgram, Gradients]:
        """Return the program for these arrays, made anew where one of them changed its type or layout.

        All checks that need no sums are done then. Parameters and errors are those of `step`.
        """
        found = self._known(state, grads, groups)
        if found is not None:
            return found
        if self._programs:
            self._programs[0].refuse_changed(state, grads)
        state.prepare()
        if self._kernel is None:
            self.choose_kernel(state.view_all(state.params))
        filled = self._filled(state, grads, groups)
        if filled is not None:
            with suppress(ValueError, TypeError):  # of a parameter that sits out, such as a read-only one
                self._programs.insert(1, StepProgram(state, filled, groups, self._kernel))
                found = self._known(state, grads, groups)
        if found is None:
            program = StepProgram(state, grads, groups, self._kernel)
            gradients: Any = program.gradients(state, grads)
            found = program, gradients
            self._use(groups, program)
        return found

    def _known(self, state: ParamState, grads: Sequence[Any], groups: Groups) -> tuple[StepProgram, Gradients] | None:
        """Return a known program and its gradients, or one cut from that of all parameters; None if none fits."""
        absent = absent_from(grads)
        for wanted in (absent, []) if absent else (absent,):
            known = next((program for program in self._programs if program.absent == wanted), None)
            placed = None if known is None else known.placed(state, groups)
            program = placed if placed is None or wanted == absent else placed.cut(absent)
            gradients = None if program is None else program.gradients(state, grads)
            if program is not None and gradients is not None:
                self._use(groups, *([program] if program is placed else [program, placed]))
                return program, gradients
        return None

    def _filled(self, state: ParamState, grads: Sequence[Any], groups: Groups) -> list[Any] | None:
        """Return gradients of all parameters, where programs of some are to be cut from one of all; else None."""
        absent = absent_from(grads)
        is_other = absent and self._programs and absent != self._programs[0].absent
        kinds = {type(g) for g in grads if g is not None}  # JAX's step takes NumPy's gradients too
        is_able = hasattr(self._kernel, "part") and kinds == {type(state.like_gradient(state.params[0]))}
        if not (is_other and is_able and _is_complete(state, absent, groups)):
            return None
        return [state.like_gradient(p) if g is None else g for g, p in zip(grads, state.params, strict=True)]

    def _use(self, groups: Groups, *programs: Any) -> None:
        """Put programs first, the one of this step before the others, and forget others of the same parameters."""
        if self._programs[:1] == [programs[0]]:
            return
        for last in self._programs[:1]:
            if last._prepared[0] is groups:  # by group, whichever parameters
                programs[0]._prepared = last._prepared
        absent = [program.absent for program in programs]
        others = [program for program in self._programs if program.absent not in absent]
        self._programs = [*programs, *others][:MOST_PROGRAMS]

    def __getstate__(self) -> dict[str, Any]:
        # Programs hold addresses, and another machine may have another fastest kernel.
        return {"_kernel_name": self._kernel_name, "_kernel": None, "_programs": []}


def reads_previous_lr(rule: Any) -> bool:
    """Return whether steps by a rule depend on the learning rate of the step before."""
    from lars_array.kernels.tape import record  # only what asks pays for the import

    tape = record(resolve(rule))
    return tape is None or tape.reads_previous_lr


def _check_found_inf(x: Any) -> None:
    is_numpy = isinstance(x, np.ndarray | np.generic)
    is_number = x.dtype.kind in "biuf" if is_numpy else isinstance(x, Real) or is_array(x)
    if not is_number or tuple(getattr(x, "shape", ())) != ():
        raise TypeError(f"found_inf must be a number, or an array of shape (); got {shown(x)}")


def _is_complete(state: ParamState, index: Sequence[int], groups: Groups) -> bool:
    """Return whether the parameters at `index` have all that their groups keep for them: taking part makes nothing."""
    keeps = kept_by(groups)
    for i in index:
        buffer, master = keeps[state.group_of[i]]
        if (buffer and state.buffers[i] is None) or (master and state.masters[i] is None and is_half(state.params[i])):
            return False
    return True
