"""Who sits in which slot: the plan of a cohort, in numbers of rows alone.

Four rules.  The higher priority goes first.  Among equals the longest sits down first, so that no long user is left
over at the end (Graham's LPT, 1969); a micro-step of waiting counts as a row, so that nobody waits for ever.  A user
of a few rows does not wait for longer ones: half of the slots are such users' before anybody's, and where none is
free they take those of whoever has the most left, who is taken aside.  Slots that are still free read further rows of
the seated.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

FEW = 8  # rows: a user who needs no more is seated at once
GATHERED = 16  # micro-steps that an examination waits for others, at most
EXAMINED = 8  # micro-steps of examinations in a row, at most, while anybody learns
COST = 0.25  # of a slot that an examination leaves empty, over one that stands empty while others learn
STARVED = 64 * FEW  # micro-steps: who has waited that long goes before users of a few rows, and keeps its slot ...
HOLD = GATHERED + 2 * FEW  # ... for so many micro-steps: an examination may have to wait in them


@dataclass(frozen=True)
class Standing:
    """What the plan knows of a user: rows left to read, priority, micro-steps waited, how many it keeps its slot."""

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


def express(slots: int) -> int:
    """How many slots users of a few rows have before anybody else."""
    return max(1, slots // 2)


def turns(free: int, seated: Sequence[Standing], waiting: Sequence[Standing], slots: int) -> list[int]:
    """Who sits down in the free slots, by number among those who wait."""
    hasty, patient = (deque(_order(waiting, few)) for few in (True, False))
    places = express(slots) - sum(one.few for one in seated)
    chosen: list[int] = []
    while len(chosen) < free and (hasty or patient):
        first = waiting[patient[0]] if patient else None
        hurry = hasty and (first is None or (places > 0 and not first.starved))
        if hasty and first and waiting[hasty[0]].priority != first.priority:
            hurry = waiting[hasty[0]].priority > first.priority
        places -= bool(hurry)
        chosen.append((hasty if hurry else patient).popleft())
    return chosen


def _order(waiting: Sequence[Standing], few: bool) -> list[int]:
    keys = [(-one.priority, -(one.rows_left + one.waited), n) for n, one in enumerate(waiting) if one.few == few]
    return [number for *_, number in sorted(keys)]


def urgent(comer: Standing, seated: Sequence[Standing]) -> bool:
    """Whether a user who waits may take somebody's slot at all: a long queue need not be sorted for the rest."""
    return comer.few or comer.priority > min(one.priority for one in seated)


def swaps(seated: Sequence[Standing], waiting: Sequence[Standing], slots: int) -> list[tuple[int, int]]:
    """Who is taken aside for whom when no slot is free, as pairs of numbers (seated, waiting)."""
    places = express(slots) - sum(one.few for one in seated)
    victims = sorted(range(len(seated)), key=lambda number: (seated[number].priority, -seated[number].rows_left))
    victims = [number for number in victims if not seated[number].few and not seated[number].hold]
    comers = sorted(
        range(len(waiting)), key=lambda number: (-waiting[number].priority, -waiting[number].waited, number)
    )
    pairs: list[tuple[int, int]] = []
    for number in comers:
        if len(pairs) == len(victims):
            break
        victim, comer = seated[victims[len(pairs)]], waiting[number]
        hurry = comer.few and comer.priority == victim.priority and len(pairs) < places
        if comer.priority > victim.priority or hurry:
            pairs.append((victims[len(pairs)], number))
    return pairs


def lanes(pending: Sequence[int], rows_left: Sequence[int], free: int) -> list[int]:
    """How many of the free slots each seated user reads further rows in, the longest first.

    `pending` counts the rows that each could read now, its own slot's among them.
    """
    lent = [0] * len(pending)
    for number in sorted(range(len(pending)), key=lambda number: (-rows_left[number], number)):
        lent[number] = min(max(0, pending[number] - 1), free)
        free -= lent[number]
    return lent


class Rota:
    """Whose turn a micro-step is: of those who learn, or of those who are examined, which takes no backward pass.

    Examinations wait for one another, to fill all slots of a forward pass; but only until slots that stand empty
    meanwhile have cost as much as those that going at once would leave empty (the rule for renting skis; Karlin et
    al., "Competitive snoopy caching", 1988).
    """

    def __init__(self) -> None:
        self._examined = self._waited = self._empty = 0

    def examines(self, pending: Sequence[int], learners: int, slots: int) -> bool:
        """Whether the next micro-step examines.  `pending` counts the rows of each who is to be examined."""
        due = self._empty >= COST * (slots - sum(pending)) and self._examined < EXAMINED
        if not learners or (pending and (due or self._waited >= GATHERED)):
            self._examined, self._waited, self._empty = self._examined + 1, 0, 0
            return True
        self._examined = 0
        self._waited, self._empty = (self._waited + 1, self._empty) if pending else (0, 0)
        return False

    def note_empty(self, slots: int) -> None:
        """So many slots of those who wait to be examined were read in by nobody."""
        self._empty += slots
