"""Held-out pairs under adapters: the loss of their objective, and how often an adapter prefers what was chosen."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from lora_core.evaluate import ExampleScore, Scores
from lora_core.objectives import ObjectiveSpec
from lora_core.preference import preference_losses


@dataclass(frozen=True)
class PairScores(Scores):
    """One adapter on one user's held-out pairs, in their order.

    An example is a pair, and right where the adapter moved towards the chosen answer: where its reward margin, beta
    times what it adds to log p(chosen) - log p(rejected), is above 0.  So the base itself is never right.
    """

    unit: ClassVar[str] = "pair"
    margins: tuple[float, ...] = ()  # rewards'
    likelier: tuple[bool, ...] = ()  # whether the chosen answer is likelier than the rejected one

    def summary(self) -> dict[str, float]:
        """The figures that are recorded with a version."""
        count = max(1, len(self.examples))
        return {
            "loss": self.loss,
            "preference_accuracy": self.accuracy,
            "reward_margin": sum(self.margins) / count,
            "chosen_likelier": sum(self.likelier) / count,
            "examples": len(self.examples),
        }


def as_judged(scores: Sequence[Scores], objective: ObjectiveSpec) -> list[Scores]:
    """Scores of the base, which comes first, and of adapters on the same examples, as the objective counts them."""
    if not objective.paired:
        return list(scores)
    margins = [_margins(one) for one in scores]
    return [_against(margins[0], own, objective) for own in margins]


def _margins(scores: Scores) -> list[float]:
    """log p(chosen) - log p(rejected) of each pair, whose documents follow one another."""
    pairs = zip(scores.examples[::2], scores.examples[1::2], strict=True)
    return [rejected.loss - chosen.loss for chosen, rejected in pairs]


def _against(base: Sequence[float], own: Sequence[float], objective: ObjectiveSpec) -> PairScores:
    gains = [ours - theirs for ours, theirs in zip(own, base, strict=True)]
    gains_N = torch.tensor(gains, dtype=torch.float64)
    losses = preference_losses(gains_N, objective.beta, objective.label_smoothing).tolist()
    examples = tuple(ExampleScore(loss, 1, int(gain > 0)) for loss, gain in zip(losses, gains, strict=True))
    return PairScores(examples, tuple(objective.beta * gain for gain in gains), tuple(margin > 0 for margin in own))
