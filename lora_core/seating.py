"""Who sits in which slot: the plan of a cohort, in numbers of rows alone.

Four rules.  The higher priority goes first.  Among equals the longest sits down first, so that no long user is left
over at the end (Graham's LPT, 1969); a micro-step of waiting counts as a row, so that nobody waits for ever.  A user
of a few rows does not wait for a longer one: it takes a free slot first, else the slot of whoever has the most left, who
is taken aside, at most a quarter of the slots at a time.  Slots that are still free read further rows of the seated.
"""

from collections.abc import Sequence
from dataclasses import dataclass

FEW = 8  # rows: a user who needs no more is seated at once
STARVED = 64 * FEW  # micro-steps: who has waited that long goes before users of a few rows, and keeps its slot ...
HOLD = 2 * FEW  # ... for so many micro-steps


@dataclass(frozen=True)
class Standing:
    """What the plan knows of a user: rows left to read, priority, micro-steps waited, and how many it keeps its slot."""

    rows_left: int
    priority: int = 0
    waited: int = 0
    hold: int = 0

    @property
    def few(self) -> bool:
        """Whether it is done in a moment."""
        return self.rows_left <= FEW

    @property
    def starved(self) -> bool:
        """Whether it has waited too long."""
        return self.waited >= STARVED


def order(waiting: Sequence[Standing]) -> list[int]:
    """Whose turn it is next, by number."""
    keys = [
        (-one.priority, not one.starved, not one.few, -(one.rows_left + one.waited), number)
        for number, one in enumerate(waiting)
    ]
    return [number for *_, number in sorted(keys)]


def swaps(seated: Sequence[Standing], waiting: Sequence[Standing]) -> list[tuple[int, int]]:
    """Who is taken aside for whom when no slot is free, as pairs of numbers (seated, waiting)."""
    room = max(1, len(seated) // 4) - sum(one.few for one in seated)
    victims = sorted(range(len(seated)), key=lambda number: (seated[number].priority, -seated[number].rows_left))
    victims = [number for number in victims if not seated[number].few and not seated[number].hold]
    pairs: list[tuple[int, int]] = []
    for number in order(waiting):
        if len(pairs) == len(victims):
            break
        victim, comer = seated[victims[len(pairs)]], waiting[number]
        urgent = comer.few and comer.priority == victim.priority and len(pairs) < room
        if comer.priority > victim.priority or urgent:
            pairs.append((victims[len(pairs)], number))
    return pairs


def lanes(pending: Sequence[int], rows_left: Sequence[int], free: int) -> list[int]:
    """How many of the free slots each seated user reads further rows in: the longest first, none beyond its pending rows.

    `pending` counts the rows that each could read now, its own slot's among them.
    """
    lent = [0] * len(pending)
    for number in sorted(range(len(pending)), key=lambda number: (-rows_left[number], number)):
        lent[number] = min(max(0, pending[number] - 1), free)
        free -= lent[number]
    return lent
