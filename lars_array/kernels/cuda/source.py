"""The source of the CUDA kernels, and the structures that it shares with the host: NumPy dtypes and their C++ twins."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files
from typing import Any

import numpy as np

from lars_array.hyper import GIVEN, NONFINITE
from lars_array.news import GRADIENT, KINDS, PARAMETER, UPDATE
from lars_array.registry import NORM_OF
from lars_array.tape import INPUTS, OPERATIONS

__all__ = [
    "ARRAY",
    "COMMON",
    "ELEMENTS",
    "GROUP",
    "MODEL",
    "OPTIONS",
    "PIECE",
    "ROW",
    "ROWS",
    "SLOTS",
    "STRUCTURES",
    "THREADS",
    "WORDS",
    "pair_name",
    "source",
]

THREADS = 256  # of a block
ROWS = 32  # layers whose coefficients one block computes
SLOTS = 160  # registers that a tape may use; they fill the shared memory that every device has
PARAMETER_BYTES = 4096  # that a launch may have

# Element types by the names that they have in lars_array.dtypes, and in C++.
ELEMENTS = {"float64": "double", "float32": "float", "float16": "float16", "bfloat16": "bfloat16"}

_TYPES = {"i4": "int", "i8": "i64", "u8": "u64", "f8": "double"}


def _structure(*fields: tuple[str, str] | tuple[str, str, int]) -> np.dtype[Any]:
    """Return a dtype of fields that are named and typed as in `_TYPES`, or C++ pointers, or several of either."""
    kinds = [(name, "u8" if "*" in kind else kind, *count) for name, kind, *count in fields]
    return np.dtype(kinds, align=True, metadata={"types": {name: kind for name, kind, *_ in fields}})


# Parameters that lie in one piece of memory, cut into pieces of a fixed length. Where they begin, and gradients, is in
# tables of their own: it may change from step to step.
ARRAY = _structure(("v", "u8"), ("master", "u8"), ("size", "i8"), ("piece", "i8"), ("row", "i4"))

# A layer: pieces that are summed together. `limit` and `most` are largest and most_squares of lars_array.nonfinite,
# `keeps` is whether it has a buffer.
ROW = _structure(
    ("limit", "f8"),
    ("most", "f8"),
    ("first_piece", "i4"),
    ("pieces", "i4"),
    ("group", "i4"),
    ("place", "i4"),
    ("keeps", "i4"),
)

GROUP = _structure(
    ("norm_of", "i4"),
    ("policy", "i4"),
    ("first_operation", "i4"),
    ("last_operation", "i4"),
    ("first_constant", "i4"),
    ("last_constant", "i4"),
    ("outputs", "i4", 6),
)

PIECE = _structure(("array", "i4"), ("index", "i4"))

# All that a launch needs. The pointers: read by all stages; then written by one of them, in this order.
MODEL = _structure(
    ("arrays", "const Array*"),
    ("params", "const u64*"),
    ("out", "const u64*"),  # what parameters are written to; null: they are written in place
    ("grads", "const u64*"),
    ("rows", "const Row*"),
    ("groups", "const Group*"),
    ("pieces", "const Piece*"),
    ("hyper", "const double*"),
    ("operations", "const int*"),
    ("constants", "const double*"),
    ("weights", "const double*"),  # of the third sum, of shape (rows, 3); null: as the groups' rules say
    ("written", "const bool*"),  # null: `bad` and `found_inf` decide
    ("found_inf", "const float*"),  # may be null
    ("partial", "Sums*"),
    ("norm", "double*"),
    ("S", "Sums*"),
    ("C", "double*"),
    ("gamma", "double*"),
    ("bad", "int*"),
    ("refusing", "int*"),
    ("first", "bool*"),
    ("previous_lr", "double*"),
    ("counts", "i64*"),
    ("row_count", "i4"),
    ("piece_count", "i4"),
    ("third", "i4"),  # whether a rule reads the third sum
    ("clips", "i4"),  # whether gradients are clipped by their norm
    ("third_is_clipped", "i4"),  # whether that norm is known when the third sum is taken
    ("decides", "i4"),  # whether coefficients are computed and the step is decided on here
)

_ROOM = (PARAMETER_BYTES - 64) // 8
WORDS = _structure(("first", "i4"), ("count", "i4"), ("at", "u8", _ROOM))

STRUCTURES = {"Array": ARRAY, "Row": ROW, "Group": GROUP, "Piece": PIECE, "Model": MODEL, "Words": WORDS}


# As NumPy has it: subnormal numbers count, every operation is rounded, and a * b + c is two of them.
OPTIONS = ("--std=c++17", "--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true")

# The kernels that are there once, for a Model; and those for each two types, with their arguments behind it.
COMMON = ("gradient_norm", "coefficients")
_OF_TYPES = {"sums": ("first",), "apply": ("first", "count", "last")}


def pair_name(stage: str, parameter: str, gradient: str) -> str:
    """Return the name of a kernel, "sums" or "apply", for parameters and gradients of these element types."""
    return f"{stage}_{parameter}_{gradient}"


def source(pairs: Iterable[tuple[str, str]], **numbers: int) -> str:
    """Return the whole source.

    Parameters
    ----------
    pairs : iterable of tuple (str, str)
        The element types of parameters and gradients, names in `ELEMENTS`, for which there shall be kernels.
    **numbers : int
        THREADS, ROWS or SLOTS, if other than those above.

    Returns
    -------
    str
        What this file knows, then cuda.cu, then the kernels for the types, and what host and device must agree on.
    """
    constants = {"THREADS": THREADS, "ROWS": ROWS, "SLOTS": SLOTS} | numbers
    declared = [f"struct {name};" for name in (*STRUCTURES, "Sums")]
    before = [
        "typedef long long i64; typedef unsigned long long u64;",
        *(f"const int {name} = {value};" for name, value in constants.items()),
        _enum("Field", [name.upper() for name in GIVEN], end="FIELDS"),
        _enum("Input", [*(name.upper() for name in INPUTS[:4])], end="HYPER"),
        f"const int FIRST = {INPUTS.index('first')}, PREVIOUS_LR = {INPUTS.index('previous_lr')};",
        f"const int INPUTS = {len(INPUTS)};",
        _enum("Operation", [name.upper() for name in OPERATIONS]),
        _enum("Policy", [name.upper() for name in NONFINITE]),
        _enum("NormOf", [name.upper().replace(" ", "_") for name in NORM_OF]),
        f"const int BAD_GRADIENT = {GRADIENT}, BAD_PARAMETER = {PARAMETER}, BAD_UPDATE = {UPDATE}, KINDS = {KINDS};",
        *declared,
        *(_twin(name, dtype) for name, dtype in STRUCTURES.items()),
        '#line 1 "cuda.cu"',
    ]
    after = [_kernel(stage, *pair) for pair in pairs for stage in _OF_TYPES]
    after += [line for name, dtype in STRUCTURES.items() for line in _agreements(name, dtype)]
    after += ['static_assert(sizeof(Sums) == 24, "S has three columns");']
    code = files("lars_array.kernels").joinpath("cuda.cu").read_text(encoding="utf-8")
    return "\n".join([*before, code, *after]) + "\n"


def _kernel(stage: str, parameter: str, gradient: str) -> str:
    types = f"{ELEMENTS[parameter]}, {ELEMENTS[gradient]}"
    arguments = _OF_TYPES[stage]
    return (
        f'extern "C" __global__ void __launch_bounds__(THREADS) {pair_name(stage, parameter, gradient)}'
        f"(Model m, {', '.join(f'int {name}' for name in arguments)}) "
        f"{{ {stage}<{types}>(m, {', '.join(arguments)}); }}"
    )


def _enum(name: str, members: list[str], end: str | None = None) -> str:
    return f"enum {name} {{ {', '.join([*members, *([end] if end else [])])} }};"


def _twin(name: str, dtype: np.dtype[Any]) -> str:
    assert dtype.fields is not None and dtype.metadata is not None
    lines = []
    for field, (kind, *_) in dtype.fields.items():
        written = dtype.metadata["types"][field]
        lines.append(f"{_TYPES.get(written, written)} {field}{''.join(f'[{length}]' for length in kind.shape)};")
    return f"struct {name} {{ {' '.join(lines)} }};"


def _agreements(name: str, dtype: np.dtype[Any]) -> list[str]:
    assert dtype.fields is not None
    sizes = [f"sizeof({name}::{field}) == {kind.itemsize}" for field, (kind, *_) in dtype.fields.items()]
    offsets = [f"offsetof({name}, {field}) == {found[1]}" for field, found in dtype.fields.items()]
    known, others = (
        [f'static_assert({x}, "{name}");' for x in what]
        for what in ((f"sizeof({name}) == {dtype.itemsize}", *sizes), offsets)
    )
    return [*known, "#ifndef __CUDACC_RTC__  // which has no offsetof", *others, "#endif"]
