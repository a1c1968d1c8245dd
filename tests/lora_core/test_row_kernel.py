"""AdamW of many rows as one kernel: what torch's own does, and nobody else's numbers touched.

Without a GPU the kernel runs in Triton's interpreter, number for number.
"""

import random

import pytest
import torch

from lora_core import optim
from lora_core.cohort import Cohort
from lora_core.optim import RowStep
from lora_core.recipe import Recipe

pytest.importorskip("triton", reason="Triton comes with torch for a GPU")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WIDTH = 2500  # three blocks, the last not full


@pytest.fixture
def step_due(monkeypatch: pytest.MonkeyPatch):
    if DEVICE.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")  # read when the kernel is made
    from lora_core.row_kernel import step_due

    return step_due


def cohort_of(dtype: torch.dtype, slots: int = 4) -> Cohort:
    cohort = Cohort(slots, WIDTH, DEVICE, dtype)
    generator = torch.Generator().manual_seed(1)
    for matrix in (cohort.weights_KP, cohort.gradient_KP, cohort.first_KP):
        matrix.copy_(torch.randn(slots, WIDTH, generator=generator))
    cohort.second_KP.copy_(torch.rand(slots, WIDTH, generator=generator))
    for slot in range(slots):
        cohort.refresh(slot)
    return cohort


def matrices(cohort: Cohort) -> list[torch.Tensor]:
    return [cohort.weights_KP, cohort.working_KP, cohort.gradient_KP, cohort.first_KP, cohort.second_KP]


def random_step(number: int) -> RowStep:
    draw = random.Random(number)
    recipe = Recipe(
        weight_decay=draw.choice([0.0, 0.1]), beta2=draw.choice([0.9, 0.999]), clip=draw.choice([0.5, 80.0])
    )
    return RowStep(draw.randint(1, 50), draw.choice([1e-4, 5e-3]), recipe)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_steps_as_under_torchs_fused_adamw(dtype, step_due):
    for number in range(6):
        ours, theirs = cohort_of(dtype), cohort_of(dtype)
        due = {slot: random_step(4 * number + slot) for slot in (0, 2, 3)}
        norms = [40.0, 0.0, 60.0, 3.0]
        step_due(ours, {slot: optim._settings(row, norms[slot]) for slot, row in due.items()})
        optim._step_by_torch(theirs, due, norms)
        for one, other in zip(matrices(ours), matrices(theirs), strict=True):
            torch.testing.assert_close(
                one.float(), other.float(), rtol=1e-2 if one.dtype != torch.float32 else 2e-6, atol=1e-6
            )


def test_a_rows_bits_depend_on_nobody_and_no_place(step_due):
    together = cohort_of(torch.bfloat16)
    before = [matrix.clone() for matrix in matrices(together)]
    settings = {slot: optim._settings(random_step(slot), 70.0) for slot in (3, 1)}
    step_due(together, settings)
    for slot in (0, 2):
        assert all(torch.equal(now[slot], then[slot]) for now, then in zip(matrices(together), before, strict=True))
    alone = cohort_of(torch.bfloat16)
    for now, then in zip(matrices(alone), before, strict=True):
        now[0] = then[3]
    step_due(alone, {0: settings[3]})
    for one, other in zip(matrices(alone), matrices(together), strict=True):
        assert torch.equal(one[0], other[3])
