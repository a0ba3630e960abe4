"""Where a step differs from a rule, and which mistakes give its numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from lars_array._messages import shown
from lars_array.core import RULES, Rule
from lars_array.testing.affine import compared
from lars_array.testing.cases import Case
from lars_array.testing.deviations import DEVIATIONS
from lars_array.testing.reference import Deviation, Model, Moment

__all__ = ["Bound", "Difference", "Run", "first_difference", "reasons"]


class Run(NamedTuple):
    """The parameters after each step of a case, as the step under test returned them."""

    case: Case
    params: Sequence[dict[str, Any]]


class Bound(NamedTuple):
    """The largest difference: of the step's length, and of the parameters, which each step rounds."""

    of_step: float
    of_params: float

    @classmethod
    def of(cls, tolerance: float, dtype: str) -> Bound:
        return cls(tolerance, 4 * float(np.finfo(dtype).eps))


class Difference(NamedTuple):
    """The first step and layer of a case that differ."""

    run: Run
    step: int
    layer: str
    moment: Moment
    before: dict[str, Any]
    of_step: float

    def __str__(self) -> str:
        case, t, name = self.run.case, self.step, self.layer
        found = [case.params, *self.run.params]
        theirs = np.asarray(found[t][name], np.float64) - np.asarray(found[t + 1][name], np.float64)
        ours = self.before[name] - self.moment.params[name]
        arrays = {"g": case.grads[t][name], "p": self.before[name], "v": self.moment.buffers[name]}
        wide = {symbol: np.asarray(x, np.float64) for symbol, x in arrays.items()}
        given = {"lr": case.rates[t], **case.hyper}
        hyper = ", ".join(f"{key}={value:g}" for key, value in given.items() if value is not False and value != 0)
        place = f"case {shown(case.name)}, step {t + 1} of {len(case.rates)}, layer {shown(name)} ({hyper})"
        return f"{place}: {compared(theirs, ours, wide, self.of_step)}"


def first_difference(model: Model, runs: Iterable[Run], bound: Bound) -> Difference | None:
    """Return where runs first differ from the trajectories of a model; None if they do not."""
    for run in runs:
        before = {name: np.asarray(p, np.float64) for name, p in run.case.params.items()}
        lengths = dict.fromkeys(before, 0.0)
        for t, (moment, found) in enumerate(zip(model.trajectory(run.case), run.params, strict=True)):
            for name, p in moment.params.items():
                lengths[name] = max(lengths[name], _largest(p - before[name]))
                allowed = bound.of_step * lengths[name] + bound.of_params * (t + 1) * _largest(before[name])
                if not _largest(np.asarray(found[name], np.float64) - p) <= allowed:  # neither is NaN
                    return Difference(run, t, name, moment, before, bound.of_step)
            before = moment.params
    return None


def _largest(x: Any) -> float:
    return float(np.max(np.abs(x)))


def reasons(model: Model, difference: Difference, runs: Sequence[Run], bound: Bound) -> list[str]:
    """Return what gives the numbers of the runs instead of a model, as sentences; the fewest mistakes that do."""
    runs = sorted(runs, key=lambda run: run is not difference.run)  # most candidates differ there already

    def fits(candidate: Model) -> bool:
        with np.errstate(all="ignore"):
            return first_difference(candidate, runs, bound) is None

    def with_mistakes(*mistakes: Deviation) -> Model:
        return model._replace(deviations=mistakes)

    others = [(model._replace(rule=rule), names) for rule, names in _other_rules(model.rule)]
    same = [f"its steps are those of rule {names}" for other, names in others if fits(other)][:1]
    for mistake in DEVIATIONS:
        if fits(with_mistakes(mistake)):
            return [_sentence(mistake), *same]
    if same:
        return same
    for other, names in others:
        for mistake in DEVIATIONS:
            if fits(other._replace(deviations=(mistake,))):
                return [f"its steps are those of rule {names}, but for one thing", _sentence(mistake)]
    for pair in combinations(DEVIATIONS, 2):
        if fits(with_mistakes(*pair)):
            return [_sentence(mistake) for mistake in pair]
    return []


def _sentence(mistake: Deviation) -> str:
    return f"wrong {mistake.term}: {mistake.says}"


def _other_rules(rule: Rule) -> Iterator[tuple[Rule, str]]:
    """Yield the other registered rules that compute different things, with their names."""
    names: dict[Any, list[str]] = {}
    for name, other in RULES.items():
        names.setdefault((other.function, other.trust_bounds), []).append(name)
    for (function, bounds), found in names.items():
        if (function, bounds) != (rule.function, rule.trust_bounds):
            yield RULES[found[0]], " or ".join(map(shown, found[:2])) + (", ..." if found[2:] else "")
