"""One user's way through training, as a stream of lessons: what its row reads next, and what it does with the answer.

The stream depends on the user's own examples, recipe and losses alone, never on who else is in the cohort.
"""

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from lora_core.data.packing import Row, epoch_batches, pack
from lora_core.data.rendering import Rendered
from lora_core.errors import LoraError
from lora_core.optim import RowStep, rate_at
from lora_core.recipe import Recipe

Outcome = Literal["finished", "stopped early", "retired"]


@dataclass(frozen=True)
class Learner:
    """One user to train: a name for reports, examples to learn from and to be judged on, and a recipe."""

    name: str
    recipe: Recipe
    train: tuple[Rendered, ...]
    held_out: tuple[Rendered, ...] = ()
    start: Tensor | None = None  # row P to go on from; None starts afresh from the recipe's seed


@dataclass(frozen=True)
class Lesson:
    """What a slot does in one micro-step.  `weight` multiplies the row's summed loss; 0 only measures."""

    row: Row
    weight: float
    dropout: float
    key: int  # of this micro-step's dropout mask
    step: RowStep | None = None  # how to step after this row; None keeps accumulating


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
    losses: list[tuple[int, float]] = field(default_factory=list)  # step, mean training loss of its batch
    held_out: list[tuple[int, float]] = field(default_factory=list)  # step, mean held-out loss


class NotFinite(LoraError):
    """A user's loss or gradient stopped being a number; only that user is retired."""

    def __init__(self, what: str, step: int) -> None:
        super().__init__(what, step)

    def __str__(self) -> str:
        return "{} is not finite after step {}; lower learning_rate or look for odd rows in the data".format(*self.args)


Heard = tuple[float, float]  # the row's summed loss and the slot's gradient norm
Stream = Generator[Lesson, Heard, Trained]


def curriculum(learner: Learner, row_tokens: int, row_now: Callable[[], Tensor]) -> Stream:
    """The lessons of one learner, from the first row to its result.

    Send each lesson's (loss, norm) back in.  `row_now` copies the slot's current row.  A learner without
    anything to learn from is retired at once.
    """
    return (yield from _Student(learner, row_tokens, row_now).study())


class _Student:
    """A learner on its way: its result so far, and the best row seen."""

    def __init__(self, learner: Learner, row_tokens: int, row_now: Callable[[], Tensor]) -> None:
        self.learner, self.recipe = learner, learner.recipe
        self.row_tokens, self.row_now = row_tokens, row_now
        self.result = Trained(learner.name, "finished", row_now())
        self.best = math.inf
        self.micro_step = 0
        self.planned = planned_steps(self.recipe, len(learner.train))

    def study(self) -> Stream:
        """Epoch by epoch, examined after each, until done, no longer better, or not finite."""
        try:
            yield from self._examine()
            for epoch in range(self.recipe.epochs):
                yield from self._epoch(epoch)
                yield from self._examine()
                if self.result.steps == self.planned:
                    break
                if self._stale():
                    self.result.outcome = "stopped early"
                    break
        except NotFinite as trouble:
            self.result.outcome, self.result.reason = "retired", str(trouble)
        if not self.learner.train:
            self.result.outcome, self.result.reason = "retired", "there is nothing to learn from; add examples"
        if not self.result.held_out:
            self._keep_last()
        return self.result

    def _keep_last(self) -> None:
        """The row as it is now is the result, unless the last step itself broke it."""
        row_P = self.row_now()
        if row_P.isfinite().all():
            self.result.row_P, self.result.best_step = row_P, self.result.steps

    def _epoch(self, epoch: int) -> Generator[Lesson, Heard, None]:
        examples = self.learner.train
        for batch in epoch_batches(len(examples), self.recipe.batch_size, self.recipe.seed, epoch):
            if self.result.steps == self.planned:
                return
            yield from self._batch(pack([(index, examples[index]) for index in batch], self.row_tokens))

    def _batch(self, rows: Sequence[Row]) -> Generator[Lesson, Heard, None]:
        """One optimiser step: the batch's rows one after another, its mean loss over all of them."""
        step = self.result.steps + 1
        rate = rate_at(self.recipe, step, self.planned)
        share = 1 / max(1, sum(row.counted for row in rows))
        total = 0.0
        for row in rows:
            last = RowStep(step, rate, self.recipe) if row is rows[-1] else None
            total += yield from self._lesson(row, share, last)
            self.result.tokens += row.used
        self.result.steps = step
        self.result.losses.append((step, total * share))

    def _examine(self) -> Generator[Lesson, Heard, None]:
        """Held-out loss of the row as it is now; the best row is kept."""
        if self.recipe.patience is None or not self.learner.held_out:
            return
        rows = pack(list(enumerate(self.learner.held_out)), self.row_tokens)
        total = 0.0
        for row in rows:
            total += yield from self._lesson(row, 0.0, None)
        loss = total / max(1, sum(row.counted for row in rows))
        self.result.held_out.append((self.result.steps, loss))
        if loss < self.best:
            self.best, self.result.row_P, self.result.best_step = loss, self.row_now(), self.result.steps

    def _lesson(self, row: Row, weight: float, step: RowStep | None) -> Generator[Lesson, Heard, float]:
        dropout = self.recipe.method.dropout if weight else 0.0
        key = dropout_key(self.recipe.seed, self.micro_step)
        self.micro_step += 1
        loss, norm = yield Lesson(row, weight, dropout, key, step)
        if not math.isfinite(loss):
            raise NotFinite("the loss", self.result.steps)
        if not math.isfinite(norm):
            raise NotFinite("the gradient", self.result.steps)
        return loss

    def _stale(self) -> bool:
        """Whether the last `patience` examinations were no better than the best."""
        since = [step for step, _ in self.result.held_out if step > self.result.best_step]
        return self.recipe.patience is not None and len(since) >= self.recipe.patience


def planned_steps(recipe: Recipe, examples: int) -> int:
    """How many optimiser steps a learner with this many examples takes if nothing stops it early."""
    steps = recipe.epochs * math.ceil(examples / recipe.batch_size)
    return min(steps, recipe.max_steps) if recipe.max_steps else steps


def dropout_key(seed: int, micro_step: int) -> int:
    """The 63-bit key of one micro-step's dropout mask: the user's seed and step, nothing of its slot."""
    return (seed * 0x9E3779B97F4A7C15 + micro_step * 0xD1B54A32D192ED03 + 1) % 2**63


def newest(examples: Sequence[Rendered], max_tokens: int | None) -> tuple[Rendered, ...]:
    """The last examples that together have at most `max_tokens` tokens: equal budgets for unequal users."""
    if max_tokens is None:
        return tuple(examples)
    kept: list[Rendered] = []
    for rendered in reversed(examples):
        max_tokens -= len(rendered.tokens)
        if max_tokens < 0:
            break
        kept.append(rendered)
    return tuple(reversed(kept))
