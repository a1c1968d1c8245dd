"""The products of a LoRA group, forward and backward, and the same as operators that a compiler does not look into.

K slots, T tokens a slot, I inputs and O outputs of a site, R the bank's rank, S = R times the sites of a group.
Every narrow product has R or S as its rows, not its columns: half the time on a CPU.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_core.products import add_product, add_quick_product, product_and_sum
from lora_core.quantised import QuantisedLinear

Frozen = Tensor | QuantisedLinear  # a weight as [in, out]; one that is kept in few bits stays so until it is used


def lows(x_KTI: Tensor, down_KSI: Tensor, scale_K11: Tensor, keep_KTI: Tensor | None) -> Tensor:
    """scale * (keep * x) A^T for all linears of a group, row by row, K S T."""
    return torch.bmm(down_KSI, _seen(x_KTI, keep_KTI).mT).mul_(scale_K11)


def sums(
    x_KTI: Tensor,
    frozen: Sequence[Frozen],
    biases_O: Sequence[Tensor | None],
    low_KST: Tensor,
    ups_KRO: Sequence[Tensor],
) -> list[Tensor]:
    """y = x W + b + low B^T for each linear of a group."""
    lows_KRT = low_KST.chunk(len(ups_KRO), dim=1)
    return [
        product_and_sum(x_KTI, _plain(weight, x_KTI.dtype), bias_O, low_KRT.mT, up_KRO)
        for weight, bias_O, low_KRT, up_KRO in zip(frozen, biases_O, lows_KRT, ups_KRO, strict=True)
    ]


def deltas(
    x_KTI: Tensor,
    frozen: Sequence[Frozen],
    biases_O: Sequence[Tensor | None],
    down_KSI: Tensor,
    ups_KRO: Sequence[Tensor],
    scale_K11: Tensor,
    keep_KTI: Tensor | None,
) -> list[Tensor]:
    """y = x W + b + scale * (keep * x) A^T B^T for each linear of a group; last, the low-rank low_KST."""
    low_KST = lows(x_KTI, down_KSI, scale_K11, keep_KTI)
    return [*sums(x_KTI, frozen, biases_O, low_KST, ups_KRO), low_KST]


def deltas_gradients(
    gs_KTO: Sequence[Tensor],
    x_KTI: Tensor,
    frozen: Sequence[Frozen],
    low_KST: Tensor,
    down_KSI: Tensor,
    ups_KRO: Sequence[Tensor],
    scale_K11: Tensor,
    keep_KTI: Tensor | None,
    to_x: bool,
    into: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Gradients of x (empty unless `to_x`), of down and of each up, from those of the group's outputs.

    The factors' are added to `into`, down's first, if that is given.
    """
    given: Sequence[Tensor | None] = into or [None] * (1 + len(ups_KRO))
    down_into, *ups_into = given
    lows_KRT = low_KST.chunk(len(ups_KRO), dim=1)
    ups_g_KRO = [
        add_product(up_into, low_KRT, g_KTO) for up_into, low_KRT, g_KTO in zip(ups_into, lows_KRT, gs_KTO, strict=True)
    ]
    lows_g_KRT = [torch.bmm(up_KRO, g_KTO.mT) for up_KRO, g_KTO in zip(ups_KRO, gs_KTO, strict=True)]
    low_g_KST = torch.cat(lows_g_KRT, dim=1).mul_(scale_K11)
    down_g_KSI = add_product(down_into, low_g_KST, _seen(x_KTI, keep_KTI))
    if not to_x:
        return [x_KTI.new_empty(0), down_g_KSI, *ups_g_KRO]
    x_g_KTI = torch.bmm(low_g_KST.mT, down_KSI)
    if keep_KTI is not None:
        x_g_KTI.mul_(keep_KTI)
    for weight, g_KTO in zip(frozen, gs_KTO, strict=True):
        add_quick_product(x_g_KTI, g_KTO, _plain(weight, g_KTO.dtype).mT)
    return [x_g_KTI, down_g_KSI, *ups_g_KRO]


def _seen(x_KTI: Tensor, keep_KTI: Tensor | None) -> Tensor:
    return x_KTI if keep_KTI is None else x_KTI * keep_KTI


def _plain(weight: Frozen, dtype: torch.dtype) -> Tensor:
    return weight if isinstance(weight, Tensor) else weight.unpacked(dtype).mT


# The same for a compiler: it plans around them, and does not take them apart into slower products of its own.

torch.library.define(
    "lora_core::deltas",
    "(Tensor x, Tensor[] frozen, Tensor?[] biases, Tensor down, Tensor[] ups, Tensor scale, Tensor? keep) -> Tensor[]",
)
torch.library.define(
    "lora_core::deltas_gradients",
    "(Tensor[] gs, Tensor x, Tensor[] frozen, Tensor low, Tensor down, Tensor[] ups, Tensor scale, Tensor? keep,"
    " bool to_x) -> Tensor[]",
)


def _deltas_shapes(x_KTI: Tensor, frozen: Sequence[Tensor], biases: Any, down_KSI: Tensor, *_: Any) -> list[Tensor]:
    slots, tokens = x_KTI.shape[:2]
    outputs = [x_KTI.new_empty(slots, tokens, weight_IO.shape[1]) for weight_IO in frozen]
    return [*outputs, x_KTI.new_empty(slots, down_KSI.shape[1], tokens)]


def _gradients_shapes(
    gs: Any, x_KTI: Tensor, frozen: Any, low: Any, down_KSI: Tensor, ups_KRO: Sequence[Tensor], scale: Any, keep: Any,
    to_x: bool,
) -> list[Tensor]:  # fmt: skip
    return [x_KTI.new_empty(x_KTI.shape if to_x else 0), *(f.new_empty(f.shape) for f in (down_KSI, *ups_KRO))]


def _keep_for_gradients(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:  # torch's context object
    x_KTI, frozen, biases, down_KSI, ups_KRO, scale_K11, keep_KTI = inputs
    ctx.biased = isinstance(biases[0], Tensor)
    ctx.save_for_backward(x_KTI, output[-1], down_KSI, scale_K11, keep_KTI, *frozen, *ups_KRO)


def _gradients(ctx: Any, gs_KTO: Sequence[Tensor]) -> tuple[Any, ...]:  # torch's context object
    x_KTI, low_KST, down_KSI, scale_K11, keep_KTI, *rest = ctx.saved_tensors
    sites, to_x = len(rest) // 2, ctx.needs_input_grad[0]
    frozen, ups_KRO = rest[:sites], rest[sites:]
    factors = (low_KST, down_KSI, ups_KRO, scale_K11, keep_KTI)
    gs_KTO = [g_KTO.contiguous() for g_KTO in gs_KTO[:-1]]
    x_g, down_g, *ups_g = torch.ops.lora_core.deltas_gradients(gs_KTO, x_KTI, frozen, *factors, to_x)
    nothing = [None] * sites
    return x_g if to_x else None, nothing, nothing if ctx.biased else None, down_g, ups_g, None, None


torch.library.impl("lora_core::deltas", "default", deltas)
torch.library.impl("lora_core::deltas_gradients", "default", deltas_gradients)
torch.library.register_fake("lora_core::deltas", _deltas_shapes)
torch.library.register_fake("lora_core::deltas_gradients", _gradients_shapes)
torch.library.register_autograd("lora_core::deltas", _gradients, setup_context=_keep_for_gradients)
