"""What LoRA does to a base's forward pass: the sites that read one tensor, computed together.

K slots, T tokens a slot, I inputs and O outputs of a site, R the bank's rank, S = R times the sites of a group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_core.banks.lora_products import Frozen, deltas_gradients, lows, sums
from lora_core.cohort import Cohort, as_leaf
from lora_core.quantised import QuantisedLinear


class LoraSite(nn.Module):
    """One linear of a group, in its place in the base."""

    def __init__(self, group: "LoraGroup", member: int) -> None:
        super().__init__()
        self.group, self.member = group, member

    def forward(self, x_KTI: Tensor) -> Tensor:
        """The frozen linear plus each row's own delta, K T O."""
        return self.group.read(x_KTI, self.member)


class LoraGroup:
    """Frozen linears that read the same tensor, with K users' low-rank deltas; row k of the batch belongs to slot k.

    Shapes: x_KTI enters; down_KSI and ups_KRO are views into the cohort matrix, and their gradients into the cohort's
    gradient matrix.  Whichever linear is run first computes for all; the others only hand theirs out.
    """

    def __init__(
        self,
        linears: Sequence[nn.Module],
        down_KSI: Tensor,
        ups_KRO: Sequence[Tensor],
        down_gradient_KSI: Tensor,
        ups_gradient_KRO: Sequence[Tensor],
        cohort: Cohort,
        number: int,
        more_K2S: Tensor | None = None,
    ) -> None:
        self.frozen = [_frozen(linear) for linear in linears]
        self.biases: list[Any] = [linear.bias for linear in linears]  # nn.Module types its attributes loosely
        self.down_KSI = as_leaf(down_KSI, down_gradient_KSI)
        self.ups_KRO = [as_leaf(up_KRO, g_KRO) for up_KRO, g_KRO in zip(ups_KRO, ups_gradient_KRO, strict=True)]
        self.cohort = cohort
        self.more_K2S = more_K2S  # how much more each site's scale is than the user's, as a share in two parts; or None
        self.number = torch.tensor(number, device=down_KSI.device)  # a tensor: a graph is compiled for all numbers
        self._read: Tensor | None = None
        self._ready: dict[int, Tensor] = {}  # what nobody has asked for yet, by member

    def read(self, x_KTI: Tensor, member: int) -> Tensor:
        """What a member makes of x, K T O."""
        if x_KTI is not self._read or member not in self._ready:
            self._read, self._ready = x_KTI, dict(enumerate(self._compute(x_KTI)))
        y_KTO = self._ready.pop(member)
        if not self._ready:
            self._read = None
        return y_KTO

    def factors(self, device: torch.device) -> tuple[Tensor, list[Tensor], Tensor]:
        """down_KSI, ups_KRO and scale_K11 (or K S 1) on a layer's device; their gradients come back."""
        ups_KRO, scale = [up_KRO.to(device) for up_KRO in self.ups_KRO], self.cohort.scale_K11
        if self.more_K2S is not None:  # in fp32: a share of -0.99 would be one of -0.988 in bf16
            scale = torch.addcmul(scale.float(), scale.float(), self.more_K2S.float().sum(1)[:, :, None])
        return self.down_KSI.to(device), ups_KRO, scale.to(device)

    def _compute(self, x_KTI: Tensor) -> Sequence[Tensor]:
        if x_KTI.dim() == 2:  # rows one behind the other, as OPT's MLP reads them
            return [y_KTO.flatten(0, 1) for y_KTO in self._compute(x_KTI.unflatten(0, (self.cohort.slots, -1)))]
        if x_KTI.dim() > 3:  # head by head, as MiniCPM3 reads its keys and values
            places = x_KTI.shape[1:-1]
            return [y_KTO.unflatten(1, places) for y_KTO in self._compute(x_KTI.flatten(1, -2))]
        keep_KTI = self.cohort.dropout_mask(self.number, x_KTI)
        if torch.compiler.is_compiling():
            factors = self.factors(x_KTI.device)
            compiled: list[Tensor] = torch.ops.lora_core.deltas(x_KTI, self.frozen, self.biases, *factors, keep_KTI)
            return compiled[:-1]
        link = Link(self, self.factors(x_KTI.device))
        low_KST = Lows.apply(x_KTI, self.down_KSI, keep_KTI, link)  # type: ignore[no-untyped-call]  # torch's
        eager: Sequence[Tensor] = Sums.apply(x_KTI, low_KST, link)  # type: ignore[no-untyped-call]  # torch's
        return eager


