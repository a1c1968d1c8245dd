"""The room of a cohort: learners who wait, who sits in which slot, and whose rows are read where.

`seating.py` decides by numbers; here its decisions move rows.
"""

from collections.abc import Iterable, Iterator, Sequence

from lora_core import seating
from lora_core.banks.lora import LoraBank
from lora_core.cohort import Aside, Cohort
from lora_core.curriculum import Assignment, Learner, Lesson, Student, Trained
from lora_core.optim import gradient_norms, step_rows
from lora_core.seating import Standing


class Seat:
    """A learner at work: its stream, the assignment it is at, and where its rows are: in a slot, or aside."""

    def __init__(self, learner: Learner, aside: Aside, row_tokens: int) -> None:
        self.name, self.priority = learner.name, learner.priority
        self.aside = aside
        self.student = Student(learner, row_tokens, lambda: self.aside.weights_P)
        self.stream = self.student.study()
        self.result: Trained | None = None
        self.assignment = Assignment(())
        self.given = 0  # lessons of the assignment that were read in some slot
        self.losses: list[float] = []
        self.waited = self.hold = 0

    @property
    def standing(self) -> Standing:
        """What the plan knows of it."""
        return Standing(self.student.rows_left, self.priority, self.waited, self.hold)

    @property
    def pending(self) -> int:
        """Lessons of the assignment that could be read now."""
        return len(self.assignment.lessons) - self.given

    def begin(self) -> None:
        """Go to the first assignment."""
        self._advance(lambda: next(self.stream))
