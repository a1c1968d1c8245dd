"""Judge adapters on held-out examples: base, previous and candidate as rows of the same packed forward pass.

A row of zeros is the base, so its score needs no path of its own.  K slots, T tokens a slot, P numbers a user.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lora_core.banks.bank import Bank
from lora_core.banks.table import banks_for
from lora_core.base_model import BaseModel
from lora_core.batch import Batch
from lora_core.cohort import Cohort
from lora_core.data.packing import Row, empty_row, pack
from lora_core.data.rendering import IGNORED, AnyRendered
from lora_core.forward import token_losses
from lora_core.methods import AnyMethod

MOST_NATS = 709.0  # exp of more is no float


@dataclass(frozen=True)
class Trial:
    """One adapter to judge on one user's examples: its row P (None is the base) and its scale."""

    row_P: Tensor | None
    scale: float
    examples: tuple[AnyRendered, ...]


@dataclass(frozen=True)
class Asked:
    """The same of an adapter as its files have it: its settings, its tensors (None: the base), and the examples."""

    spec: AnyMethod
    tensors: Mapping[str, Tensor] | None
    examples: tuple[AnyRendered, ...] = ()

    def trial(self, bank: Bank) -> Trial:
        """As a row of a bank."""
        if self.tensors is None:
            return Trial(None, 0.0, self.examples)
        return Trial(bank.from_tensors(self.tensors, self.spec), self.spec.scale, self.examples)


@dataclass(frozen=True)
class ExampleScore:
    """One example under one adapter: summed loss in nats, predictions that count, and how many were right."""

    loss: float
    tokens: int
    right: int


@dataclass(frozen=True)
class Scores:
    """One adapter on one user's held-out examples, in their order; a pair is two of them, the chosen one first."""

    unit: ClassVar[str] = "token"  # what the loss is a mean over
    examples: tuple[ExampleScore, ...]

    @property
    def loss(self) -> float:
        """Mean loss a token, in nats."""
        return sum(score.loss for score in self.examples) / max(1, self.tokens)

    @property
    def perplexity(self) -> float:
        """exp of the mean loss a token; where that overflows about as much as there is, since JSON has no infinity."""
        return math.exp(min(self.loss, MOST_NATS))

    @property
    def accuracy(self) -> float:
        """Share of the tokens that were the first guess."""
        return sum(score.right for score in self.examples) / max(1, self.tokens)

    @property
    def tokens(self) -> int:
        """Predictions that count."""
        return sum(score.tokens for score in self.examples)

    def summary(self) -> dict[str, float]:
        """The figures that are recorded with a version."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "token_accuracy": self.accuracy,
            "examples": len(self.examples),
            "tokens": self.tokens,
        }


def evaluate(base: BaseModel, bank: Bank, trials: Sequence[Trial], slots: int, row_tokens: int) -> list[Scores]:
    """Score every trial, `slots` rows at a time, in the order given.  Example order is kept."""
    cohort = Cohort(slots, bank.width, base.model.device, base.model.dtype)
    found: list[dict[int, ExampleScore]] = [{} for _ in trials]
    work = [(number, row) for number, trial in enumerate(trials) for row in _rows(trial, row_tokens)]
    seated: list[int | None] = [None] * slots
    with bank.attached(base, cohort), torch.inference_mode():
        for start in range(0, len(work), slots):
            group = work[start : start + slots]
            for slot, (number, _) in enumerate(group):
                if seated[slot] != number:
                    _seat(cohort, slot, trials[number])
                    seated[slot] = number
            rows = [row for _, row in group] + [empty_row(row_tokens)] * (slots - len(group))
            batch = base.stack(rows)
            loss_KT, right_KT = token_losses(base, batch)
            for (number, row), scores in zip(group, _by_document(batch, loss_KT, right_KT), strict=False):
                found[number].update(zip(row.examples, scores, strict=False))
    return [Scores(tuple(score for _, score in sorted(scores.items()))) for scores in found]


def evaluate_all(base: BaseModel, asked: Sequence[Asked], slots: int, row_tokens: int) -> list[Scores]:
    """Score adapters of any methods, method by method, in the order given."""
    found: dict[int, Scores] = {}
    for bank, numbers in banks_for(base, [one.spec for one in asked]):
        trials = [asked[number].trial(bank) for number in numbers]
        found |= zip(numbers, evaluate(base, bank, trials, slots, row_tokens), strict=True)
    return [found[number] for number in range(len(asked))]


def _rows(trial: Trial, row_tokens: int) -> Iterator[Row]:
    documents = [document for example in trial.examples for document in example.documents]
    yield from pack(list(enumerate(documents)), row_tokens)


def _seat(cohort: Cohort, slot: int, trial: Trial) -> None:
    if trial.row_P is None:
        cohort.clear(slot)
    else:
        cohort.admit(slot, trial.row_P, trial.scale)


def _by_document(batch: Batch, loss_KT: Tensor, right_KT: Tensor) -> list[list[ExampleScore]]:
    """Each row's documents' scores, by document number; the filling after the last one scores 0."""
    counted_KT = batch.targets_KT != IGNORED
    figures_KT3 = torch.stack([loss_KT, counted_KT, right_KT & counted_KT], dim=-1).double()
    slots, documents = len(loss_KT), int(batch.documents_KT.max()) + 1
    sums_KD3 = figures_KT3.new_zeros(slots, documents, 3)
    sums_KD3.scatter_add_(1, batch.documents_KT[:, :, None].expand_as(figures_KT3), figures_KT3)
    return [[ExampleScore(loss, int(tokens), int(right)) for loss, tokens, right in row] for row in sums_KD3.tolist()]
