"""The source of the CUDA kernels, and its structures: from one table, as NumPy dtypes and in C++."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import Any

import numpy as np

from lars_array.core import NORM_OF, Hyper
from lars_array.kernels.tape import INPUTS, OPERATIONS
from lars_array.nonfinite import CAUSES, POLICIES

__all__ = [
    "BYTES",
    "COMMON",
    "ELEMENTS",
    "OPTIONS",
    "ROWS",
    "SLOTS",
    "STRUCTURES",
    "THREADS",
    "assertions",
    "definition",
    "pair_kernel",
    "pair_name",
    "source",
    "structure",
]

THREADS = 256  # of a block
ROWS = 32  # whose coefficients one block computes
SLOTS = 160  # registers that a tape may use; they fill the shared memory that every device has
PARAMETER_BYTES = 4096  # that a launch may have

# Element types by their names in lars_array._arrays, and in C++.
ELEMENTS = {"float64": "double", "float32": "float", "float16": "float16", "bfloat16": "bfloat16"}
BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}

_TYPES = {"int": "i4", "i64": "i8", "u64": "u8", "double": "f8"}


def structure(*declarations: str) -> np.dtype[Any]:
    """Return the dtype of a C++ structure, given the declarations of its fields; pointers become integers."""
    fields: list[Any] = []
    for declaration in declarations:
        kind, _, name = declaration.rpartition(" ")
        name, _, length = name.rstrip("]").partition("[")
        fields.append((name, "u8" if kind.endswith("*") else _TYPES[kind], *([int(length)] if length else [])))
    return np.dtype(fields, align=True, metadata={"declarations": declarations})


# The memory of one row, cut into pieces of a fixed length. Gradients, whose addresses change, are in their own table.
ARRAY = structure("u64 p", "u64 v", "u64 master", "i64 size", "i64 piece", "int row")

# Pieces that are summed together. The limits are those of lars_array.nonfinite.finite; `param` is the index of the
# row's parameter in the model, `number` that of the row; `keeps`: whether it has a buffer.
ROW = structure(
    "double limit",
    "double square_limit",
    "int first_piece",
    "int pieces",
    "int group",
    "int param",
    "int number",
    "int keeps",
)

GROUP = structure(
    "int norm_of",
    "int policy",
    "int first_operation",
    "int last_operation",
    "int first_constant",
    "int last_constant",
    "int outputs[6]",
)

PIECE = structure("int array", "int index")

# The argument of all launches. Pointers first: read by all stages; then written by one of them, in this order.
MODEL = structure(
    "const Array* arrays",
    "const u64* grads",
    "const Row* rows",
    "const Group* groups",
    "const Piece* pieces",
    "const double* hyper",
    "const int* operations",
    "const double* constants",
    "const double* weights",  # of the third sum, of shape (rows, 3); null: from the groups' rules
    "const bool* taken",  # null: `prevented` and `found_inf` decide
    "const float* found_inf",  # may be null
    "Sums* partial",
    "double* norm",
    "Sums* S",
    "double* C",
    "double* gamma",
    "int* prevented",  # 1 where a row that is not finite prevents the step
    "int* offender",  # the first such row where that is an error; row_count later if its sums of p and g are finite
    "bool* first",
    "double* previous_lr",
    "i64* counts",
    "int row_count",
    "int piece_count",
    "int third",  # whether a rule reads the third sum
    "int clips",  # whether gradients are clipped by their norm
    "int third_is_clipped",  # whether that norm is known when the third sum is taken
    "int decides",  # whether the launches compute coefficients and decide on the step
)

POINTERS = structure("int first", "int count", f"u64 values[{(PARAMETER_BYTES - 64) // 8}]")

STRUCTURES = {"Array": ARRAY, "Row": ROW, "Group": GROUP, "Piece": PIECE, "Model": MODEL, "Pointers": POINTERS}

# As in NumPy: subnormal numbers are kept, every operation is rounded, and a * b + c is two of them.
OPTIONS = ("--std=c++17", "--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true")

# Kernels that exist once; and those for each two types, with their arguments after the Model.
COMMON = ("gradient_norm", "coefficients")
_OF_TYPES = {"sums": ("int first",), "apply": ("int first", "int count", "int last")}


def pair_name(stage: str, parameter: str, gradient: str) -> str:
    """Return the name of a kernel, such as "sums" or "apply", for parameters and gradients of these element types."""
    return f"{stage}_{parameter}_{gradient}"


def source(pairs: Iterable[tuple[str, str]], **numbers: int) -> str:
    """Return the whole source: constants, enums and structures, lars.cu, and the kernels for particular types.

    Parameters
    ----------
    pairs : iterable of tuple (str, str)
        The element types of parameters and gradients, names in `ELEMENTS`, to make kernels for.
    **numbers : int
        Other values for THREADS, ROWS or SLOTS.

    Returns
    -------
    str
        It ends with assertions that the structures have the layout of their dtypes.
    """
    constants = {"THREADS": THREADS, "ROWS": ROWS, "SLOTS": SLOTS} | numbers
    constants |= {name.upper(): INPUTS.index(name) for name in ("first", "previous_lr", "max_ratio_root")}
    constants["INPUTS"] = len(INPUTS)
    before = [
        "typedef long long i64; typedef unsigned long long u64;",
        *(f"const int {name} = {value};" for name, value in constants.items()),
        _enum("Field", Hyper._fields[: Hyper._fields.index("first")], end="FIELDS"),
        _enum("Input", INPUTS[:4], end="HYPER"),
        _enum("Operation", OPERATIONS),
        _enum("Policy", POLICIES),
        _enum("NormOf", NORM_OF),
        _enum("Cause", [f"bad {name}" for name in CAUSES], end="CAUSES"),
        *(f"struct {name};" for name in (*STRUCTURES, "Sums")),
        *(definition(name, dtype) for name, dtype in STRUCTURES.items()),
        '#line 1 "lars.cu"',
    ]
    after = [pair_kernel(stage, *pair, arguments) for pair in pairs for stage, arguments in _OF_TYPES.items()]
    after += [line for name, dtype in STRUCTURES.items() for line in assertions(name, dtype)]
    after += ['static_assert(sizeof(Sums) == 24, "S has three columns");']
    code = files("lars_array.kernels.cuda").joinpath("lars.cu").read_text(encoding="utf-8")
    return "\n".join([*before, code, *after]) + "\n"


def pair_kernel(stage: str, parameter: str, gradient: str, arguments: Sequence[str]) -> str:
    """Return a kernel for two types, which calls the template of its stage with a Model and these arguments."""
    types = f"{ELEMENTS[parameter]}, {ELEMENTS[gradient]}"
    return (
        f'extern "C" __global__ void __launch_bounds__(THREADS) {pair_name(stage, parameter, gradient)}'
        f"(Model m, {', '.join(arguments)}) "
        f"{{ {stage}<{types}>(m, {', '.join(argument.split()[-1] for argument in arguments)}); }}"
    )


def _enum(name: str, members: Sequence[str], end: str | None = None) -> str:
    names = [member.upper().replace(" ", "_") for member in members]
    return f"enum {name} {{ {', '.join([*names, *([end] if end else [])])} }};"


def definition(name: str, dtype: np.dtype[Any]) -> str:
    """Return a structure in C++."""
    assert dtype.metadata is not None
    return f"struct {name} {{ {'; '.join(dtype.metadata['declarations'])}; }};"


def assertions(name: str, dtype: np.dtype[Any]) -> list[str]:
    """Return assertions of the size of a structure and its fields and, where C++ knows them, of their offsets."""
    assert dtype.fields is not None
    sizes = [f"sizeof({name}::{field}) == {kind.itemsize}" for field, (kind, *_) in dtype.fields.items()]
    offsets = [f"offsetof({name}, {field}) == {found[1]}" for field, found in dtype.fields.items()]
    lines = [f'static_assert({x}, "{name}");' for x in (f"sizeof({name}) == {dtype.itemsize}", *sizes, *offsets)]
    lines.insert(len(sizes) + 1, "#ifndef __CUDACC_RTC__  // which has no offsetof")
    return [*lines, "#endif"]