@dataclass
class Link:
    """What the two halves of a group's forward and backward share: factors, and the outputs' gradients on their way."""

    group: LoraGroup
    factors: tuple[Tensor, list[Tensor], Tensor]  # down_KSI, ups_KRO, scale
    gs_KTO: Sequence[Tensor] = ()


class Lows(torch.autograd.Function):
    """The narrow half of `deltas`, and the whole of its backward.

    Halves, since a checkpointed layer is computed again up to the last tensor that is kept for a backward: the wide
    products of the layer's last group are not, as they are not in the frozen base.
    """

    @staticmethod
    def forward(
        ctx: Any,  # torch's context object has no public type
        x_KTI: Tensor, leaf: Tensor, keep_KTI: Tensor | None, link: Link,
    ) -> Tensor:  # fmt: skip
        """low_KST.  `leaf`, any factor, makes autograd call the backward where x needs no gradient."""
        down_KSI, _, scale_K11 = link.factors
        low_KST = lows(x_KTI, down_KSI, scale_K11, keep_KTI)
        ctx.save_for_backward(x_KTI, low_KST, keep_KTI)
        ctx.link = link
        return low_KST

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:  # torch's context object
        """The gradient of x; the factors' are added straight into the cohort's gradient matrix."""
        x_KTI, low_KST, keep_KTI = ctx.saved_tensors
        group, to_x = ctx.link.group, ctx.needs_input_grad[0]
        gs_KTO, ctx.link.gs_KTO = ctx.link.gs_KTO, ()
        down_KSI, ups_KRO, scale_K11 = ctx.link.factors
        leaves = group.down_KSI, *group.ups_KRO
        here = [leaf.grad for leaf in leaves] if group.down_KSI.device == x_KTI.device else None
        x_g_KTI, *gradients = deltas_gradients(
            gs_KTO, x_KTI, group.frozen, low_KST, down_KSI, ups_KRO, scale_K11, keep_KTI, to_x, here
        )
        if here is None:
            for leaf, gradient in zip(leaves, gradients, strict=True):
                leaf.grad.add_(gradient.to(leaf.device))
        return x_g_KTI if to_x else None, None, None, None


class Sums(torch.autograd.Function):
    """The wide half of `deltas`, which keeps nothing; its backward hands what it gets to the narrow half's."""

    @staticmethod
    def forward(ctx: Any, x_KTI: Tensor, low_KST: Tensor, link: Link) -> tuple[Tensor, ...]:  # torch's context object
        """Each linear's K T O."""
        ctx.link, ctx.low = link, (low_KST.shape, low_KST.dtype, low_KST.device)
        return tuple(sums(x_KTI, link.group.frozen, link.group.biases, low_KST, link.factors[1]))

    @staticmethod
    def backward(ctx: Any, *gs_KTO: Tensor) -> tuple[Tensor | None, ...]:  # torch's context object
        """For low_KST something of its shape, which nobody reads."""
        ctx.link.gs_KTO = gs_KTO
        shape, dtype, device = ctx.low
        return None, torch.empty((), dtype=dtype, device=device).expand(shape), None


def _frozen(linear: nn.Module) -> Frozen:
    if isinstance(linear, QuantisedLinear):
        return linear
    weight: Tensor = linear.weight  # type: ignore[assignment]  # nn.Module types its attributes loosely
    return weight if isinstance(linear, Conv1D) else weight.mT
