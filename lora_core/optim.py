"""AdamW, clipping and schedules by row: one element-wise pass over K x P with a column of settings a user.

K slots, P numbers a user.  A row that does not step has rate 0, decay 0 and both betas 1: it stays exactly as it was.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_core.cohort import Cohort
from lora_core.recipe import Recipe

# Columns worked on at a time: the five matrices' blocks of all K rows stay in a core's cache.
_BLOCK_NUMBERS = 1 << 16


@dataclass(frozen=True)
class RowStep:
    """One slot's settings for one optimiser step (`step` counts from 1)."""

    step: int
    rate: float
    recipe: Recipe


def rate_at(recipe: Recipe, step: int, steps: int) -> float:
    """The learning rate of a step from 1 to `steps`: linear warm-up, then the recipe's decay towards 0."""
    warm = math.ceil(recipe.warmup * steps)
    if step <= warm:
        return recipe.learning_rate * step / (warm + 1)
    left = (steps - step + 1) / max(1, steps - warm)
    shape = {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left))}
    return recipe.learning_rate * shape[recipe.schedule]


def gradient_norms(cohort: Cohort) -> Tensor:
    """Each slot's own gradient norm, shape K."""
    norms_K: Tensor = torch.linalg.vector_norm(cohort.gradient_KP, dim=1, dtype=torch.float32)
    return norms_K


def step_rows(cohort: Cohort, due: list[RowStep | None], norms: list[float]) -> None:
    """One AdamW step (Loshchilov & Hutter, 2019, as in torch.optim.AdamW) of the rows that are due, in place.

    Gradients of the rows that stepped are zero afterwards; those of the others are kept to accumulate.
    """
    columns = torch.tensor([_column(row, norm) for row, norm in zip(due, norms, strict=True)])
    beta1_K1, beta2_K1, decay_K1, size_K1, root_K1, epsilon_K1, clip_K1, keep_K1 = (
        columns.to(cohort.weights_KP.device, torch.float32).T[:, :, None].unbind()
    )
    block = max(256, _BLOCK_NUMBERS // cohort.slots)
    for start in range(0, cohort.weights_KP.shape[1], block):
        here = slice(start, start + block)
        w, m, v = cohort.weights_KP[:, here], cohort.first_KP[:, here], cohort.second_KP[:, here]
        stored = cohort.gradient_KP[:, here]
        g = stored * clip_K1
        m.lerp_(g, 1 - beta1_K1)
        v.lerp_(g.square_(), 1 - beta2_K1)
        denominator = v.sqrt().mul_(root_K1).add_(epsilon_K1)
        w.mul_(decay_K1).addcdiv_(m * size_K1, denominator, value=-1)
        stored.mul_(keep_K1)
    cohort.refresh()


def _column(row: RowStep | None, norm: float) -> tuple[float, ...]:
    """beta1, beta2, decay, step size, 1 / sqrt(bias correction), epsilon, clip factor, gradient kept."""
    if row is None:
        return (1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0)
    recipe, step = row.recipe, row.step
    return (
        recipe.beta1,
        recipe.beta2,
        1 - row.rate * recipe.weight_decay,
        row.rate / (1 - recipe.beta1**step),
        1 / math.sqrt(1 - recipe.beta2**step),
        recipe.epsilon,
        min(1.0, recipe.clip / (norm + 1e-6)),
        0.0,
    )
