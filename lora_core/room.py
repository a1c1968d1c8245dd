"""The room of a cohort: learners who wait, who sits in which slot, and whose rows are read where.

`seating.py` decides by numbers; here its decisions move rows.
"""

import math
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain

from torch import Tensor

from lora_core import seating
from lora_core.banks.bank import Bank
from lora_core.cohort import Aside, Cohort
from lora_core.curriculum import Student
from lora_core.learner import Assignment, Heard, Learner, Lesson, Trained
from lora_core.optim import RowStep, Stretch, clear_fixed, gradient_norms, step_rows
from lora_core.referee import Answers
from lora_core.saves import Progress, Saves
from lora_core.seating import Standing

DRAWERS = min(8, os.cpu_count() or 1)  # threads that draw starts


class Seat:
    """A learner at work: its stream, the assignment it is at, and where its rows are: in a slot, or aside."""

    def __init__(self, learner: Learner, aside: Aside, cohort: Cohort, row_tokens: int, clock: int) -> None:
        self.learner, self.name, self.priority = learner, learner.name, learner.priority
        self.stretches: Sequence[Stretch] = ()  # of its row, with rates of their own
        self.aside, self.slot = aside, -1  # -1: its rows are aside
        self.since = clock  # the micro-step at which it began to wait, or sat down
        self.hold_until = 0
        now = lambda: self.aside.weights_P if self.is_aside else cohort.row(self.slot)  # noqa: E731  short, and ours alone
        self.student = Student(learner, row_tokens, now)
        self._stream = self.student.study()
        self.result: Trained | None = None
        self.assignment = Assignment(())
        self.slots: list[int] = []  # where its lessons are read in this micro-step, in their order
        self.answers: Answers = []  # to the assignment's lessons so far
        self.heard: list[Heard] = []  # to all assignments before it
        self._go_on(None)

    @property
    def is_aside(self) -> bool:
        """Whether its rows are: it waits for a slot, or the base reads in its slot."""
        return self.slot < 0 or self.assignment.of_base

    @property
    def pending(self) -> int:
        """Lessons of the assignment that could be read now."""
        return len(self.assignment.lessons) - len(self.answers)

    @property
    def learns(self) -> bool:
        """Whether its assignment is to learn from; else it is examined."""
        return self.assignment.step is not None

    @property
    def step(self) -> RowStep | None:
        """The optimiser step that its assignment ends in, with its row's own rates."""
        return self.assignment.step and replace(self.assignment.step, stretches=self.stretches)

    def standing(self, clock: int) -> Standing:
        """What the plan knows of it."""
        waited = clock - self.since if self.slot < 0 else 0
        return Standing(self.student.rows_left, self.priority, waited, max(0, self.hold_until - clock))

    def resume(self, progress: Progress) -> None:
        """Go on from saved progress: hear again what was heard before, and take its rows."""
        self.aside = replace(progress.aside, weights_P=progress.best_P)  # an examination in the past kept this row
        for heard in progress.heard:
            self._go_on(heard)
        self.answers, self.aside = list(progress.answers), progress.aside

    def progress(self, cohort: Cohort) -> Progress:
        """How far it is."""
        aside = self.aside if self.is_aside else cohort.take(self.slot)
        return Progress(aside, self.student.result.row_P, self.heard, self.answers)

    @property
    def asks(self) -> bool:
        """Whether it can only go on with an answer: it needs no slot till then."""
        return self.assignment.question is not None

    def answer(self) -> Answers | None:
        """The answer to its question; None while there is none, or no question."""
        answer = self.assignment.question and self.assignment.question()
        return [[float(answer)]] if isinstance(answer, bool) else answer

    def hear(self, norm: float) -> Trained | None:
        """Answer the assignment and go to the next; the result once there is no next."""
        if self.result is None:
            self._go_on((self.answers, norm))
        return self.result

    def _go_on(self, heard: Heard | None) -> None:
        self.heard += [heard] if heard else []
        try:
            self.assignment = next(self._stream) if heard is None else self._stream.send(heard)
        except StopIteration as stop:
            self.assignment, self.result = Assignment(()), stop.value
        self.answers = []


Lent = tuple[Seat, int, bool]  # whose row, after how many steps, and whether the base's in its place


class Room:
    """K slots, who sits in them, and who waits."""

    def __init__(self, cohort: Cohort, bank: Bank, row_tokens: int, saves: Saves | None = None) -> None:
        self.cohort, self.bank, self.row_tokens, self.saves = cohort, bank, row_tokens, saves
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
        return sum(seat.student.rows_left for seat in (*self._seated.values(), *self._waiting))

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

    def deal(self) -> list[Lesson | None]:
        """What each slot reads in this micro-step: each user's next lesson in its own, further ones where nobody reads.

        Either those who learn read, or those who are examined; the others wait.
        """
        dealt: list[Lesson | None] = [None] * self.cohort.slots
        examined, learning = ([seat for seat in self._seated.values() if seat.learns == does] for does in (False, True))
        examines = self._rota.examines([seat.pending for seat in examined], len(learning), self.cohort.slots)
        readers, others = (examined, learning) if examines else (learning, examined)
        free = [slot for slot in range(self.cohort.slots) if slot not in self._seated] + [seat.slot for seat in others]
        left = [seat.student.rows_left for seat in readers]
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
        self.cohort.give_back()
        for seat in self._seated.values():
            for slot in seat.slots[: seat.pending]:
                seat.answers.append(answers[slot])
                if seat.learns and slot != seat.slot:
                    self.cohort.fold(slot, seat.slot)
        ready = [seat for seat in self._seated.values() if not seat.pending]
        norms = self._step(ready)
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

    def _step(self, ready: Sequence[Seat]) -> list[float]:
        """One optimiser step of those whose assignment ends in one; each slot's gradient norm.

        A row whose numbers are not finite does not step; its student will hear why.
        """
        norms = [0.0] * self.cohort.slots
        stepping = [seat for seat in ready if seat.learns]
        if stepping:
            for seat in stepping:
                clear_fixed(self.cohort, seat.slot, seat.stretches)
            found = gradient_norms(self.cohort).tolist()
            due: list[RowStep | None] = [None] * self.cohort.slots
            for seat in stepping:
                norms[seat.slot] = found[seat.slot]
                if all(map(math.isfinite, (*chain(*seat.answers), found[seat.slot]))):
                    due[seat.slot] = seat.step
            step_rows(self.cohort, due, norms)
        for seat in ready:
            if not seat.learns:
                self.cohort.gradient_KP[seat.slot] = 0
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
        return slot
