"""One packed forward pass: K rows of T tokens in, each row's own loss out.  K slots, T tokens, V vocabulary."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_core.base_model import BaseModel
from lora_core.batch import Batch
from lora_core.data.rendering import IGNORED
from lora_core.products import quick_product

PIECE_LOGITS, LEAST_PIECE = 1 << 26, 256  # logits at once, where that is no fewer tokens than the least


def token_losses(base: BaseModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Each token's next-token loss in nats (0 where it does not count), and whether the first guess was right; K T."""
    if base.plain_head:
        head_VD = base.model.get_output_embeddings().weight
        hidden_KTD = base.model.base_model(**batch.inputs).last_hidden_state.to(head_VD.device)
        targets_KT = batch.targets_KT.to(head_VD.device)  # the last of several GPUs may hold the head
        loss_KT, right_KT = _HeadLoss.apply(hidden_KTD, head_VD, targets_KT)  # type: ignore[no-untyped-call]  # torch's
        return loss_KT.to(batch.targets_KT.device), right_KT.to(batch.targets_KT.device)
    logits_KTV = base.model(**batch.inputs).logits.float()
    loss_KT = F.cross_entropy(logits_KTV.mT, batch.targets_KT, ignore_index=IGNORED, reduction="none")
    return loss_KT, logits_KTV.detach().argmax(-1) == batch.targets_KT


class _HeadLoss(torch.autograd.Function):
    """Next-token loss through a frozen head: -log softmax(h W^T)[target], with its gradient taken on the way.

    The head needs no gradient, so the softmax becomes the gradient in place and the logits are never kept, nor ever
    there for all tokens at once (the fused loss of Hsu et al., "Liger Kernel", 2024, in plain torch).
    """

    @staticmethod
    def forward(ctx: Any, hidden_KTD: Tensor, head_VD: Tensor, targets_KT: Tensor) -> tuple[Tensor, Tensor]:
        piece = max(LEAST_PIECE, PIECE_LOGITS // len(head_VD))  # of the shapes alone: the same bytes whoever is in it
        halves = zip(hidden_KTD.flatten(0, 1).split(piece), targets_KT.flatten().split(piece), strict=True)
        pieces = [_piece_loss(h_ND, head_VD, t_N, ctx.needs_input_grad[0]) for h_ND, t_N in halves]
        loss_N, right_N, gradient_ND = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        ctx.save_for_backward(gradient_ND.view(*targets_KT.shape, -1))
        right_KT = right_N.view_as(targets_KT)
        ctx.mark_non_differentiable(right_KT)
        return loss_N.view_as(targets_KT), right_KT

    @staticmethod
    def backward(ctx: Any, g_KT: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # torch's context object
        (gradient_KTD,) = ctx.saved_tensors
        return gradient_KTD * g_KT[:, :, None].to(gradient_KTD.dtype), None, None


def _piece_loss(hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, learns: bool) -> tuple[Tensor, Tensor, Tensor]:
    """N tokens' losses, whether the first guess was right, and the losses' gradient with respect to `hidden_ND`."""
    counted_N1, safe_N1 = (targets_N != IGNORED)[:, None], targets_N.clamp_min(0)[:, None]
    logits_NV = quick_product(hidden_ND, head_VD.mT).float()
    wanted_N1, highest_N1 = logits_NV.gather(-1, safe_N1), logits_NV.amax(-1, keepdim=True)
    odds_NV = logits_NV.sub_(highest_N1).exp_()
    total_N1 = odds_NV.sum(-1, keepdim=True)
    loss_N1 = torch.where(counted_N1, total_N1.log() + highest_N1 - wanted_N1, 0.0)
    right_N1 = counted_N1 & (wanted_N1 == highest_N1)
    if not learns:
        return loss_N1[:, 0], right_N1[:, 0], hidden_ND[:, :0]
    expected_ND = quick_product(odds_NV.to(head_VD.dtype), head_VD) / total_N1.to(head_VD.dtype)
    gradient_ND = torch.where(counted_N1, expected_ND - head_VD[safe_N1[:, 0]], 0.0)
    return loss_N1[:, 0], right_N1[:, 0], gradient_ND
