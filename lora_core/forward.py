"""One packed forward pass: K rows of T tokens in, each row's own loss out.  K slots, T tokens, V vocabulary."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_core.base_model import BaseModel
from lora_core.batch import Batch
from lora_core.data.rendering import IGNORED
from lora_core.products import multiplies_alone, quick_product

PIECE_LOGITS, LEAST_PIECE = 1 << 26, 256  # logits at once, where that is no fewer tokens than the least
PIECES, FEWEST = 8, 32  # a batch in so many pieces, of no fewer tokens: less costs more than it leaves out


def token_losses(base: BaseModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Each token's next-token loss in nats (0 where it does not count), and whether the first guess was right; K T."""
    if base.plain_head:
        head_VD = base.model.get_output_embeddings().weight
        hidden_KTD = base.model.base_model(**batch.inputs).last_hidden_state.to(head_VD.device)
        targets_KT = batch.targets_KT.to(head_VD.device)  # the last of several GPUs may hold the head
        loss_KT, right_KT = head_loss(hidden_KTD, head_VD, targets_KT, batch.counted)
        return loss_KT.to(batch.targets_KT.device), right_KT.to(batch.targets_KT.device)
    logits_KTV = base.model(**batch.inputs).logits.float()
    loss_KT = F.cross_entropy(logits_KTV.mT, batch.targets_KT, ignore_index=IGNORED, reduction="none")
    return loss_KT, logits_KTV.detach().argmax(-1) == batch.targets_KT


def head_loss(hidden_KTD: Tensor, head_VD: Tensor, targets_KT: Tensor, counted: int) -> tuple[Tensor, Tensor]:
    """As `token_losses`, through a head that is a frozen matrix; at most so many targets count."""
    found: tuple[Tensor, Tensor] = _HeadLoss.apply(hidden_KTD, head_VD, targets_KT, counted)  # type: ignore[no-untyped-call]  # torch's
    return found


class _HeadLoss(torch.autograd.Function):
    """Next-token loss through a frozen head: -log softmax(h W^T)[target], with its gradient taken on the way.

    The head needs no gradient, so the softmax becomes the gradient in place and the logits are never kept, nor ever
    there for all tokens at once (the fused loss of Hsu et al., "Liger Kernel", 2024, in plain torch); and there are
    none for prompts and filling, but those that fill the last piece up.
    """

    @staticmethod
    def forward(
        ctx: Any,  # torch's context object
        hidden_KTD: Tensor, head_VD: Tensor, targets_KT: Tensor, counted: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        hidden_ND, targets_N, learns = hidden_KTD.flatten(0, 1), targets_KT.flatten(), ctx.needs_input_grad[0]
        loss_N = torch.zeros_like(targets_N, dtype=torch.float32)
        right_N = torch.zeros_like(targets_N, dtype=torch.bool)
        gradient_ND = torch.zeros_like(hidden_ND if learns else hidden_ND[:, :0])
        for at_P in _pieces(targets_N, counted, len(head_VD), multiplies_alone(hidden_ND)):
            found = _piece_loss(hidden_ND[at_P], head_VD, targets_N[at_P], learns)
            for whole, piece in zip((loss_N, right_N, gradient_ND), found, strict=True):
                whole.index_copy_(0, at_P, piece)
        ctx.save_for_backward(gradient_ND.view(*targets_KT.shape, -1))
        right_KT = right_N.view_as(targets_KT)
        ctx.mark_non_differentiable(right_KT)
        return loss_N.view_as(targets_KT), right_KT

    @staticmethod
    def backward(ctx: Any, g_KT: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # torch's context object
        (gradient_KTD,) = ctx.saved_tensors
        return gradient_KTD * g_KT[:, :, None].to(gradient_KTD.dtype), None, None, None


def _pieces(targets_N: Tensor, counted: int, vocabulary: int, alone: bool) -> Iterator[Tensor]:
    """Where the predictions are that count, piece by piece, each P numbers below N.

    No token's bits may depend on how many others count, so P is of the shapes alone, unless rows are multiplied alone.
    The last piece takes tokens of the one before again rather than be shorter.
    """
    tokens = len(targets_N)
    size = min(tokens, max(LEAST_PIECE, PIECE_LOGITS // vocabulary))
    size = size if alone else min(size, max(FEWEST, -(-tokens // PIECES)))
    whole = FEWEST if alone else size
    read = min(tokens, -(-counted // whole) * whole)
    order_N = (targets_N == IGNORED).sort(stable=True).indices[:read]
    for start in range(0, read, size):
        yield order_N[max(0, min(start, read - size)) :][:size]


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
