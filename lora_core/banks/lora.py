"""LoRA as rows: what a user's P numbers mean, what they do to the forward pass, how they become tensors and come back.

K slots, T tokens a slot, I inputs and O outputs of a site, R the widest rank of the cohort, P numbers a user.
A user of lower rank, or without some site, has zeros there: zero rows and columns have zero gradient and stay zero.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_core.base_model import BaseModel, Site
from lora_core.cohort import Cohort
from lora_core.errors import TrainingError
from lora_core.quantised import QuantisedLinear
from lora_core.recipe import LoraSpec

PREFIX = "base_model.model."  # PEFT's: LoraModel around the model


@dataclass(frozen=True)
class LoraBank:
    """Where each site's two factors lie in a row of P numbers: down R x I, then up R x O, site by site."""

    sites: tuple[Site, ...]
    rank: int

    @property
    def width(self) -> int:
        """P: how many numbers a user has."""
        return sum(self.rank * (site.inputs + site.outputs) for site in self.sites)

    def start_row(self, spec: LoraSpec, seed: int) -> Tensor:
        """How a user starts, shape P: down uniform in +-1/sqrt(I) (as in PEFT), up zero, so the delta is zero."""
        generator = torch.Generator().manual_seed(seed)
        row_P = torch.zeros(self.width)
        for site, (down_RI, _) in zip(self.sites, self.factors(row_P[None]), strict=True):
            if adapts(spec, site):
                bound = 1 / math.sqrt(site.inputs)
                start = torch.empty(spec.rank, site.inputs).uniform_(-bound, bound, generator=generator)
                down_RI[0, : spec.rank] = start
        return row_P

    def factors(self, matrix_KP: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Each site's (down_KRI, up_KRO) as views into the cohort matrix: lora_A, and lora_B transposed."""
        sizes = [self.rank * (site.inputs + site.outputs) for site in self.sites]
        starts = [0, *accumulate(sizes)]
        views = []
        for site, start in zip(self.sites, starts, strict=False):
            middle, end = start + self.rank * site.inputs, start + self.rank * (site.inputs + site.outputs)
            down_KRI = matrix_KP[:, start:middle].unflatten(1, (self.rank, site.inputs))
            up_KRO = matrix_KP[:, middle:end].unflatten(1, (self.rank, site.outputs))
            views.append((down_KRI, up_KRO))
        return views

    def to_tensors(self, row_P: Tensor, spec: LoraSpec) -> dict[str, Tensor]:
        """A user's row under PEFT's names: lora_A [r, in] and lora_B [out, r] of each adapted site."""
        tensors: dict[str, Tensor] = {}
        for site, (down_KRI, up_KRO) in zip(self.sites, self.factors(row_P[None]), strict=True):
            if adapts(spec, site):
                tensors[f"{PREFIX}{site.name}.lora_A.weight"] = down_KRI[0, : spec.rank].clone()
                tensors[f"{PREFIX}{site.name}.lora_B.weight"] = up_KRO[0, : spec.rank].mT.contiguous()
        return tensors

    def from_tensors(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The row of P numbers that PEFT's tensors describe; a site that is not named stays zero."""
        row_P = torch.zeros(self.width)
        for site, (down_KRI, up_KRO) in zip(self.sites, self.factors(row_P[None]), strict=True):
            down = tensors.get(f"{PREFIX}{site.name}.lora_A.weight")
            up = tensors.get(f"{PREFIX}{site.name}.lora_B.weight")
            if down is not None and up is not None:
                down_KRI[0, : len(down)] = down
                up_KRO[0, : len(down)] = up.mT
        return row_P

    def parameters(self, spec: LoraSpec) -> int:
        """How many numbers of a user's row are trained."""
        return sum(spec.rank * (site.inputs + site.outputs) for site in self.sites if adapts(spec, site))

    @contextmanager
    def attached(self, base: BaseModel, cohort: Cohort) -> Iterator[None]:
        """While inside, the base's forward pass reads row k of every batch under slot k's adapter."""
        weights, gradients = self.factors(cohort.working_KP), self.factors(cohort.gradient_KP)
        frozen = {site.name: base.model.get_submodule(site.name) for site in self.sites}
        for number, (name, linear) in enumerate(frozen.items()):
            base.model.set_submodule(name, LoraSite(linear, *weights[number], *gradients[number], cohort, number))
        try:
            yield
        finally:
            for name, linear in frozen.items():
                base.model.set_submodule(name, linear)


class LoraSite(nn.Module):
    """One frozen linear with K users' low-rank deltas; row k of the batch belongs to slot k.

    Shapes: x_KTI enters; down_KRI and up_KRO are views into the cohort matrix, and their gradients into the
    cohort's gradient matrix; returns K T O.
    """

    def __init__(
        self,
        frozen: nn.Module,
        down_KRI: Tensor,
        up_KRO: Tensor,
        down_gradient_KRI: Tensor,
        up_gradient_KRO: Tensor,
        cohort: Cohort,
        number: int,
    ) -> None:
        super().__init__()
        self.weight_IO = _frozen_weight(frozen)
        self.bias_O = frozen.bias
        self.down_KRI = down_KRI.detach().requires_grad_()
        self.up_KRO = up_KRO.detach().requires_grad_()
        self.gradients = (down_gradient_KRI, up_gradient_KRO)
        self.cohort, self.number = cohort, number

    def forward(self, x_KTI: Tensor) -> Tensor:
        """The frozen linear plus each row's own delta."""
        keep_KTI = self.cohort.dropout_mask(self.number, x_KTI)
        y_KTO: Tensor = _LowRankDelta.apply(  # type: ignore[no-untyped-call]  # torch's
            x_KTI, self.weight_IO, self.bias_O, self.down_KRI, self.up_KRO,
            self.cohort.scale_K11, keep_KTI, self.gradients,
        )  # fmt: skip
        return y_KTO


def _frozen_weight(frozen: nn.Module) -> "Tensor | QuantisedLinear":
    """A linear's weight as [in, out]; one that is kept in few bits stays so until it is used."""
    if isinstance(frozen, QuantisedLinear):
        return frozen
    weight: Tensor = frozen.weight  # type: ignore[assignment]  # nn.Module types its attributes loosely
    return weight if isinstance(frozen, Conv1D) else weight.mT


def _plain(weight_IO: "Tensor | QuantisedLinear", dtype: torch.dtype) -> Tensor:
    return weight_IO if isinstance(weight_IO, Tensor) else weight_IO.unpacked(dtype).mT


class _LowRankDelta(torch.autograd.Function):
    """y = x W + b + scale * (keep * x) A^T B^T, row by row, with W frozen.

    Its backward adds the factors' gradients straight into the cohort's gradient matrix and fuses the two input
    gradients.  Every narrow product has R as its rows, not its columns: half the time on CPU.  Where the layer is on
    another device than the cohort, the factors go there and their gradients come back.
    """

    @staticmethod
    def forward(
        ctx: Any,  # torch's context object has no public type
        x_KTI: Tensor, weight_IO: Tensor | QuantisedLinear, bias_O: Tensor | None, down_KRI: Tensor, up_KRO: Tensor,
        scale_K11: Tensor, keep_KTI: Tensor | None, gradients: tuple[Tensor, Tensor],
    ) -> Tensor:  # fmt: skip
        down_KRI, up_KRO, scale_K11 = (factor.to(x_KTI.device) for factor in (down_KRI, up_KRO, scale_K11))
        plain_IO = _plain(weight_IO, x_KTI.dtype)
        y_KTO = (
            x_KTI @ plain_IO
            if bias_O is None
            else torch.addmm(bias_O, x_KTI.flatten(0, 1), plain_IO).unflatten(0, x_KTI.shape[:2])
        )
        seen_KTI = x_KTI if keep_KTI is None else x_KTI * keep_KTI
        low_KRT = torch.bmm(down_KRI, seen_KTI.mT).mul_(scale_K11)
        ctx.save_for_backward(seen_KTI, low_KRT, down_KRI, up_KRO, scale_K11, keep_KTI)
        ctx.weight_IO, ctx.gradients = weight_IO, gradients
        return y_KTO.baddbmm_(low_KRT.mT, up_KRO)

    @staticmethod
    def backward(ctx: Any, g_KTO: Tensor) -> tuple[Tensor | None, ...]:  # torch's context object
        seen_KTI, low_KRT, down_KRI, up_KRO, scale_K11, keep_KTI = ctx.saved_tensors
        down_gradient_KRI, up_gradient_KRO = ctx.gradients
        low_g_KRT = torch.bmm(up_KRO, g_KTO.mT).mul_(scale_K11)
        up_gradient_KRO.add_(torch.bmm(low_KRT, g_KTO).to(up_gradient_KRO.device))
        down_gradient_KRI.add_(torch.bmm(low_g_KRT, seen_KTI).to(down_gradient_KRI.device))
        x_g_KTI = None
        if ctx.needs_input_grad[0]:
            x_g_KTI = g_KTO @ _plain(ctx.weight_IO, g_KTO.dtype).mT
            if keep_KTI is None:
                x_g_KTI.baddbmm_(low_g_KRT.mT, down_KRI)
            else:
                x_g_KTI.addcmul_(torch.bmm(low_g_KRT.mT, down_KRI), keep_KTI)
        return x_g_KTI, None, None, None, None, None, None, None


def adapts(spec: LoraSpec, site: Site) -> bool:
    """Whether a user's recipe adapts a site: by the end of its path, as PEFT matches, and by its layer."""
    named = spec.targets == "all-linear" or any(
        site.name == target or site.name.endswith(f".{target}") for target in spec.targets
    )
    layer = next((int(part) for part in site.name.split(".") if part.isdigit()), None)
    return named and (spec.layers is None or layer in spec.layers)


def lora_bank(base: BaseModel, specs: Sequence[LoraSpec]) -> LoraBank:
    """The bank that holds every one of these users: their targets together, their widest rank.

    Raises TrainingError where a target or a layer is not in the base.
    """
    for spec in specs:
        _check_targets(base, spec)
    sites = tuple(site for site in base.sites if any(adapts(spec, site) for spec in specs))
    return LoraBank(sites, max(spec.rank for spec in specs))


def _check_targets(base: BaseModel, spec: LoraSpec) -> None:
    ends = sorted({site.name.rpartition(".")[2] for site in base.sites})
    for target in () if spec.targets == "all-linear" else spec.targets:
        if not any(site.name == target or site.name.endswith(f".{target}") for site in base.sites):
            raise TrainingError(base.name, f"has no linear named {target!r}", f"choose from {', '.join(ends)}")
    if not any(adapts(spec, site) for site in base.sites):
        raise TrainingError(base.name, f"has none of layers {spec.layers}", "choose lower layer numbers")
