"""One user's way through training, as a stream of assignments: what it reads next, and what it does with the answer.

The stream depends on the user's own examples, recipe and losses alone, and on its referee's verdicts if it has one;
never on who else is in the cohort, nor on when its rows are read.
"""

import math
from collections.abc import Callable, Generator, Sequence
from functools import cached_property, partial
from itertools import chain, islice

from torch import Tensor

from lora_core.data.packing import DenseRows, Row, epoch_batches, pack
from lora_core.errors import LoraError
from lora_core.learner import Assignment, Heard, Learner, Lesson, Trained
from lora_core.optim import RowStep, rate_at
from lora_core.preference import Reference
from lora_core.referee import Answers, Dropped, Referee

TRIED = 4  # batches that are packed to see how many rows a step has
BASE_READS = 64  # rows that the base is given at once: enough for any number of free slots
Stream = Generator[Assignment, Heard, Trained]


class NotFinite(LoraError):
    """A user's loss or gradient stopped being a number; only that user is retired."""

    def __init__(self, what: str, step: int) -> None:
        super().__init__(what, step)

    def __str__(self) -> str:
        return "{} is not finite after step {}; lower learning_rate or look for odd rows in the data".format(*self.args)


class Student:
    """A learner on its way: its result so far, and the best row seen.

    `row_now` copies the learner's current row.
    """

    def __init__(self, learner: Learner, row_tokens: int, row_now: Callable[[], Tensor]) -> None:
        self.learner, self.recipe = learner, learner.recipe
        self.row_tokens, self.row_now = row_tokens, row_now
        self.result = Trained(learner.name, "finished", row_now())
        self.best = math.inf
        self.lessons = 0  # given so far of those that dropout masks are told apart by
        self.base_reads = 0  # rows that the base has read for it
        self.learnt = 0  # rows of the steps so far
        self.shares = 0  # assignments so far that are, or could be, read once for all rivals
        self.reference = Reference(self.recipe.objective)
        self.planned = self._planned_steps()

    @property
    def rows_left(self) -> int:
        """About how many rows it still reads, at least one: what a plan of the cohort goes by.

        Counted by the steps and examinations that are left if nothing stops it early: then an estimate of how many rows
        a step has does not add up to long before the end, or long after.
        """
        held_out = len(self._held_out_rows)
        of_base = len(self._dense_rows) + held_out - self.base_reads if self.recipe.objective.paired else 0
        to_learn = math.ceil((self.planned - self.result.steps) * self._step_rows)
        return max(1, of_base + to_learn + self._examinations_left * held_out)

    @property
    def _step_rows(self) -> float:
        """Rows of an optimiser step, in the mean: as in the steps so far and in an epoch's first."""
        if self.recipe.batch_rows is not None:
            return len(self._dense_rows) / max(1, self._epoch_steps)
        return (self.learnt + sum(self._first_rows)) / max(1, self.result.steps + len(self._first_rows))

    @cached_property
    def _first_rows(self) -> list[int]:
        return [len(rows) for rows in islice(self._batches(0), TRIED)]

    @property
    def _examinations_left(self) -> int:
        """How many times it is still examined: before the first epoch and after each, and for its referee."""
        referee, steps = self.learner.referee, self.result.steps
        rungs = sum(steps < rung < self.planned for rung in referee.rungs(self.planned)) if referee else 0
        if self.recipe.patience is None:
            return rungs + (referee is not None)
        return rungs + 1 + math.ceil(self.planned / max(1, self._epoch_steps)) - len(self.result.held_out)

    def study(self) -> Stream:
        """Epoch by epoch, examined after each, until done, no longer better, or not finite.

        Send each assignment's answer back in.  A learner without anything to learn from is retired at once.
        """
        if self.learner.referee:
            self.learner.referee.begin(self.learner.name)
        try:
            yield from self._hear_base()
            yield from self._epochs()
        except NotFinite as trouble:
            self.result.outcome, self.result.reason = "retired", str(trouble)
        except Dropped as verdict:
            self.result.outcome, self.result.reason = "dropped", str(verdict)
        if not self.learner.train:
            self.result.outcome, self.result.reason = "retired", "there is nothing to learn from; add examples"
        if not self.result.held_out:
            self._keep_last()
        if self.learner.referee:
            yield from self._end(self.learner.referee)
        return self.result

    def _epochs(self) -> Generator[Assignment, Heard, None]:
        yield from self._examine(first=True)
        for epoch in range(self.recipe.epochs):
            yield from self._epoch(epoch)
            yield from self._examine()
            if self.result.steps == self.planned:
                break
            if self._stale():
                self.result.outcome = "stopped early"
                break

    def _end(self, referee: Referee) -> Generator[Assignment, Heard, None]:
        """Tell how good the result is; it is measured where no examination has done that."""
        loss: float | None = self.best
        if self.result.outcome in ("dropped", "retired"):
            loss = None
        elif not self.result.held_out:
            try:
                loss = yield from self._measure()
            except NotFinite:  # a last step that broke the row: the row before it was never measured
                loss = None
        referee.tell_end(self.learner.name, loss)

    def _compete(self, referee: Referee) -> Generator[Assignment, Heard, None]:
        """At a rung: tell how good the row is, and ask whether to go on.  Raises Dropped."""
        for rung, steps in enumerate(referee.rungs(self.planned)):
            if steps == self.result.steps < self.planned:
                loss = yield from self._measure()
                examined = (before for step, before in self.result.held_out if step)  # not the base
                referee.tell(self.learner.name, rung, min([loss, *examined]))
                question = partial(referee.goes_on, self.learner.name, rung)
                ((goes_on,),), _ = yield Assignment((), question=question)
                if not goes_on:
                    raise Dropped(steps)

    def _keep_last(self) -> None:
        """The row as it is now is the result, unless the last step itself broke it."""
        row_P = self.row_now()
        if row_P.isfinite().all():
            self.result.row_P, self.result.best_step = row_P, self.result.steps

    def _hear_base(self) -> Generator[Assignment, Heard, None]:
        """Have the base read all pairs, once: its margins are what every later loss is taken against.

        No lesson is counted, as in `_measure`: a search's trial may have more pairs judged than its plain recipe has.
        """
        if not self.recipe.objective.paired:
            return
        for trains, rows in ((True, self._dense_rows), (False, self._held_out_rows)):
            for start in range(0, len(rows), BASE_READS):
                part = [rows[number] for number in range(start, min(start + BASE_READS, len(rows)))]
                answers = yield from self._read_once(Assignment(self._lessons(part, trains), of_base=True))
                self.base_reads += len(part)
                self.reference.hear(part, trains, answers)

    def _epoch(self, epoch: int) -> Generator[Assignment, Heard, None]:
        for rows in self._batches(epoch):
            if self.result.steps == self.planned:
                return
            yield from self._batch(rows)
            if self.learner.referee:
                yield from self._compete(self.learner.referee)

    def _batches(self, epoch: int) -> Generator[list[Row], None, None]:
        """The rows of each optimiser step of an epoch."""
        examples, recipe = self.learner.train, self.recipe
        if recipe.batch_rows is None:
            for batch in epoch_batches(len(examples), recipe.batch_size, recipe.seed, epoch):
                yield pack([(index, examples[index]) for index in batch], self.row_tokens)
        else:
            for batch in epoch_batches(len(self._dense_rows), recipe.batch_rows, recipe.seed, epoch):
                yield [self._dense_rows[index] for index in batch]

    @cached_property
    def _dense_rows(self) -> "DenseRows":
        """The rows of all epochs, when batches are of rows."""
        return DenseRows(self.learner.train, self.row_tokens)

    @cached_property
    def _held_out_rows(self) -> list[Row]:
        judged = self.recipe.patience is not None or self.learner.referee
        return pack(list(enumerate(self.learner.held_out)), self.row_tokens) if judged else []

    def _recurring_rows(self, trains: bool) -> Sequence[Row]:
        """The rows that every epoch reads again: examinations always, training where the data is packed once."""
        if trains:
            return () if self.recipe.batch_rows is None else self._dense_rows
        return self._held_out_rows

    def _planned_steps(self) -> int:
        """How many optimiser steps it takes if nothing stops it early."""
        steps = self.recipe.epochs * self._epoch_steps
        return min(steps, self.recipe.max_steps or steps)

    @cached_property
    def _epoch_steps(self) -> int:
        if self.recipe.batch_rows is None:
            return math.ceil(len(self.learner.train) / self.recipe.batch_size)
        return math.ceil(len(self._dense_rows) / self.recipe.batch_rows)

    def _batch(self, rows: Sequence[Row]) -> Generator[Assignment, Heard, None]:
        """One optimiser step: the mean loss over all of the batch's rows."""
        step = self.result.steps + 1
        share = 1 / max(1, self.reference.counted(rows))
        rate = rate_at(self.recipe, step, self.planned)
        total = yield from self._learn(rows, share, RowStep(step, rate, self.recipe))
        self.result.tokens += sum(row.used for row in rows)
        self.result.steps, self.learnt = step, self.learnt + len(rows)
        self.result.losses.append((step, total * share))

    def _examine(self, first: bool = False) -> Generator[Assignment, Heard, None]:
        """Held-out loss of the row as it is now; the best row is kept."""
        if not self._held_out_rows or self.recipe.patience is None:
            return
        loss = yield from self._measure(first)
        self.lessons += len(self._held_out_rows)
        self.result.held_out.append((self.result.steps, loss))
        if loss < self.best:
            self.best, self.result.row_P, self.result.best_step = loss, self.row_now(), self.result.steps

    def _measure(self, first: bool = False) -> Generator[Assignment, Heard, float]:
        """Held-out loss of the row as it is now.  Nothing of what comes later depends on it: no lesson is counted."""
        rows, read = self._held_out_rows, self._read_once if first else self._read
        answers = yield from read(Assignment(self._lessons(rows, False)))
        return self.reference.total(answers) / max(1, self.reference.counted(rows))

    def _learn(self, rows: Sequence[Row], share: float, step: RowStep) -> Generator[Assignment, Heard, float]:
        """Have rows read to learn from; their summed loss."""
        first, self.lessons = self.lessons, self.lessons + len(rows)
        keys = [dropout_key(self.recipe.seed, first + number) for number in range(len(rows))]
        return self.reference.total((yield from self._read(Assignment(self._lessons(rows, True, share, keys), step))))

    def _lessons(
        self, rows: Sequence[Row], trains: bool, weight: float = 0.0, keys: Sequence[int] | None = None
    ) -> tuple[Lesson, ...]:
        """Rows of examples to learn from, or of those held out, to be read; without a weight nothing is dropped."""
        dropout = self.recipe.method.dropout if weight else 0.0
        recurring = self._recurring_rows(trains)
        return tuple(
            Lesson(row, weight, dropout, key, recurring, self.reference.pairs(row, trains))
            for row, key in zip(rows, keys or [0] * len(rows), strict=True)
        )

    def _read_once(self, assignment: Assignment) -> Generator[Assignment, Heard, Answers]:
        """Have lessons read before the first step: once for all rivals to whom they would say the same."""
        referee, name, self.shares = self.learner.referee, self.learner.name, self.shares + 1
        if not referee:
            return (yield from self._read(assignment))
        reader = referee.reader(name, assignment.of_base)
        if reader != name:
            question = partial(referee.shared, reader, self.shares)
            return (yield from self._read(Assignment((), question=question)))
        heard = yield assignment
        referee.share(name, self.shares, heard[0])  # whatever it is: what is not finite stops all who share it
        return self._finite(heard)

    def _read(self, assignment: Assignment) -> Generator[Assignment, Heard, Answers]:
        """Have an assignment's lessons read; their answers.  Raises NotFinite."""
        return self._finite((yield assignment))

    def _finite(self, heard: Heard) -> Answers:
        answers, norm = heard
        if not all(map(math.isfinite, chain(*answers))):
            raise NotFinite("the loss", self.result.steps)
        if not math.isfinite(norm):
            raise NotFinite("the gradient", self.result.steps)
        return answers

    def _stale(self) -> bool:
        """Whether the last `patience` examinations were no better than the best."""
        since = [step for step, _ in self.result.held_out if step > self.result.best_step]
        return self.recipe.patience is not None and len(since) >= self.recipe.patience


def dropout_key(seed: int, lesson: int) -> int:
    """The 63-bit key of one lesson's dropout mask: the user's seed and lesson, nothing of its slot."""
    return (seed * 0x9E3779B97F4A7C15 + lesson * 0xD1B54A32D192ED03 + 1) % 2**63
