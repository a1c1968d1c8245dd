"""AdamW of many rows as one kernel, for a GPU: every number is read once and written once, whoever of the K is due.

Row by row torch's fused kernel takes a dozen calls a row, and 16 bytes a number more.  K slots, P numbers a user.
"""

from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.cohort import Cohort

BLOCK = 1024  # numbers a program


def step_due(cohort: Cohort, settings: Mapping[int, Sequence[float]]) -> None:
    """One AdamW step (Loshchilov & Hutter, 2019) of the slots in `settings`, in place; their gradients become zero.

    A slot's settings: the step size, what decay leaves of a weight, beta1, beta2, the square root of the second
    moment's correction, epsilon, and what divides the gradient.
    """
    if not settings:  # a grid of nothing cannot be launched
        return
    slots_N = torch.tensor(list(settings), dtype=torch.int64).to(cohort.weights_KP.device)
    settings_N7 = torch.tensor(list(settings.values()), dtype=torch.float32).to(cohort.weights_KP.device)
    matrices = cohort.weights_KP, cohort.working_KP, cohort.gradient_KP, cohort.first_KP, cohort.second_KP
    torch.ops.lora_core.step_due(*matrices, slots_N, settings_N7)


def _launch(
    weights_KP: Tensor, working_KP: Tensor, gradient_KP: Tensor, first_KP: Tensor, second_KP: Tensor,
    slots_N: Tensor, settings_N7: Tensor,
) -> None:  # fmt: skip
    width, copies = weights_KP.shape[1], working_KP.data_ptr() != weights_KP.data_ptr()
    _step_block[(triton.cdiv(width, BLOCK), len(slots_N))](
        weights_KP, working_KP, gradient_KP, first_KP, second_KP, slots_N, settings_N7, width, copies, BLOCK
    )


@triton.jit  # type: ignore[untyped-decorator]  # triton's
def _step_block(  # type: ignore[no-untyped-def]  # noqa: ANN202  Triton reads annotations as code
    weights, working, gradient, first, second, slots, settings, width,  # noqa: ANN001  pointers to what they say
    copies: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    due = tl.program_id(1)
    setting = settings + due * 7
    step_size, kept, beta1, beta2 = (
        tl.load(setting), tl.load(setting + 1), tl.load(setting + 2), tl.load(setting + 3)
    )  # fmt: skip
    correction, epsilon, divisor = tl.load(setting + 4), tl.load(setting + 5), tl.load(setting + 6)
    place = tl.program_id(0) * block + tl.arange(0, block)
    inside = place < width
    at = tl.load(slots + due) * width + place

    g = tl.load(gradient + at, mask=inside).to(tl.float32) / divisor
    m, v = tl.load(first + at, mask=inside), tl.load(second + at, mask=inside)
    m += (1 - beta1) * (g - m)
    v = beta2 * v + (1 - beta2) * g * g
    w = tl.load(weights + at, mask=inside) * kept - step_size * m / (tl.sqrt(v) / correction + epsilon)

    tl.store(first + at, m, mask=inside)
    tl.store(second + at, v, mask=inside)
    tl.store(weights + at, w, mask=inside)
    if copies:
        tl.store(working + at, w.to(working.dtype.element_ty), mask=inside)
    tl.store(gradient + at, 0.0, mask=inside)


# An operator, so that a step without data can be taken through it: it allocates nothing.

torch.library.define(
    "lora_core::step_due",
    "(Tensor(a!) weights, Tensor(b!) working, Tensor(c!) gradient, Tensor(d!) first, Tensor(e!) second, Tensor slots,"
    " Tensor settings) -> ()",
)
torch.library.impl("lora_core::step_due", "default", _launch)
torch.library.register_fake("lora_core::step_due", lambda *_: None)
