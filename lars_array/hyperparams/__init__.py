"""The hyper-parameters: names and defaults, checks, values at a step, and arrays of them for the rows of a step."""

from lars_array.hyperparams.checks import NUMBER_TYPES, check, check_layer_axes
from lars_array.hyperparams.groups import (
    PLAIN,
    Hyperparams,
    at_step,
    can_be_read,
    complete,
    needs_buffer,
    options_of,
    readable,
    scheduled,
)
from lars_array.hyperparams.names import (
    ALIASES,
    DEFAULTS,
    GROUP_FIELDS,
    INSTEAD,
    NUMBERS,
    defaults_from,
    named_options,
    required,
    unknown_option,
)
from lars_array.hyperparams.rows import inputs_of, row_values, with_rules
from lars_array.hyperparams.sgd import described, is_sgd, warn_of_sgd

__all__ = [
    "ALIASES",
    "DEFAULTS",
    "GROUP_FIELDS",
    "INSTEAD",
    "NUMBERS",
    "NUMBER_TYPES",
    "PLAIN",
    "Hyperparams",
    "at_step",
    "can_be_read",
    "check",
    "check_layer_axes",
    "complete",
    "defaults_from",
    "described",
    "inputs_of",
    "is_sgd",
    "named_options",
    "needs_buffer",
    "options_of",
    "readable",
    "required",
    "row_values",
    "scheduled",
    "unknown_option",
    "warn_of_sgd",
    "with_rules",
]
