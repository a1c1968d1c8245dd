"""One micro-step on the device: K rows of T tokens read, and learnt from or only measured.

To learn is a backward pass, and gradients added up in the cohort matrix; examinations need none.

On a GPU it can be recorded once as a CUDA graph and played again: whoever sits where, its shapes never change.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lora_core.base_model import BaseModel
from lora_core.batch import as_batch, fields_of
from lora_core.cohort import Cohort
from lora_core.data.packing import empty_row
from lora_core.forward import token_losses
from lora_core.learner import Lesson
from lora_core.preference import lesson_losses
from lora_core.referee import Answers

_log = logging.getLogger(__name__)

WARM = 2  # micro-steps of a kind before it is recorded: libraries choose their kernels in them


def read_rows(base: BaseModel, cohort: Cohort, lessons: Sequence[Lesson | None], row_tokens: int) -> Answers:
    """K rows read forward, and backward if they are learnt from; each slot's answer.

    All of them are, or none: with a backward pass ahead a forward pass may round otherwise, and no loss may depend on
    whether a neighbour learns.
    """
    answers_KN: Answers = backward_rows(base, cohort, lessons, row_tokens).tolist()
    counts = [len(lesson.pairs.reference) if lesson and lesson.pairs else 1 for lesson in lessons]
    return [answer[:count] for answer, count in zip(answers_KN, counts, strict=True)]


def backward_rows(base: BaseModel, cohort: Cohort, lessons: Sequence[Lesson | None], row_tokens: int) -> Tensor:
    """As `read_rows`, the answers still on the device, K x N: no number is looked at, so shapes alone can run it."""
    fields_4KT, weight_K = hand_over(base, cohort, lessons, row_tokens)
    return _read(base, fields_4KT, weight_K, lessons, _counted(lessons))


def hand_over(
    base: BaseModel, cohort: Cohort, lessons: Sequence[Lesson | None], row_tokens: int
) -> tuple[Tensor, Tensor]:
    """What the device must know of a micro-step: the rows' fields, each slot's weight, and dropout, in the cohort."""
    rows = [lesson.row if lesson else empty_row(row_tokens) for lesson in lessons]
    fields_4KT = fields_of(rows, base.model.device, base.grain)
    weight_K = torch.tensor([lesson.weight if lesson else 0.0 for lesson in lessons]).to(base.model.device)
    cohort.set_dropout(
        [lesson.dropout if lesson else 0.0 for lesson in lessons],
        [lesson.key if lesson else 0 for lesson in lessons],
    )
    return fields_4KT, weight_K


def _read(
    base: BaseModel, fields_4KT: Tensor, weight_K: Tensor, lessons: Sequence[Lesson | None], counted: int | None = None
) -> Tensor:
    """Answers K x N; on the device alone, unless there are pairs.  So many predictions count, or all may."""
    learns = _learns(lessons)
    with torch.set_grad_enabled(learns):
        loss_KT, _ = token_losses(base, as_batch(fields_4KT, base.model.dtype, base.windows, counted))
        loss_K, answers_KN = lesson_losses(loss_KT, [lesson.pairs if lesson else None for lesson in lessons])
    if learns:
        (loss_K * weight_K).sum().backward()  # summed, never averaged: no gradient depends on who shares the batch
    return answers_KN.detach()


def _counted(lessons: Sequence[Lesson | None]) -> int:
    """How many predictions count."""
    return sum(lesson.row.counted for lesson in lessons if lesson)


def _learns(lessons: Sequence[Lesson | None]) -> bool:
    """Whether the lessons are to be learnt from; else they are only measured."""
    kinds = {bool(lesson.weight) for lesson in lessons if lesson}
    assert len(kinds) < 2  # see `read_rows`
    return True in kinds


@dataclass(frozen=True)
class Recorded:
    """A micro-step as a CUDA graph, and the memory it reads and writes."""

    graph: torch.cuda.CUDAGraph
    fields_4KT: Tensor
    weight_K: Tensor
    answers_KN: Tensor

    def play(self, fields_4KT: Tensor, weight_K: Tensor) -> Tensor:
        """Answers, K x 1."""
        self.fields_4KT.copy_(fields_4KT)
        self.weight_K.copy_(weight_K)
        self.graph.replay()
        return self.answers_KN


Kind = tuple[bool, bool]  # whether anybody learns, and whether any slot drops inputs


class Replay:
    """`read_rows` for one training on a GPU: the same kernels in the same order, launched as one.

    Where a base or a bank cannot be recorded, on a CPU, or where somebody learns from pairs, all runs as it is.
    """

    def __init__(self) -> None:
        self._recorded: dict[Kind, Recorded] = {}
        self._warm: Counter[Kind] = Counter()
        self._refused = False

    def __call__(self, base: BaseModel, cohort: Cohort, lessons: Sequence[Lesson | None], row_tokens: int) -> Answers:
        """Each slot's answer."""
        if any(lesson and lesson.pairs for lesson in lessons):
            self._refuse()
        if self._refused:
            return read_rows(base, cohort, lessons, row_tokens)
        fields_4KT, weight_K = hand_over(base, cohort, lessons, row_tokens)
        kind = _learns(lessons), cohort.drops
        if self._warm[kind] == WARM and kind not in self._recorded:
            self._record(kind, base, fields_4KT, weight_K, lessons)
        self._warm[kind] += 1
        recorded = self._recorded.get(kind)
        if recorded:
            answers_KN = recorded.play(fields_4KT, weight_K)
        else:
            answers_KN = _read(base, fields_4KT, weight_K, lessons, _counted(lessons))
        answers: Answers = answers_KN.tolist()
        return answers

    def _record(
        self, kind: Kind, base: BaseModel, fields_4KT: Tensor, weight_K: Tensor, lessons: Sequence[Lesson | None]
    ) -> None:
        devices = {tensor.device for tensor in base.frozen}
        if base.quantised or len(devices) > 1 or devices.pop().type != "cuda":  # the first two nobody has tried
            self._refuse()
            return
        graph, fields_4KT, weight_K = torch.cuda.CUDAGraph(), fields_4KT.clone(), weight_K.clone()
        torch.cuda.empty_cache()  # a graph's memory is its own: what the warm micro-steps used must make room for it
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                answers_KN = _read(base, fields_4KT, weight_K, lessons)
        except RuntimeError as error:
            _log.warning("micro-steps are not recorded: %s", str(error).splitlines()[0])
            self._refuse()
            return
        self._recorded[kind] = Recorded(graph, fields_4KT, weight_K, answers_KN)

    @cached_property
    def _pool(self) -> Any:  # torch's handle
        """One for all graphs: no two play at once."""
        return torch.cuda.graph_pool_handle()

    def _refuse(self) -> None:
        """Record nothing more, and give back the memory of what is recorded."""
        self._refused = True
        self._recorded.clear()
