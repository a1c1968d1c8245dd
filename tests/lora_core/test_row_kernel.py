"""AdamW of many rows as one kernel: what torch's own does, and nobody else's numbers touched.

Without a GPU the kernel runs in Triton's interpreter, number for number, and is compiled for one that is not there.
"""

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lora_core import optim
from lora_core.cohort import Cohort
from lora_core.optim import RowStep
from lora_core.recipe import Recipe

pytest.importorskip("triton", reason="Triton is for Linux on x86")
ROOT = Path(__file__).parents[2]
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
WIDTH = 2500  # three blocks, the last not full
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from lora_core.row_kernel import BLOCK, _step_block
kinds = dict.fromkeys(("weights", "first", "second", "settings"), "*fp32") | {"slots": "*i64", "width": "i32"}
kinds |= dict.fromkeys(("working", "gradient"), "*bf16") | dict.fromkeys(("copies", "block"), "constexpr")
for copies in (False, True):
    source = triton.compiler.ASTSource(_step_block, kinds, {"copies": copies, "block": BLOCK})
    print(len(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]))
"""

Step = Callable[[Cohort, Mapping[int, Sequence[float]]], None]


@pytest.fixture(scope="module")
def step_due() -> Iterator[Step]:
    """The kernel, to be called; Triton reads the variable when the kernel is made."""
    with pytest.MonkeyPatch.context() as patch:
        if not GPU:
            patch.setenv("TRITON_INTERPRET", "1")
        from lora_core.row_kernel import step_due

        yield step_due


def cohort_of(dtype: torch.dtype) -> Cohort:
    """Four rows with gradients, in the middle of their training."""
    cohort, generator = Cohort(4, WIDTH, DEVICE, dtype), torch.Generator().manual_seed(1)
    for matrix_KP in (cohort.weights_KP, cohort.gradient_KP, cohort.first_KP):
        matrix_KP.copy_(torch.randn(4, WIDTH, generator=generator))
    cohort.second_KP.copy_(torch.rand(4, WIDTH, generator=generator))
    for slot in range(4):
        cohort.refresh(slot)
    return cohort


def matrices(cohort: Cohort) -> list[Tensor]:
    """All that a step changes."""
    return [cohort.weights_KP, cohort.working_KP, cohort.gradient_KP, cohort.first_KP, cohort.second_KP]


def random_step(number: int) -> RowStep:
    """Settings of one row."""
    draw = random.Random(number)
    decay, beta2, clip = draw.choice([0.0, 0.1]), draw.choice([0.9, 0.999]), draw.choice([0.5, 80.0])
    return RowStep(draw.randint(1, 50), draw.choice([1e-4, 5e-3]), Recipe(weight_decay=decay, beta2=beta2, clip=clip))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_a_row_steps_as_by_torchs_fused_adamw(dtype: torch.dtype, bound: float, step_due: Step) -> None:
    """Weights, both moments, the working copy; the gradient is zero, and a row that is not due stays as it is."""
    norms = [40.0, 0.0, 60.0, 3.0]
    for number in range(6):
        ours, theirs = cohort_of(dtype), cohort_of(dtype)
        due = {slot: random_step(4 * number + slot) for slot in (0, 2, 3)}

        step_due(ours, {slot: optim._settings(row, norms[slot]) for slot, row in due.items()})
        optim._step_by_torch(theirs, due, norms)

        for one_KP, other_KP in zip(matrices(ours), matrices(theirs), strict=True):
            within = 2e-6 if one_KP.dtype == torch.float32 else bound
            torch.testing.assert_close(one_KP, other_KP, rtol=within, atol=1e-6)


def test_a_rows_bits_depend_on_nobody_and_no_place(step_due: Step) -> None:
    """Beside another, after another, in another slot: the same; those who are not due are not touched."""
    together, settings = cohort_of(torch.bfloat16), {slot: optim._settings(random_step(slot), 70.0) for slot in (3, 1)}
    before = [matrix_KP.clone() for matrix_KP in matrices(together)]
    alone = cohort_of(torch.bfloat16)
    for now_KP, then_KP in zip(matrices(alone), before, strict=True):
        now_KP[0] = then_KP[3]

    step_due(together, settings)
    step_due(together, {})  # nobody
    step_due(alone, {0: settings[3]})

    for one_KP, other_KP, then_KP in zip(matrices(alone), matrices(together), before, strict=True):
        assert torch.equal(one_KP[0], other_KP[3])
        assert torch.equal(other_KP[0], then_KP[0])
        assert torch.equal(other_KP[2], then_KP[2])


def test_it_compiles_for_a_gpu_that_is_not_there() -> None:
    """The interpreter takes more than the compiler does."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, cwd=ROOT, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert all(int(size) > 1000 for size in done.stdout.split())
