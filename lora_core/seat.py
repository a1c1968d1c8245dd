"""A learner at work: the assignment it is at, where it reads, and where its rows are."""

from collections.abc import Sequence
from dataclasses import replace

from lora_core.cohort import Aside, Cohort
from lora_core.curriculum import Student
from lora_core.learner import Assignment, Heard, Learner, Trained
from lora_core.optim import RowStep, Stretch
from lora_core.referee import Answers
from lora_core.saves import Progress
from lora_core.seating import Standing


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
    def rows_left(self) -> int:
        """About how many rows it still reads, at least one."""
        return max(1, self.student.rows_left - len(self.answers))

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
        return Standing(self.rows_left, self.priority, waited, max(0, self.hold_until - clock))

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
