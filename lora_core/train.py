"""Train a cohort: K slots, each at its own place in its own user's curriculum, one forward and one backward for all.

No user waits for another: one may be stepping while its neighbour is examined and a third has just sat down.
K slots, T tokens a slot, P numbers a user.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from lora_core.banks.lora import LoraBank, lora_bank
from lora_core.base_model import BaseModel
from lora_core.cohort import Cohort
from lora_core.curriculum import Heard, Learner, Lesson, Stream, Trained, curriculum
from lora_core.data.packing import empty_row
from lora_core.forward import stack, token_losses
from lora_core.optim import gradient_norms, step_rows


@dataclass(frozen=True)
class Pace:
    """How far a cohort is, told once a micro-step: what a progress bar shows."""

    micro_steps: int
    training: tuple[str, ...]
    waiting: int
    finished: int
    tokens: int  # of examples, read so far
    room: int  # tokens there was room for so far


def train(
    base: BaseModel,
    learners: Iterable[Learner],
    slots: int,
    row_tokens: int,
    bank: LoraBank | None = None,
    watch: Callable[[Pace], None] | None = None,
) -> Iterator[Trained]:
    """Train every learner, `slots` at a time, and yield each as it finishes.

    At a fixed (slots, row_tokens, bank) a learner's row has the same bytes whoever the others are and whichever
    slot it had.  A learner whose numbers stop being finite is retired alone, with its last good row.
    Raises ValueError for two learners of one name.
    """
    waiting = _queue(learners)
    bank = bank or lora_bank(base, [learner.recipe.method for learner in waiting])
    cohort = Cohort(slots, bank.width, base.model.device, base.model.dtype)
    seats: list[_Seat | None] = [None] * slots
    micro_steps = finished = tokens = 0

    with bank.attached(base, cohort):
        while waiting or any(seats):
            for slot in range(slots):
                if seats[slot] is None and waiting:
                    seats[slot] = _Seat(cohort, bank, slot, waiting.popleft(), row_tokens)

            heard = micro_step(base, cohort, [seat.lesson if seat else None for seat in seats], row_tokens)

            micro_steps += 1
            for slot, seat in enumerate(seats):
                if seat:
                    tokens += seat.lesson.row.used if seat.lesson else 0
                    if trained := seat.hear(heard[slot]):
                        seats[slot] = None
                        cohort.clear(slot)
                        finished += 1
                        yield trained
            if watch:
                names = tuple(seat.name for seat in seats if seat)
                watch(Pace(micro_steps, names, len(waiting), finished, tokens, micro_steps * slots * row_tokens))


def _queue(learners: Iterable[Learner]) -> deque[Learner]:
    waiting = deque(learners)
    if len({learner.name for learner in waiting}) < len(waiting):
        raise ValueError("two learners have the same name; results are told apart by it")
    return waiting


def micro_step(base: BaseModel, cohort: Cohort, lessons: Sequence[Lesson | None], row_tokens: int) -> list[Heard]:
    """One forward and backward over K rows, and an optimiser step of the rows that are due.

    Returns each slot's summed loss and gradient norm.  A row whose numbers are not finite does not step.
    """
    batch = stack([lesson.row if lesson else empty_row(row_tokens) for lesson in lessons], base.model)
    weight_K = torch.tensor([lesson.weight if lesson else 0.0 for lesson in lessons]).to(base.model.device)
    cohort.set_dropout(
        [lesson.dropout if lesson else 0.0 for lesson in lessons],
        [lesson.key if lesson else 0 for lesson in lessons],
    )

    loss_KT, _ = token_losses(base, batch)
    loss_K = loss_KT.sum(1)
    (loss_K * weight_K).sum().backward()  # summed, never averaged: no gradient depends on who shares the batch

    heard_K2 = torch.stack([loss_K.detach(), gradient_norms(cohort)], dim=1)
    finite_K = heard_K2.isfinite().all(1)
    heard: list[Heard] = [(loss, norm) for loss, norm in heard_K2.tolist()]
    for slot, finite in enumerate(finite_K.tolist()):
        if not finite:
            cohort.gradient_KP[slot] = 0  # so that the row stays as it is: 0 x inf would reach its weights
    due = [
        lesson.step if lesson and finite else None for lesson, finite in zip(lessons, finite_K.tolist(), strict=True)
    ]
    if any(due):
        step_rows(cohort, due, [norm for _, norm in heard])
    return heard


class _Seat:
    """A learner in a slot: its stream and the lesson it is at."""

    def __init__(self, cohort: Cohort, bank: LoraBank, slot: int, learner: Learner, row_tokens: int) -> None:
        spec = learner.recipe.method
        start_P = bank.start_row(spec, learner.recipe.seed) if learner.start is None else learner.start
        cohort.admit(slot, start_P, spec.scale)
        self.name = learner.name
        self._stream: Stream = curriculum(learner, row_tokens, lambda: cohort.row(slot))
        self._result: Trained | None = None
        self.lesson: Lesson | None = None
        self._advance(None)

    def hear(self, heard: Heard) -> Trained | None:
        """Take the answer to the lesson and go to the next; the result once there is no next."""
        if self.lesson:
            self._advance(heard)
        return self._result

    def _advance(self, heard: Heard | None) -> None:
        try:
            self.lesson = next(self._stream) if heard is None else self._stream.send(heard)
        except StopIteration as stop:
            self.lesson, self._result = None, stop.value
