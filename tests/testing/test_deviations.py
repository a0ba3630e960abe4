"""Each known mistake is told apart from the others by the cases, whatever the rule it is made in."""

from __future__ import annotations

import pytest

from lars_array import RULES
from lars_array.testing.cases import cases, options_of
from lars_array.testing.deviations import DEVIATIONS
from lars_array.testing.diagnosis import Bound, Run, first_difference, reasons
from lars_array.testing.reference import Model

# In some rules two mistakes are the same: layers without weight decay are not adapted, or all are.
SAME = {
    "it is ignored, but layers are adapted": "it is ignored",
    "they are not decayed": "they are neither decayed nor adapted",
}
# What these mistakes change is in no case of such a rule, or is no mistake there.
NO_CHANGE = {
    "flash": {
        "it is outside the momentum buffer, not inside",
        "it is not corrected by the ratio of the learning rates",
        "it is dropped where the gradient is zero",
        "layers without weight decay are not adapted",
    },
    "optax": {
        "it is ignored",  # dampening, which optax does not have
        "it also acts on the first step",
        "it does not act on the first step",
        "it is inside the momentum buffer, not outside",
        "it is not corrected by the ratio of the learning rates",
        "it still acts where the gradient is zero",
        "layers without weight decay are adapted too",
    },
}


@pytest.mark.parametrize("rule", NO_CHANGE)
def test_each_mistake_is_named_and_no_other(rule: str) -> None:
    bound, all_cases = Bound.of(1e-9, "float64"), list(cases(options_of(rule), "float64"))
    model = Model(RULES[rule], {}, None)
    unchanged = set()
    for mistake in DEVIATIONS:
        wrong = model._replace(deviations=(mistake,))
        runs = [Run(case, [moment.params for moment in wrong.trajectory(case)]) for case in all_cases]
        difference = first_difference(model, runs, bound)
        if difference is None:
            unchanged.add(mistake.says)
            continue
        named = reasons(model, difference, runs, bound)[0]
        expected = (mistake.says, SAME.get(mistake.says, mistake.says))
        assert named in [f"wrong {mistake.term}: {says}" for says in expected], f"{mistake}: {named}"
    assert unchanged == NO_CHANGE[rule]
