"""Who is trained, what a slot reads for them in a micro-step, and what becomes of them."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from torch import Tensor

from lora_core.data.packing import Row
from lora_core.data.rendering import AnyRendered
from lora_core.optim import RowStep
from lora_core.preference import Pairs
from lora_core.recipe import Recipe
from lora_core.referee import Answers, Referee

Outcome = Literal["finished", "stopped early", "dropped", "retired", "dismissed"]


@dataclass(frozen=True)
class Learner:
    """One user to train: a name for reports, examples to learn from and to be judged on, and a recipe."""

    name: str
    recipe: Recipe
    train: tuple[AnyRendered, ...]
    held_out: tuple[AnyRendered, ...] = ()
    start: Tensor | None = None  # row P to go on from; None starts afresh from the recipe's seed
    priority: int = 0  # the higher goes first
    referee: Referee | None = None  # may stop it half-way

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what decides its course: recipe, examples, start and referee."""
        halves = (*self.train, *self.held_out)
        examples = [[one.tokens, one.trained] for example in halves for one in example.documents]
        start = "" if self.start is None else hashlib.sha256(self.start.numpy().tobytes()).hexdigest()
        parts = (self.recipe.digest, len(self.train), examples, start, self.referee.digest if self.referee else "")
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Lesson:
    """What a slot reads in one micro-step.  `weight` multiplies the row's summed loss; 0 only measures."""

    row: Row
    weight: float
    dropout: float
    key: int  # of this lesson's dropout mask
    recurring: Sequence[Row] = ()  # the rows that come again, this one among them; none where it is read once
    pairs: Pairs | None = None  # of a row of pairs


@dataclass(frozen=True)
class Assignment:
    """Lessons that need not wait for each other's answers, and how to step after the last; None only measures.

    One with a question has no lessons: whoever asks waits, without a slot, until there is an answer.
    """

    lessons: tuple[Lesson, ...]
    step: RowStep | None = None
    of_base: bool = False  # they are read by the row of zeros, whatever the learner's own row is
    question: Callable[[], bool | Answers | None] | None = None


@dataclass
class Trained:
    """What became of a learner: its row, P numbers on the CPU, and how it got there."""

    name: str
    outcome: Outcome
    row_P: Tensor
    reason: str = ""
    steps: int = 0
    best_step: int = 0
    tokens: int = 0  # examples' tokens trained on, counting repetition
    waited: int = 0  # micro-steps without a slot, the longest time
    losses: list[tuple[int, float]] = field(default_factory=list)  # step, mean training loss of its batch
    held_out: list[tuple[int, float]] = field(default_factory=list)  # step, mean held-out loss


# What came of an assignment's lessons, or of its question, and the norm of the gradient that the lessons gave together.
Heard = tuple[Answers, float]
