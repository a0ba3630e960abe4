"""Rules as lists of operations on single numbers, which a kernel executes layer by layer without calling Python.

A rule is neither parsed nor rewritten: it is called with symbols in place of arrays, which record the operations. Only
exact and correctly rounded operations are recorded, so a tape gives the same bits as its rule.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np

from lars_array.core import BOOLEANS, Hyper, Rule, coefficients

__all__ = ["INPUTS", "OPERATIONS", "Tape", "record"]

# The inputs of a tape, in this order: numbers, with 0 or 1 for booleans.
INPUTS = ("p_squares", "g_squares", "third_sum", "gamma", *Hyper._fields)

# NumPy's names; an operation's code is its index. "where" has three operands, "sqrt" and "absolute" have one.
OPERATIONS = ("add", "subtract", "multiply", "divide", "less", "less_equal", "equal", "where", "sqrt", "absolute")


class Tape:
    """`core.coefficients` for one layer, as operations on registers.

    Parameters
    ----------
    operations : int64 array of shape (operations, 4)
        The code of each operation, and the registers of up to three operands. Registers hold the inputs, then the
        constants, then the result of each operation.
    constants : float64 array of shape (constants,)
        The constants in the rule.
    outputs : int64 array of shape (6,)
        The registers of the coefficients.
    """

    def __init__(self, operations: Any, constants: Any, outputs: Any) -> None:
        self.operations, self.constants, self.outputs = operations, constants, outputs

    @cached_property
    def reads_previous_lr(self) -> bool:
        """Whether the outputs depend on the learning rate of the step before."""
        register = INPUTS.index("previous_lr")
        return bool((self.operations[:, 1:] == register).any() or (self.outputs == register).any())


# By the identity of a rule's function, which may be equal to another or unhashable; entries end with the function.
_recorded: dict[int, tuple[Callable[[], Any], Tape | None]] = {}


def record(rule: Rule) -> Tape | None:
    """Return the tape of a rule.

    Parameters
    ----------
    rule : Rule
        A pure function; it is called for a model of two layers and for one of three.

    Returns
    -------
    Tape or None
        The same object at each call. None where the rule can't be recorded, because it depends on other layers,
        branches on values, or uses a function beyond arithmetic, comparison, ``where``, ``sqrt`` and ``abs``.
    """
    key = id(rule.function)
    if key not in _recorded or _recorded[key][0]() is not rule.function:
        tape = _noted(rule, 2)
        if tape is not None and not _same(tape, _noted(rule, 3)):
            tape = None

        def forget(_: Any) -> None:
            _recorded.pop(key, None)

        try:
            _recorded[key] = weakref.ref(rule.function, forget), tape
        except TypeError:  # the function supports no weak reference: its tape is recorded at each call
            return tape
    return _recorded[key][1]


def _noted(rule: Rule, layers: int) -> Tape | None:
    notes = _Notes(layers)
    inputs = [_Symbol(notes, i, name in (*BOOLEANS, "first")) for i, name in enumerate(INPUTS)]
    try:
        C = coefficients(_Columns(inputs[:3]), Hyper(*inputs[4:]), [rule], inputs[3], xp=np)
        return notes.tape([notes.register(column) for column in C.columns])
    except Exception:  # a user's function may fail in any way on symbols, and still work on arrays
        return None


def _same(tape: Tape, other: Tape | None) -> bool:
    def content(x: Tape) -> list[bytes]:
        return [x.operations.tobytes(), x.constants.tobytes(), x.outputs.tobytes()]

    return other is not None and content(tape) == content(other)


class _Notes:
    """The constants and operations recorded so far, each once."""

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.constants: dict[str, int] = {}  # by their hex form, which distinguishes -0.0 from 0.0
        self.operations: dict[tuple[int, ...], int] = {}

    def register(self, x: Any) -> int:
        """Return the register of a symbol or number; negative for constants, whose final number is not known yet."""
        if isinstance(x, _Symbol):
            return x.register
        return self.constants.setdefault(float(x).hex(), -1 - len(self.constants))

    def note(self, operation: str, *operands: Any, boolean: bool = False) -> _Symbol:
        row = (OPERATIONS.index(operation), *map(self.register, operands))
        return _Symbol(self, self.operations.setdefault(row, len(INPUTS) + len(self.operations)), boolean)

    def tape(self, outputs: Sequence[int]) -> Tape:
        """Return the operations that the outputs depend on."""
        used = set(outputs)
        rows = dict(enumerate(self.operations, len(INPUTS)))
        for register, row in reversed(rows.items()):
            if register in used:
                used.update(row[1:])
        order = {register: k for k, register in enumerate(filter(used.__contains__, rows))}

        def place(register: int) -> int:
            if register < 0:
                return len(INPUTS) - 1 - register
            return register if register < len(INPUTS) else len(INPUTS) + len(self.constants) + order[register]

        kept = [[row[0], *map(place, row[1:]), *[0] * (4 - len(row))] for row in map(rows.__getitem__, order)]
        return Tape(
            np.array(kept, np.int64).reshape(-1, 4),
            np.array([float.fromhex(constant) for constant in self.constants], np.float64),
            np.array([place(register) for register in outputs], np.int64),
        )


class _Symbol(np.lib.mixins.NDArrayOperatorsMixin):
    """A register in place of an array of shape (layers,); NumPy passes it all operations on itself."""

    ndim = 1

    def __init__(self, notes: _Notes, register: int, boolean: bool) -> None:
        self.notes, self.register, self.boolean = notes, register, boolean
        self.shape = (notes.layers,)

    def __bool__(self) -> bool:
        raise TypeError("a symbol has no value; rules branch with xp.where")

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("a symbol must not become an array, whose operations are not recorded")

    def __array_ufunc__(self, ufunc: Any, method: str, *operands: Any, **options: Any) -> Any:
        plain = all(isinstance(x, (_Symbol, float, int)) for x in operands)
        if method != "__call__" or options or not plain or ufunc.__name__ not in _UFUNCS:
            return NotImplemented
        return _UFUNCS[ufunc.__name__](self.notes.note, *operands)

    def __array_function__(self, function: Any, types: Any, operands: Any, options: Any) -> Any:
        name = function.__name__
        if name == "where" and len(operands) == 3:
            return _where(self.notes.note, *operands)
        if name in ("zeros_like", "ones_like") and not options:
            constant = self.notes.register(1.0 if name == "ones_like" else 0.0)
            return _Symbol(self.notes, constant, self.boolean)
        if name == "stack" and options in ({"axis": 1}, {"axis": -1}):
            return _Columns(list(operands[0]))
        return NotImplemented


class _Columns(np.lib.mixins.NDArrayOperatorsMixin):
    """Symbols in place of an array of shape (layers, columns)."""

    dtype, ndim = np.dtype(np.float64), 2

    def __init__(self, columns: Sequence[Any]) -> None:
        if not all(isinstance(column, _Symbol) for column in columns):
            raise TypeError("columns must be arrays of shape (layers,)")
        self.columns = columns
        self.shape = (*columns[0].shape, len(columns))

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("symbols must not become an array, whose operations are not recorded")

    def __getitem__(self, key: Any) -> Any:
        rows, column = key
        if rows != slice(None) or not isinstance(column, int):
            raise TypeError("a rule is recorded for any one layer, it can only take columns")
        return self.columns[column]

    def __array_ufunc__(self, ufunc: Any, method: str, *operands: Any, **options: Any) -> Any:
        if method != "__call__" or options or not all(isinstance(x, (_Columns, float, int)) for x in operands):
            return NotImplemented
        each = [x.columns if isinstance(x, _Columns) else [x] * self.shape[1] for x in operands]
        return _Columns([ufunc(*column) for column in zip(*each, strict=True)])


_Note = Callable[..., _Symbol]


def _is_boolean(x: Any) -> bool:
    return x.boolean if isinstance(x, _Symbol) else isinstance(x, bool)


def _arithmetic(operation: str, note: _Note, *operands: Any) -> _Symbol:
    if all(map(_is_boolean, operands)):
        raise TypeError("arithmetic on booleans alone is logic, or float16")
    return note(operation, *operands)


def _negative(note: _Note, a: Any) -> _Symbol:
    if _is_boolean(a):
        raise TypeError("NumPy does not negate booleans")
    return note("multiply", a, -1.0)


def _compare(operation: str, note: _Note, a: Any, b: Any) -> _Symbol:
    return note(operation, a, b, boolean=True)


def _logic(note: _Note, a: Any, if_true: Any, if_false: Any) -> _Symbol:
    if not all(map(_is_boolean, (a, if_true, if_false))):
        raise TypeError("&, | and ~ of numbers are operations on bits")
    return note("where", a, if_true, if_false, boolean=True)


def _where(note: _Note, condition: Any, a: Any, b: Any) -> _Symbol:
    if not _is_boolean(condition) or not all(isinstance(x, (_Symbol, float, int)) for x in (a, b)):
        raise TypeError("where takes a boolean and two numbers")
    return note("where", condition, a, b, boolean=_is_boolean(a) and _is_boolean(b))


def _power(note: _Note, a: Any, exponent: Any) -> _Symbol:
    if exponent != 2:
        raise TypeError("powers other than the square are not correctly rounded")
    return _arithmetic("multiply", note, a, a)


# NumPy's functions by name, in terms of the operations. Booleans are 0 and 1.
_UFUNCS: dict[str, Callable[..., _Symbol]] = {
    **{name: partial(_arithmetic, name) for name in ("add", "subtract", "multiply", "divide", "sqrt", "absolute")},
    **{name: partial(_compare, name) for name in ("less", "less_equal", "equal")},
    "greater": lambda note, a, b: _compare("less", note, b, a),
    "greater_equal": lambda note, a, b: _compare("less_equal", note, b, a),
    "not_equal": lambda note, a, b: _logic(note, _compare("equal", note, a, b), False, True),
    "bitwise_and": lambda note, a, b: _logic(note, a, b, False),
    "bitwise_or": lambda note, a, b: _logic(note, a, True, b),
    "invert": lambda note, a: _logic(note, a, False, True),
    "negative": _negative,
    "square": lambda note, a: _arithmetic("multiply", note, a, a),
    "power": _power,
}
