"""Who is timed in the same rounds, where memory does not hold the arrays of all.

Contestants have arrays of their own, since an array that another one has just read is in cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.contestant import Contestant

__all__ = ["parties"]


def parties(
    contestants: Sequence[Contestant],
    compared_to: Sequence[str],
    needed: Callable[[Sequence[Contestant]], int],
    room: int,
) -> list[list[Contestant]]:
    """Return all contestants, in one party if they fit, else in several.

    Parameters
    ----------
    contestants : sequence of Contestant
        Who takes part.
    compared_to : sequence of str
        The names of those that take part in every party, so that the others can be compared with them.
    needed : callable
        From contestants to the bytes that they need together.
    room : int
        The bytes there are.

    Returns
    -------
    list of list of Contestant
        Who fits beside none of those is in a party alone; so is who does not fit at all.
    """
    if needed(contestants) <= room:
        return [list(contestants)]
    always = [c for c in contestants if c.name in compared_to]
    found, party = [], list(always)
    for contestant in contestants:
        if contestant in always:
            continue
        if needed([*always, contestant]) > room:
            found.append([contestant])
            continue
        if needed([*party, contestant]) > room:
            found.append(party)
            party = list(always)
        party.append(contestant)
    if len(party) > len(always):
        found.append(party)
    met = {c.name for party in found if len(party) > 1 for c in party}
    return found + [[c] for c in always if c.name not in met]
