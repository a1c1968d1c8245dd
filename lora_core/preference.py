"""Direct preference optimisation by rows (Rafailov et al., 2023): a pair's answers lie in one row, the chosen first.

The reference is the row of zeros, the base: what it thinks of a pair comes with the lesson.  K slots, T tokens a slot,
N pairs a slot, D documents a slot and what is left of the row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_core.data.packing import Row
from lora_core.objectives import ObjectiveSpec


@dataclass(frozen=True)
class Pairs:
    """What makes a row one of pairs: the objective, and the base's margin of each pair in it."""

    row: Row
    objective: ObjectiveSpec
    reference: tuple[float, ...]

    @property
    def settings(self) -> tuple[float, float, float]:
        """How many pairs, beta, and the smoothing."""
        return len(self.reference), self.objective.beta, self.objective.label_smoothing

    def lengths(self, documents: int, tokens: int) -> list[int]:
        """Tokens of each document, as many as are asked for, and of what is left of so many."""
        found = list(self.row.lengths)
        return [*found, *[0] * (documents - len(found)), tokens - sum(found)]


class Reference:
    """What a learner's answers come to: its objective's loss, of pairs against what the base thinks of each."""

    def __init__(self, objective: ObjectiveSpec) -> None:
        self.objective = objective
        self._margins: dict[bool, dict[int, float]] = {True: {}, False: {}}  # the base's, of pairs learnt and held out

    def hear(self, rows: Sequence[Row], trains: bool, answers: Sequence[Sequence[float]]) -> None:
        """What the base answered to rows of pairs."""
        for row, margins in zip(rows, answers, strict=True):
            self._margins[trains].update(zip(row.examples[::2], margins, strict=True))

    def pairs(self, row: Row, trains: bool) -> Pairs | None:
        """A row's pairs against what the base thinks of them; against nothing until it has been heard."""
        if not self.objective.paired:
            return None
        known = self._margins[trains]
        return Pairs(row, self.objective, tuple(known.get(index, 0.0) for index in row.examples[::2]))

    def counted(self, rows: Sequence[Row]) -> int:
        """What losses are a mean over: predictions, or pairs."""
        return sum(len(row.examples) // 2 if self.objective.paired else row.counted for row in rows)

    def total(self, answers: Sequence[Sequence[float]]) -> float:
        """The summed loss."""
        heard = list(chain(*answers))
        if self.objective.paired:
            gains_N = torch.tensor(heard, dtype=torch.float64)
            heard = preference_losses(gains_N, self.objective.beta, self.objective.label_smoothing).tolist()
        return math.fsum(heard)


def preference_losses(gains: Tensor, beta: Tensor | float, smoothing: Tensor | float) -> Tensor:
    """-log sigmoid(beta * gain) of each pair; with smoothing, some pairs are the wrong way round (Mitchell, 2023)."""
    logits = beta * gains
    return -(1 - smoothing) * F.logsigmoid(logits) - smoothing * F.logsigmoid(-logits)


def lesson_losses(loss_KT: Tensor, pairs: Sequence[Pairs | None]) -> tuple[Tensor, Tensor]:
    """Each slot's summed loss, shape K, and its answer: the loss itself, or its pairs' gains; the rest is filling.

    No slot's numbers depend on the others', nor on how many pairs those have.
    """
    loss_K = loss_KT.sum(1)
    if not any(pairs):
        return loss_K, loss_K[:, None]
    gain_KN = _gains(loss_KT, pairs)
    settings = [one.settings if one else (0.0, 0.0, 0.0) for one in pairs]
    count_K1, beta_K1, smoothing_K1 = torch.tensor(settings, dtype=torch.float64).to(loss_K.device).split(1, dim=1)
    present_KN = torch.arange(gain_KN.shape[1], device=loss_K.device) < count_K1
    losses_KN = torch.where(present_KN, preference_losses(gain_KN, beta_K1, smoothing_K1), 0.0)
    paired_K1 = count_K1 > 0
    answers_KN = torch.where(paired_K1, gain_KN, loss_K[:, None].double())
    return torch.where(paired_K1[:, 0], losses_KN.sum(1).float(), loss_K), answers_KN


def _gains(loss_KT: Tensor, pairs: Sequence[Pairs | None]) -> Tensor:
    """log p(chosen) - log p(rejected) less the reference's, K x N in fp64: sums of many tokens are told apart."""
    most = max(len(one.reference) for one in pairs if one)
    tokens = loss_KT.shape[1]
    lengths = [one.lengths(2 * most, tokens) if one else [0] * 2 * most + [tokens] for one in pairs]
    reference = [list(one.reference) + [0.0] * (most - len(one.reference)) if one else [0.0] * most for one in pairs]
    lengths_KD = torch.tensor(lengths, device=loss_KT.device)
    # Document by document in order, without atomics: the same bits every time, whatever the others' lengths are.
    sum_KD = torch.segment_reduce(loss_KT.double(), "sum", lengths=lengths_KD, axis=1)
    reference_KN = torch.tensor(reference, dtype=torch.float64, device=loss_KT.device)
    return sum_KD[:, 1:-1:2] - sum_KD[:, :-1:2] - reference_KN  # losses are -log p
