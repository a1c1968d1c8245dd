"""The room of a cohort: learners who wait, who sits in which slot, and whose rows are read where.

`seating.py` decides by numbers; here its decisions move rows.
"""

import math
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

from torch import Tensor

from lora_core import seating
from lora_core.banks.bank import Bank
from lora_core.cohort import Aside, Cohort
from lora_core.learner import Learner, Lesson, Trained
from lora_core.optim import RowStep, clear_fixed, gradient_norms, step_rows
from lora_core.referee import Answers
from lora_core.saves import Saves
from lora_core.seat import Seat

DRAWERS = min(8, os.cpu_count() or 1)  # threads that draw starts

Lent = tuple[Seat, int, bool]  # whose row, after how many steps, and whether the base's in its place


class Room:
    """K slots, who sits in them, and who waits."""

    def __init__(
        self, cohort: Cohort, bank: Bank, row_tokens: int, saves: Saves | None = None, least: int | None = None
    ) -> None:
        """A micro-step computes `least` rows or more: all, or as many as are read."""
        self.cohort, self.bank, self.row_tokens, self.saves = cohort, bank, row_tokens, saves
        self.least = least or cohort.slots
        self.clock = 0  # micro-steps so far
        self._waiting: list[Seat] = []
        self._seated: dict[int, Seat] = {}  # by slot
        self._lent: dict[int, Lent] = {}  # what a further slot holds
        self._rota = seating.Rota()
        self._names: set[str] = set()

    @property
    def busy(self) -> bool:
        """Whether anybody is here."""
        return bool(self._seated or self._waiting)

    @property
    def names(self) -> tuple[str, ...]:
        """Who sits."""
        return tuple(seat.name for seat in self._seated.values())

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    @property
    def rows_left(self) -> int:
        """About how many rows everybody here is still to read."""
        return sum(seat.rows_left for seat in (*self._seated.values(), *self._waiting))

    def readers(self, lessons: Sequence[Lesson | None]) -> dict[str, int]:
        """Who reads what was dealt, and how many tokens of it."""
        return {
            seat.name: sum(lesson.row.used for slot in seat.slots if (lesson := lessons[slot]))
            for seat in self._seated.values()
        }

    @property
    def places(self) -> int:
        """How many more could sit down now or in a moment: free slots and those of users of a few rows."""
        soon = sum(seat.standing(self.clock).few for seat in self._seated.values())
        due = sum(not seat.asks or not seat.heard for seat in self._waiting)
        return max(0, self.cohort.slots - len(self._seated) + soon - due)

    def enter(self, learners: Iterable[Learner]) -> bool:
        """Let learners wait for a slot; whether there were any.  Raises ValueError for a name that is here already."""
        before, learners = len(self._waiting), list(learners)
        with ThreadPoolExecutor(DRAWERS) as pool:
            starts = pool.map(self._start_row, learners)
        for learner, start_P in zip(learners, starts, strict=True):
            if learner.name in self._names:
                raise ValueError(f"two learners are called {learner.name!r}; results are told apart by name")
            self._names.add(learner.name)
            spec = learner.recipe.method
            aside = Aside.fresh(start_P, spec.scale)
            seat = Seat(learner, aside, self.cohort, self.row_tokens, self.clock)
            seat.stretches = self.bank.stretches(spec)
            if self.saves and (progress := self.saves.load(learner)):
                seat.resume(progress)
            self._waiting.append(seat)
        return len(self._waiting) > before

    def _start_row(self, learner: Learner) -> Tensor:
        """Its own, or drawn: millions of numbers, on one thread, and the GPU waits meanwhile."""
        recipe = learner.recipe
        return self.bank.start_row(recipe.method, recipe.seed) if learner.start is None else learner.start

    def seat(self) -> None:
        """Free slots to whose turn it is; then users of a few rows, or of higher priority, in others' place.

        Whoever sits above a slot that stays free moves down to it, where rows that nobody reads need not be computed.

        Raises ValueError where everybody waits for an answer that nobody here can bring about.
        """
        slots = self.cohort.slots
        waiting = [seat for seat in self._waiting if not seat.asks]
        if not waiting and not self._seated and all(seat.answer() is None for seat in self._waiting):
            raise ValueError("learners wait for the results of others that are not trained with them")
        free = [slot for slot in range(slots) if slot not in self._seated]
        seated = list(self._seated.values())
        standings = [seat.standing(self.clock) for seat in seated]
        if free and waiting:
            turns = seating.turns(len(free), standings, [seat.standing(self.clock) for seat in waiting], slots)
            for slot, seat in zip(free, [waiting[number] for number in turns], strict=False):
                self._sit(slot, seat)
        elif waiting:
            comers = [seat for seat in waiting if seating.urgent(seat.standing(self.clock), standings)]
            for victim, comer in seating.swaps(standings, [seat.standing(self.clock) for seat in comers], slots):
                slot = seated[victim].slot
                self._rise(seated[victim])
                self._sit(slot, comers[comer])
        if self.least < slots:
            self._move_down()

    def _move_down(self) -> None:
        for slot in range(len(self._seated)):
            if slot not in self._seated:
                seat = self._seated.pop(max(self._seated))
                self.cohort.move(seat.slot, slot)
                self._lent.pop(slot, None)
                self._seated[slot], seat.slot = seat, slot

    def height(self, slots: Iterable[int]) -> int:
        """How many rows are computed if these slots are to be among them."""
        return max([self.least, *(slot + 1 for slot in slots)])

    def deal(self) -> list[Lesson | None]:
        """What each slot reads in this micro-step: each user's next lesson in its own, further ones where nobody reads.

        Either those who learn read, or those who are examined; the others wait.
        """
        dealt: list[Lesson | None] = [None] * self.cohort.slots
        examined, learning = ([seat for seat in self._seated.values() if seat.learns == does] for does in (False, True))
        pending = [seat.pending for seat in examined if seat.pending]
        examines = self._rota.examines(pending, len(learning), self.height(self._seated))
        readers, others = (examined, learning) if examines else (learning, examined)
        free = [slot for slot in range(self.cohort.slots) if slot not in self._seated] + [seat.slot for seat in others]
        left = [seat.rows_left for seat in readers]
        for seat, further in zip(readers, seating.lanes([s.pending for s in readers], left, len(free)), strict=True):
            seat.slots = [seat.slot, *(self._lend(seat, free) for _ in range(further))]
            for number, slot in enumerate(seat.slots[: seat.pending]):
                dealt[slot] = seat.assignment.lessons[len(seat.answers) + number]
        for seat in others:
            seat.slots = []
        if not examines:
            self._rota.note_empty(sum(dealt[seat.slot] is None for seat in others))
        return dealt

    def take_in(self, answers: Answers) -> Iterator[Trained]:
        """Hand out the answers: whoever has read an assignment to its end steps, and goes to the next."""
        self.clock += 1
        self._hand_out(answers)
        ready = [seat for seat in self._seated.values() if not seat.pending]
        norms = self._step([seat for seat in ready if seat.learns])
        for seat in ready:
            was_base = seat.assignment.of_base
            if trained := seat.hear(norms[seat.slot]):
                self._leave(seat)
                yield trained
            elif was_base and not seat.assignment.of_base:
                self.cohort.seat(seat.slot, seat.aside)
        yield from self._answer()
        for seat in [seat for seat in self._seated.values() if seat.asks]:
            self._rise(seat)

    def _hand_out(self, answers: Answers) -> None:
        """To each its own, and the gradients of the slots that it read in besides."""
        self.cohort.give_back()
        for seat in self._seated.values():
            for slot in seat.slots[: seat.pending]:
                seat.answers.append(answers[slot])
                if seat.learns and slot != seat.slot:
                    self.cohort.fold(slot, seat.slot)
        for seat in self._seated.values():
            if not seat.learns and not seat.pending:  # others may have learnt before it was its turn: it gave 0, or NaN
                self.cohort.forget_gradient(seat.slot)

    def _answer(self) -> Iterator[Trained]:
        """Give everybody who asks the answer, if there is one by now."""
        for seat in [seat for seat in (*self._seated.values(), *self._waiting) if seat.asks]:
            if (answer := seat.answer()) is not None:
                seat.answers = answer
                if seat.slot < 0:
                    seat.since = self.clock  # only from now on does it wait for a slot
                if trained := seat.hear(0.0):
                    self._leave(seat)
                    yield trained

    def dismiss(self, names: Collection[str]) -> Iterator[Trained]:
        """Send learners away, as they are."""
        for seat in [seat for seat in (*self._seated.values(), *self._waiting) if seat.name in names]:
            self._leave(seat)
            seat.student.result.outcome, seat.student.result.reason = "dismissed", "it was called off"
            yield seat.student.result

    def save(self, last: bool = False) -> None:
        """Keep everybody's progress who has begun; the last time, for whoever goes on with it elsewhere."""
        for seat in (*self._seated.values(), *self._waiting):
            if self.saves and (seat.heard or seat.answers):
                self.saves.save(seat.learner, seat.progress(self.cohort), last)

    def _step(self, stepping: Sequence[Seat]) -> list[float]:
        """One optimiser step of those whose assignment ends in one; each slot's gradient norm.

        A row whose numbers are not finite does not step; its student will hear why.
        """
        norms = [0.0] * self.cohort.slots
        if stepping:
            for seat in stepping:
                clear_fixed(self.cohort, seat.slot, seat.stretches)
            found = gradient_norms(self.cohort.lowest(self.height(seat.slot for seat in stepping))).tolist()
            due: list[RowStep | None] = [None] * self.cohort.slots
            for seat in stepping:
                norms[seat.slot] = found[seat.slot]
                if all(map(math.isfinite, (*chain(*seat.answers), found[seat.slot]))):
                    due[seat.slot] = seat.step
            step_rows(self.cohort, due, norms)
        return norms

    def _sit(self, slot: int, seat: Seat) -> None:
        standing = seat.standing(self.clock)
        self._waiting.remove(seat)
        self._seated[slot] = seat
        self._lent.pop(slot, None)
        if seat.assignment.of_base:
            self.cohort.clear(slot)
        else:
            self.cohort.seat(slot, seat.aside)
        seat.student.result.waited = max(seat.student.result.waited, standing.waited)
        seat.slot, seat.since = slot, self.clock
        seat.hold_until = self.clock + seating.HOLD if standing.starved else 0

    def _leave(self, seat: Seat) -> None:
        self._names.remove(seat.name)
        if seat.slot < 0:
            self._waiting.remove(seat)
        else:
            del self._seated[seat.slot]
            self.cohort.clear(seat.slot)

    def _rise(self, seat: Seat) -> None:
        if not seat.is_aside:
            seat.aside = self.cohort.take(seat.slot)
        del self._seated[seat.slot]
        seat.slot, seat.since = -1, self.clock
        self._waiting.append(seat)

    def _lend(self, seat: Seat, free: list[int]) -> int:
        """A slot that reads as the seat's own does: one that does already if there is one; another's for this once."""
        version = (seat, seat.student.result.steps, seat.assignment.of_base)
        slot = next((slot for slot in free if self._lent.get(slot) == version), free[0])
        free.remove(slot)
        if slot in self._seated:
            self.cohort.borrow(seat.slot, slot)
        elif self._lent.get(slot) != version:
            self.cohort.lend(seat.slot, slot)
            self._lent[slot] = version
        if seat.learns:
            self.cohort.forget_gradient(slot)
        return slot
