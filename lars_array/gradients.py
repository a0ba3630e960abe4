"""The gradients of a step: found by name or by order, and refused where they don't fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter, call, is_
from typing import Any
from weakref import ref

import numpy as np

from lars_array.arrays import changed_in_place, check_gradient
from lars_array.dtypes import gradient_fits
from lars_array.looks import Look, Looks
from lars_array.memory import Spans, check_writable
from lars_array.parameters import Position, Positions, is_pair, listed

__all__ = ["Fit", "given_order", "match", "match_gradients"]

_DTYPE = attrgetter("dtype")


def given_order(names: Sequence[str]) -> list[int] | None:
    """Return where in an iterable of gradients the one of each name stands, None for the order of the names.

    Parameters without a name may stand in another order than they were given in, after `param_groups` say: gradients
    don't.
    """
    if isinstance(names, Positions):
        return None
    places = [int(name) if isinstance(name, Position) else i for i, name in enumerate(names)]
    return places if sorted(places) == list(range(len(names))) != places else None


def match_gradients(grads: Any, names: Sequence[str], order: Sequence[int] | None) -> list[Any]:
    """Return a gradient, or None, for each name.

    Parameters
    ----------
    grads : mapping or iterable
        By name; or one a parameter, in the order in which parameters were given.
    names : sequence of str
        The names of all parameters.
    order : sequence of int, or None
        Their `given_order`.

    Returns
    -------
    list
        In the order of `names`; NumPy's scalars have become arrays.

    Raises
    ------
    ValueError
        For unknown or missing names, or another number of gradients than of parameters.
    TypeError
        If `grads` is neither a mapping nor an iterable of gradients.
    """
    found = match(grads, names, order)
    if set(map(type, found)) == {np.ndarray}:
        return found
    return [np.asarray(g) if isinstance(g, np.generic) else g for g in found]


def match(given: Any, names: Sequence[str], order: Sequence[int] | None, what: str = "grads") -> list[Any]:
    """Do what `match_gradients` does, of anything that is given in the form of gradients; `what` it is called."""
    if not isinstance(given, Mapping):
        given = listed(given, what)
        if not given or not all(is_pair(item) for item in given):
            if len(given) != len(names):
                raise ValueError(
                    f"{what} must hold one entry for each of the {len(names)} parameters; got {len(given)}"
                )
            return given if order is None else [given[place] for place in order]
        if len({name for name, _ in given}) < len(given):
            raise ValueError(f"{what} must hold each name once; got {[name for name, _ in given]!r}")
        given = dict(given)
    known = set(names)
    unknown = [name for name in given if name not in known]
    missing = [name for name in names if name not in given]
    if unknown:
        raise ValueError(f"{what} must be named as the parameters are; got the unknown name {unknown[0]!r}")
    if missing:
        raise ValueError(
            f"{what} must hold every parameter, with None for one to be skipped; {missing[0]!r} is missing"
        )
    return [given[name] for name in names]


class Fit:
    """What the gradients of some parameters must be; asked at every step, so what fitted once is asked no more.

    Parameters
    ----------
    names, params : sequences
        The parameters.
    kernel : type
        One of `lars_array.kernels`. If it has no ``addresses`` all gradients are looked at one by one.

    Attributes
    ----------
    dtypes : callable
        Returns those of the gradients that were checked last. Another object only where they may have changed.
    """

    def __init__(self, names: Sequence[str], params: Sequence[Any], kernel: Any) -> None:
        self.names, self.params = names, params
        self.dtypes: Callable[[], list[Any]] = lambda: list(map(_DTYPE, params))
        self._addresses: Any = getattr(kernel, "addresses", None)
        self._near = isinstance(params[0], np.ndarray)
        self._forms = None if self._addresses is not None else [(p.dtype, p.shape) for p in params]
        self._seen: Sequence[Any] = []
        self._seen_by: Any = None
        self._seen_at: Any = None
        if self._addresses is not None:
            self._looks_of = getattr(kernel, "looks", lambda arrays: Looks(arrays, kernel.addresses))
            self._params, self._places = self._looks_of(params), self._addresses(params)
            self._grads: Any = None
            self._out: Any = None
            self._room: Any = None  # where arrays begin that parameters may move to

    def check(self, grads: Sequence[Any], written: Spans) -> Any:
        """Refuse gradients that don't fit, and parameters that are no longer what they were.

        Parameters
        ----------
        grads : sequence of arrays
            One a parameter.
        written : Spans
            Everything that a step writes to.

        Returns
        -------
        array of shape (arrays,) or None
            Where the gradients begin, if they are dense.

        Raises
        ------
        ValueError, TypeError
            Naming the parameter.
        """
        starts = None if self._addresses is None else self._if_plain(grads, written)
        if starts is not None:
            return starts
        self._check_parameters()
        for name, p, g in zip(self.names, self.params, grads, strict=True):
            check_gradient(name, g, p)
            if isinstance(p, np.ndarray) and not p.flags.writeable:
                check_writable(name, p)
            owner = written.owner(g)
            if owner is not None:
                raise ValueError(f"the gradient of {name!r} must not share memory with {owner}")
        dtypes = list(map(_DTYPE, grads))
        if dtypes != self.dtypes():
            self.dtypes = lambda: dtypes
            self._grads = self._seen_by = None  # gradients that look as they did before this step are of other types
        return None

    def room(self, out: Sequence[Any], starts: Any) -> tuple[Any, Any] | None:
        """Return where arrays that parameters are to move to begin and end, and where gradients do that `start` so.

        Of shape (arrays, 2) each. None where it is not certain that the arrays fit.
        """
        self._room = None
        if self._addresses is None or starts is None:
            return None
        found = self._seen_as(self._out, out, lambda p, x: p.dtype == x.dtype and x.writeable)
        if found is None:
            return None
        self._out, self._room = found
        both = (self._out, self._room), (self._grads, starts)
        room, read = (np.stack([begin, begin + looks.nbytes[looks.which]], axis=1) for looks, begin in both)
        return room, read

    def move(self, params: Sequence[Any]) -> None:
        """Know that the parameters are other arrays now, of the same shapes and types."""
        self.params = params
        if self._addresses is not None and self._room is None:
            self._params, self._places = self._looks_of(params), self._addresses(params)
        elif self._addresses is not None:
            self._params, self._places = self._out, self._room

    def _check_parameters(self) -> None:
        """Refuse NumPy arrays that were changed in place: kernels and momentum buffers know them as they were."""
        if self._forms is not None:
            for name, form, p in zip(self.names, self._forms, self.params, strict=True):
                if form != (p.dtype, p.shape):
                    raise changed_in_place(name, *form, p)
            return
        now = zip(self.params, self._addresses(self.params).tolist(), strict=True)
        known = zip((self._params.known[k] for k in self._params.which.tolist()), self._places.tolist(), strict=True)
        for name, (look, place), (p, today) in zip(self.names, known, now, strict=True):
            if (look.dtype, look.shape, look.strides, place) != (p.dtype, p.shape, p.strides, today):
                raise changed_in_place(name, look.dtype, look.shape, p)

    def _if_plain(self, grads: Sequence[Any], written: Spans) -> Any:
        """Return where gradients begin if all is well for certain; those that look as they did are not asked again."""
        same = written is self._seen_by and len(grads) == len(self._seen)
        if not self._near and same and all(map(is_, grads, map(call, self._seen))):
            return self._seen_at  # unlike NumPy's, these arrays stay what they are
        found = self._seen_as(self._grads, grads, lambda p, g: gradient_fits(p.dtype, g.dtype) and p.writeable)
        if found is None:
            return None
        looks, starts = found
        if looks is not self._grads:
            self._grads, self.dtypes = looks, looks.dtypes
            self._seen_by = None
        stay = self._params.places(self.params)
        if stay is None or not _are_same(stay, self._places):
            return None
        if written is not self._seen_by or not _are_same(starts, self._seen_at):
            if not written.are_clear(starts, starts + looks.nbytes[looks.which]):
                return None
        seen = [] if self._near else list(map(ref, grads))
        self._seen, self._seen_by, self._seen_at = seen, written, starts  # at once: an interrupt may come at a call
        return starts

    def _seen_as(
        self, known: Looks | None, arrays: Sequence[Any], fits: Callable[[Look, Look], bool]
    ) -> tuple[Looks, Any] | None:
        """Return how arrays look, `known` if that is still so, and where they begin.

        None where it is not certain that each is dense and of the parameter's library, shape and device, and that it
        `fits` a parameter that looks so.
        """
        places = None if known is None else known.places(arrays)
        if known is not None and places is not None:
            return known, places
        if set(map(type, arrays)) != {type(self.params[0])}:
            return None
        looks = self._looks_of(arrays)
        for k, j in set(zip(self._params.which.tolist(), looks.which.tolist(), strict=True)):
            p, x = self._params.known[k], looks.known[j]
            if not (x.dense and p.shape == x.shape and p.device == x.device and fits(p, x)):
                return None
        return looks, self._addresses(arrays)


def _are_same(places: Any, others: Any) -> bool:
    """Return whether addresses are the same. With nothing in cache it takes NumPy ten times as long to compare them."""
    return bool(places.tobytes() == others.tobytes())
