"""Who steps the rows of a roster: what is known of their memory and of a device, from one step to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lars_array import kernels
from lars_array.arrays import at_home, is_array, is_distant, listed
from lars_array.buffers import Rows
from lars_array.distant import DistantLayers, Whereabouts, refused
from lars_array.layers import Layers, Taken
from lars_array.memory import Spans
from lars_array.moves import Move, Surroundings
from lars_array.news import News
from lars_array.roster import Roster

__all__ = ["Stepper"]


class Stepper:
    """Takes steps, and knows where the layers stand, which on a device only the device does.

    Parameters
    ----------
    roster : Roster
        What is stepped; an empty one, until it is extended.
    kernel : str, optional
        As for `lars_array.LARS`.
    """

    def __init__(self, roster: Roster, kernel: str | None) -> None:
        self.roster = roster
        self.last: Taken | None = None
        self._kernel_name = kernel
        self._kernel: Any = None
        self._layers: Layers | None = None
        self._spans: Spans | None = None
        self._surroundings: Surroundings | None = None
        self._whereabouts: Whereabouts | None = None

    def step(
        self,
        index: Sequence[int],
        grads: list[Any],
        groups: Sequence[Mapping[str, Any]],
        found_inf: Any,
        move: Move | None = None,
    ) -> bool:
        """Take a step with the rows at `index`, and return True; or return False and change nothing.

        Parameters
        ----------
        index : sequence of int
            A range for all rows.
        grads : list of arrays
            One for each of them.
        groups : sequence of mappings
            Complete and checked hyper-parameters of all groups.
        found_inf : number, array of shape () or None
            See `lars_array.LARS.step`.
        move : Move, optional
            Where the parameters go; None: they stay where they are.
        """
        if not index:
            unknown = found_inf is None or (is_array(found_inf) and is_distant(found_inf))
            return unknown or not bool(found_inf)
        roster = self.roster
        with at_home(roster.params[0]):
            if self._layers is None or self._layers.index != index:
                self._layers = self._layers_at(index)
                self._spans = self._surroundings = None  # parameters that sat out may have been changed in place
            layers = self._layers
            self._check(layers, grads, move)
            taken = layers.step(groups, grads, found_inf, None if move is None else move.rows)
            if taken is None:
                return False
            self.last = taken
            if move is not None and self._surroundings is not None:
                roster.move(index, move.rows, move.arrays)
                self._surroundings.follow(layers.place)
                self._spans = None
            if layers.has_new_state:
                self._take_over(layers)
        if self._whereabouts is None:
            roster.previous_lr[layers.place] = _of_layers([group["lr"] for group in groups], layers.group_of)
        return True

    def news(self, *, wait: bool) -> tuple[News, News, int] | None:
        """Return what the device had told of its steps before, what it has told by now, and what was replayed.

        None where no device is asked.
        """
        if self._whereabouts is None:
            return None
        before, now = self._whereabouts.news(wait=wait)
        return before, now, self._whereabouts.replayed() if wait else 0

    def standing(self) -> tuple[Rows, list[float]]:
        """Return the momentum buffers that are used and the last learning rates, one a row; a device is waited for."""
        if self._whereabouts is None:
            return self.roster.buffers.rows, self.roster.previous_lr.tolist()
        with at_home(self.roster.params[0]):
            self._bring_together()
            unused, previous_lr = listed(self._whereabouts.first), listed(self._whereabouts.previous_lr)
        rows = self.roster.buffers.rows
        return rows.at(range(len(rows)), where=~np.array(unused, bool)), previous_lr

    def settle(self) -> None:
        """Bring home what only the device knows, and let the next step begin anew from there."""
        self.roster.buffers.rows, previous_lr = self.standing()
        self.roster.bring_together()  # and so forget the whole of slices that are not used
        self.roster.previous_lr = np.array(previous_lr)
        self._layers = self._spans = self._surroundings = self._whereabouts = None

    def extend(self, roster: Roster) -> None:
        """Step `roster` from now on, which holds the parameters so far and more.

        Raises
        ------
        ValueError
            If the kernel that was asked for can't take them; then nothing was changed.
        """
        kernel = kernels.pick(roster.params, self._kernel_name)
        self.settle()
        roster.inherit(self.roster)
        self.roster, self._kernel = roster, kernel

    def attach(self, state: Mapping[str, Mapping[str, Any]], *, copied: bool = False) -> None:
        """Go on from what `Roster.attach` takes."""
        self.settle()
        self.roster.attach(state, copied=copied)

    def refused(self, news: News) -> Exception:
        """Return the error that tells of the last step that the device has refused."""
        return refused(news, self.roster.names)

    def __getstate__(self) -> dict[str, Any]:
        self.settle()
        last = None if self.last is None else self.last._replace(plan=self.last.planned())
        # Layers and spans hold addresses, and a kernel is what is fastest here: none of them may travel.
        return {"roster": self.roster, "last": last, "_kernel_name": self._kernel_name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._layers = self._spans = self._surroundings = self._whereabouts = None
        if self.roster.stacks:  # slices are no longer views of what they were cut from
            self.roster.rehome()
        self._kernel = kernels.pick(self.roster.params, self._kernel_name)

    def _check(self, layers: Layers, grads: Sequence[Any], move: Move | None) -> None:
        """Refuse gradients, and arrays to move to, that don't fit or share memory with what a step must not touch."""
        if move is None:
            if self._spans is None:
                self._spans = self.roster.spans()
            layers.check(grads, self._spans)
        else:
            if self._surroundings is None:
                self._surroundings = Surroundings(self.roster)
            starts = layers.check(grads, self._surroundings.kept)
            self._surroundings.check(layers.fit, move.rows, grads, starts)

    def _layers_at(self, index: Sequence[int]) -> Layers:
        self._bring_together()
        roster = self.roster
        rows: Any = (roster.buffers.rows, roster.masters.rows, roster.group_of, roster.previous_lr)
        lists: Any = (roster.names, roster.params, roster.labels)
        if not isinstance(index, range):
            rows = [x.at(index) if isinstance(x, Rows) else x[index] for x in rows]
            lists = [[x[i] for i in index] if x else x for x in lists]
        if not is_distant(roster.params[0]):
            return Layers(index, *lists, *rows, kernel=self._kernel)
        if self._whereabouts is None:
            self._whereabouts = Whereabouts(roster.buffers.rows, roster.previous_lr, like=roster.params[0])
        return DistantLayers(index, *lists, *rows, kernel=self._kernel, whereabouts=self._whereabouts)

    def _take_over(self, layers: Layers) -> None:
        self.roster.take_over(layers.index, layers.buffers, layers.masters)
        self._spans = self._surroundings = None
        if self.roster.stacks:
            self._bring_together()
            self.roster.bring_together()
            self._layers = None

    def _bring_together(self) -> None:
        """Put where the layers of the last step stand beside where the others do."""
        if isinstance(self._layers, DistantLayers) and self._whereabouts is not None:
            self._whereabouts.merge(self._layers.index, self._layers.first, self._layers.previous_lr)


def _of_layers(numbers: list[Any], group_of: Any) -> Any:
    """Return the number of each layer's group; one number where all have the same."""
    return numbers[0] if len(numbers) == 1 else np.array(numbers)[group_of]
