"""AdamW, clipping and schedules by row: torch's fused kernel, one pass over a user's row under the user's settings.

K slots, P numbers a user.
"""

import logging
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from lora_core.cohort import Cohort
from lora_core.recipe import Recipe

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stretch:
    """Numbers of a row from `start` to before `stop`, at a multiple of the row's rate; at 0 they do not train."""

    start: int
    stop: int
    times: float


@dataclass(frozen=True)
class RowStep:
    """One slot's settings for one optimiser step (`step` counts from 1)."""

    step: int
    rate: float
    recipe: Recipe
    stretches: Sequence[Stretch] = ()  # none: the whole row at its rate


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


def step_rows(cohort: Cohort, due: Sequence[RowStep | None], norms: Sequence[float]) -> None:
    """One AdamW step (Loshchilov & Hutter, 2019) of the rows that are due, in place, each under its own settings.

    On a GPU all rows of one rate step at once.  Gradients of the rows that stepped are zero afterwards; those of the
    others are kept to accumulate.
    """
    stepping = {slot: row for slot, row in enumerate(due) if row}
    if cohort.weights_KP.is_cuda and kernels_start():
        from lora_core.row_kernel import step_due

        step_due(cohort, {slot: _settings(row, norms[slot]) for slot, row in stepping.items() if not row.stretches})
        stepping = {slot: row for slot, row in stepping.items() if row.stretches}
    _step_by_torch(cohort, stepping, norms)


@cache
def kernels_start() -> bool:
    """Whether Triton is here, which not every torch brings, and the C compiler that it starts kernels with."""
    if not find_spec("triton"):
        return False
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")  # Triton's own rule
    if not compiler:
        _log.warning("there is no C compiler, so users' steps are taken one by one; install gcc, or name one in CC")
    return bool(compiler)


def _step_by_torch(cohort: Cohort, due: Mapping[int, RowStep], norms: Sequence[float]) -> None:
    """Row by row, a stretch of its own rate at a time."""
    before_N2 = torch.tensor([(row.step - 1.0, _divisor(row, norms[slot])) for slot, row in due.items()])
    for (slot, row), (done, divisor) in zip(due.items(), before_N2.to(cohort.weights_KP.device), strict=True):
        recipe = row.recipe
        rows = cohort.weights_KP[slot], cohort.gradient_KP[slot].float(), cohort.first_KP[slot], cohort.second_KP[slot]
        for times, parts in _by_rate(row.stretches).items():
            weights, gradients, first, second = (_cut(row_P, parts) for row_P in rows)
            adamw(
                weights, gradients, first, second, [],
                state_steps=[done.clone() for _ in weights], grad_scale=divisor, fused=True,
                lr=row.rate * times, beta1=recipe.beta1, beta2=recipe.beta2, eps=recipe.epsilon,
                weight_decay=recipe.weight_decay, amsgrad=False, maximize=False,
            )  # fmt: skip
        cohort.gradient_KP[slot].zero_()
        cohort.refresh(slot)


def _settings(row: RowStep, norm: float) -> tuple[float, ...]:
    """What `step_due` takes."""
    recipe, rate = row.recipe, row.rate
    first, second = 1 - recipe.beta1**row.step, 1 - recipe.beta2**row.step
    kept = 1 - rate * recipe.weight_decay
    return rate / first, kept, recipe.beta1, recipe.beta2, math.sqrt(second), recipe.epsilon, _divisor(row, norm)


def clear_fixed(cohort: Cohort, slot: int, stretches: Sequence[Stretch]) -> None:
    """Zero the gradient of a row's numbers that do not train: it is no part of the row's norm."""
    fixed = [cohort.gradient_KP[slot, one.start : one.stop] for one in stretches if not one.times]
    if fixed:
        torch._foreach_zero_(fixed)


def _by_rate(stretches: Sequence[Stretch]) -> dict[float, list[slice]]:
    """The parts of a row that step, by the multiple of its rate; none stands for the whole row."""
    parts: dict[float, list[slice]] = {} if stretches else {1.0: []}
    for stretch in stretches:
        if stretch.times:
            parts.setdefault(stretch.times, []).append(slice(stretch.start, stretch.stop))
    return parts


def _cut(row_P: Tensor, parts: Sequence[slice]) -> list[Tensor]:
    return [row_P[part] for part in parts] or [row_P]


def _divisor(row: RowStep, norm: float) -> float:
    """What divides the gradient: 1, or more where the norm is above the recipe's clip."""
    return max(1.0, (norm + 1e-6) / row.recipe.clip)
