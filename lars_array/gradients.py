"""The gradients of a step: found by name or by order, and refused where they don't fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter, call, is_
from typing import Any
from weakref import ref

import numpy as np

from lars_array.arrays import check_gradient
from lars_array.dtypes import gradient_fits
from lars_array.memory import Spans, check_writable, one_of_each
from lars_array.parameters import Position, is_pair, listed

__all__ = ["Fit", "given_order", "match", "match_gradients"]

_DTYPE, _SHAPE, _DENSE = attrgetter("dtype"), attrgetter("shape"), attrgetter("flags.forc")
_DEVICE = attrgetter("device")
_SIZE, _WRITEABLE, _STRIDES = attrgetter("nbytes"), attrgetter("flags.writeable"), attrgetter("strides")


def given_order(names: Sequence[str]) -> list[int] | None:
    """Return where in an iterable of gradients the one of each name stands, None for the order of the names.

    Parameters without a name may stand in another order than they were given in, after `param_groups` say: gradients
    don't.
    """
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
    """What the gradients of some parameters must be; asked at every step, so built once.

    Parameters
    ----------
    names, params : sequences
        The parameters.
    addresses : callable, optional
        ``addresses(arrays) -> array`` of where the data of arrays begin, those of NumPy or of CuPy. Without it all is
        looked at one by one.

    Attributes
    ----------
    dtypes : list
        Those of the gradients that were checked last: another list only where they have changed.
    """

    def __init__(
        self, names: Sequence[str], params: Sequence[Any], addresses: Callable[[Sequence[Any]], Any] | None
    ) -> None:
        self.names, self.params, self.addresses = names, params, addresses
        self._kind, self._near = type(params[0]), type(params[0]) is np.ndarray
        self._seen: Sequence[Any] = []
        self._seen_by: Any = None
        self._seen_at: Any = None
        self._room: Any = None  # where arrays begin that parameters may move to
        self._dtypes = self.dtypes = list(map(_DTYPE, params))
        if addresses is not None:
            self._shapes = one_of_each(map(_SHAPE, params))
            self._strides: list[Any] | None = one_of_each(map(_STRIDES, params))
            self._nbytes = one_of_each(map(_SIZE, params))
            self._lengths = np.array(self._nbytes)  # of the gradients
            self._places = addresses(params)

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
        starts = None if self.addresses is None else self._if_plain(grads, written, self.addresses)
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
        self._note(list(map(_DTYPE, grads)))
        return None

    def room(self, out: Sequence[Any], starts: Any) -> tuple[Any, Any] | None:
        """Return where arrays that parameters are to move to begin and end, and where gradients do that `start` so.

        Of shape (arrays, 2) each. None where it is not certain that the arrays fit.
        """
        self._room = None
        if self.addresses is None or starts is None or set(map(type, out)) != {self._kind}:
            return None
        if not (
            list(map(_DTYPE, out)) == self._dtypes
            and list(map(_SHAPE, out)) == self._shapes
            and all(map(_DENSE, out))
            and (all(map(_WRITEABLE, out)) if self._near else self._are_in_one_place(out))
        ):
            return None
        self._room = room = self.addresses(out)
        return np.stack([room, room + self._nbytes], axis=1), np.stack([starts, starts + self._lengths], axis=1)

    def move(self, params: Sequence[Any]) -> None:
        """Know that the parameters are other arrays now, of the same shapes and types."""
        self.params = params
        if self.addresses is not None:
            self._strides, self._places = None, self.addresses(params) if self._room is None else self._room

    def _note(self, dtypes: list[Any]) -> None:
        """Note which dtypes the gradients have, all of which fit."""
        if dtypes == self.dtypes:
            return
        self.dtypes = self._dtypes if dtypes == self._dtypes else dtypes
        if self.addresses is not None:
            kinds = zip(self._nbytes, self._dtypes, dtypes, strict=True)
            self._lengths = np.array([nbytes // p.itemsize * g.itemsize for nbytes, p, g in kinds])

    def _check_parameters(self) -> None:
        """Refuse NumPy arrays that were changed in place: kernels and momentum buffers know them as they were."""
        if self.addresses is None:
            return
        now = zip(self.params, self.addresses(self.params).tolist(), strict=True)
        found = [(p.dtype, p.shape, p.strides, place) for p, place in now]
        strides = self._strides or list(map(_STRIDES, self.params))
        known = zip(self._dtypes, self._shapes, strides, self._places.tolist(), strict=True)
        for name, then, today in zip(self.names, known, found, strict=True):
            if then != today:
                raise ValueError(
                    f"parameter {name!r} must keep its memory, shape and dtype; it had shape {then[1]!r} and dtype "
                    f"{then[0]!r}, and now, or elsewhere, has {today[1]!r} and {today[0]!r}"
                )

    def _if_plain(self, grads: Sequence[Any], written: Spans, addresses: Callable[[Sequence[Any]], Any]) -> Any:
        """Return where gradients begin if all is well for certain, at a tenth of a microsecond a question and array."""
        same = written is self._seen_by and len(grads) == len(self._seen)
        if not self._near and same and all(map(is_, grads, map(call, self._seen))):
            return self._seen_at  # unlike NumPy's, these arrays stay what they are
        if set(map(type, grads)) != {self._kind}:
            return None
        dtypes = list(map(_DTYPE, grads))
        if dtypes != self.dtypes:
            if not all(gradient_fits(p, g) for p, g in set(zip(self._dtypes, dtypes, strict=True))):
                return None
            self._note(dtypes)
        if not (
            self._dtypes == list(map(_DTYPE, self.params))
            and list(map(_SHAPE, grads)) == self._shapes
            and list(map(_SIZE, self.params)) == self._nbytes
            and all(map(_DENSE, grads))
            and (all(map(_WRITEABLE, self.params)) if self._near else self._are_in_one_place(grads))
        ):
            return None
        starts = addresses(grads)
        stay = np.array_equal(addresses(self.params), self._places)
        clear = stay and written.are_clear(starts, starts + self._lengths)
        if not self._near:
            self._seen, self._seen_by, self._seen_at = list(map(ref, grads)) if clear else [], written, starts
        return starts if clear else None

    def _are_in_one_place(self, grads: Sequence[Any]) -> bool:
        place = self.params[0].device
        return all(found == place for found in map(_DEVICE, grads))
