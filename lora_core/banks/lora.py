"""LoRA as rows: what a user's P numbers mean, where they enter the base, how they become tensors and come back.

K slots, T tokens a slot, I inputs and O outputs of a site, R the widest rank of the cohort, P numbers a user.
A user of lower rank, or without some site, has zeros there: zero rows and columns have zero gradient and stay zero.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, groupby
from operator import itemgetter

import torch
from torch import Tensor

from lora_core.banks.bank import whole_lines
from lora_core.banks.lora_sites import LoraGroup, LoraSite
from lora_core.banks.lora_starts import Principals
from lora_core.base_model import BaseModel, Site
from lora_core.cohort import Cohort
from lora_core.errors import TrainingError
from lora_core.methods import LoraSpec
from lora_core.optim import Stretch

PREFIX = "base_model.model."  # PEFT's: LoraModel around the model


@dataclass(frozen=True)
class LoraBank:
    """Where each site's two factors lie in a row of P numbers.

    Group by group of the sites that read the same tensor: their downs, R x I each, one after the other, so that one
    product reads the tensor for all of them; then their ups, R x O each.  Last, in a bank for users with patterns, R
    equal numbers a site, twice: how much more its scale is than the user's, as a share of that; rounded to bf16, in
    which a base may read it, and what that leaves.  They do not train.
    """

    sites: tuple[Site, ...]
    rank: int
    principals: Principals | None = field(default=None, repr=False, compare=False)  # PiSSA's start
    patterned: bool = False  # whether sites can have scales of their own

    @property
    def width(self) -> int:
        """P: how many numbers a user has."""
        return whole_lines(self._scales.stop)

    @property
    def _factors_width(self) -> int:
        return sum(self.rank * (site.inputs + site.outputs) for site in self.sites)

    @property
    def _scales(self) -> slice:
        """Where the scales lie that sites have of their own."""
        return slice(self._factors_width, self._factors_width + 2 * self.rank * len(self.sites) * self.patterned)

    @property
    def size(self) -> int:
        """The widest rank."""
        return self.rank

    @cached_property
    def groups(self) -> list[list[Site]]:
        """The sites by what they read, in the order of the first of each."""
        groups: dict[int, list[Site]] = {}
        for site in self.sites:
            groups.setdefault(site.reads, []).append(site)
        return list(groups.values())

    def start_row(self, spec: LoraSpec, seed: int) -> Tensor:
        """How a user starts, shape P: down uniform in +-1/sqrt(I) (as in PEFT), up zero, so the delta is zero.

        Or from the principal parts of the weights, taken off again by as many rows that do not train.
        """
        if spec.init_lora_weights == "pissa":
            return self._principal_row(spec)
        generator = torch.Generator().manual_seed(seed)
        row_P = self._empty_row(spec)
        for site, (down_RI, _) in zip(self.sites, self.factors(row_P[None]), strict=True):
            if adapts(spec, site):
                bound = 1 / math.sqrt(site.inputs)
                rank = spec.rank_at(site.name)
                down_RI[0, :rank] = torch.empty(rank, site.inputs).uniform_(-bound, bound, generator=generator)
        return row_P

    def _principal_row(self, spec: LoraSpec) -> Tensor:
        assert self.principals  # lora_bank gives them to a bank of such users
        row_P = self._empty_row(spec)
        for site, (down_KRI, up_KRO) in zip(self.sites, self.factors(row_P[None]), strict=True):
            if adapts(spec, site):
                rank, scale = spec.rank_at(site.name), spec.scale_at(site.name)
                down_RI, up_RO = self.principals.factors(site.name, rank, scale)
                down_KRI[0, : 2 * rank] = torch.cat([down_RI, down_RI])
                up_KRO[0, : 2 * rank] = torch.cat([up_RO, -up_RO])
        return row_P

    def _empty_row(self, spec: LoraSpec) -> Tensor:
        """A row without factors: the scales that sites have of their own, and zeros."""
        row_P = torch.zeros(self.width)
        if self.patterned:
            sites = [site for group in self.groups for site in group]
            more = torch.tensor([spec.scale_at(site.name) / spec.scale - 1 for site in sites])
            coarse = more.bfloat16().float()
            row_P[self._scales] = torch.cat([coarse, more - coarse]).repeat_interleave(self.rank)
        return row_P

    def group_scales(self, matrix_KP: Tensor) -> list[Tensor | None]:
        """Each group's more_K2S, a view: how much more each site's scale is, as a share of the user's, in two parts."""
        if not self.patterned:
            return [None] * len(self.groups)
        sizes = [self.rank * len(group) for group in self.groups]
        return list(matrix_KP[:, self._scales].unflatten(1, (2, -1)).split(sizes, dim=2))

    def stretches(self, spec: LoraSpec) -> Sequence[Stretch]:
        """Downs at the recipe's rate, ups at theirs (LoRA+; Hayou et al., 2024); a start that is taken off stays."""
        runs = [run for group in self.groups for run in self._runs(group, spec)]
        if spec.patterned:
            runs.append((self.width - self._factors_width, 0.0))
        if all(times == 1 for _, times in runs):
            return ()
        joined = [(sum(size for size, _ in same), times) for times, same in groupby(runs, key=itemgetter(1))]
        ends = accumulate(size for size, _ in joined)
        return [Stretch(end - size, end, times) for end, (size, times) in zip(ends, joined, strict=True)]

    def _runs(self, group: Sequence[Site], spec: LoraSpec) -> list[tuple[int, float]]:
        """How many numbers of a group's, one after the other, step at which multiple of the rate."""
        sizes = [(site, site.inputs, 1.0) for site in group]
        sizes += [(site, site.outputs, spec.loraplus_lr_ratio) for site in group]
        runs: list[tuple[int, float]] = []
        for site, size, times in sizes:
            trained = self.rank if spec.init_lora_weights is True else spec.rank_at(site.name)
            runs += [(trained * size, times), ((self.rank - trained) * size, 0.0)]
        return [(numbers, times) for numbers, times in runs if numbers]

    def group_factors(self, matrix_KP: Tensor) -> list[tuple[Tensor, list[Tensor]]]:
        """Each group's (down_KSI, up_KRO of each site) as views into the cohort matrix; S is R times the sites."""
        views, start = [], 0
        for group in self.groups:
            sizes = [self.rank * size for size in (len(group) * group[0].inputs, *(site.outputs for site in group))]
            down_KP, *ups_KP = matrix_KP[:, start : start + sum(sizes)].split(sizes, dim=1)
            down_KSI = down_KP.unflatten(1, (-1, group[0].inputs))
            views.append((down_KSI, [up_KP.unflatten(1, (self.rank, -1)) for up_KP in ups_KP]))
            start += sum(sizes)
        return views

    def factors(self, matrix_KP: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Each site's (down_KRI, up_KRO) as views into the cohort matrix: lora_A, and lora_B transposed."""
        views: dict[Site, tuple[Tensor, Tensor]] = {}
        for group, (down_KSI, ups_KRO) in zip(self.groups, self.group_factors(matrix_KP), strict=True):
            views |= dict(zip(group, zip(down_KSI.split(self.rank, dim=1), ups_KRO, strict=True), strict=True))
        return [views[site] for site in self.sites]

    def to_tensors(self, row_P: Tensor, spec: LoraSpec) -> dict[str, Tensor]:
        """A user's row under PEFT's names: lora_A [r, in] and lora_B [out, r] of each adapted site."""
        tensors: dict[str, Tensor] = {}
        for site, (down_KRI, up_KRO) in zip(self.sites, self.factors(row_P[None]), strict=True):
            if adapts(spec, site):
                tensors[f"{PREFIX}{site.name}.lora_A.weight"] = down_KRI[0, : spec.rows_at(site.name)].clone()
                tensors[f"{PREFIX}{site.name}.lora_B.weight"] = up_KRO[0, : spec.rows_at(site.name)].mT.contiguous()
        return tensors

    def from_tensors(self, tensors: Mapping[str, Tensor], spec: LoraSpec) -> Tensor:
        """The row of P numbers that PEFT's tensors describe; a site that is not named stays zero."""
        row_P = self._empty_row(spec)
        for site, (down_KRI, up_KRO) in zip(self.sites, self.factors(row_P[None]), strict=True):
            down = tensors.get(f"{PREFIX}{site.name}.lora_A.weight")
            up = tensors.get(f"{PREFIX}{site.name}.lora_B.weight")
            if down is not None and up is not None:
                down_KRI[0, : len(down)] = down
                up_KRO[0, : len(down)] = up.mT
        return row_P

    def parameters(self, spec: LoraSpec) -> int:
        """How many numbers of a user's row are trained."""
        adapted = [site for site in self.sites if adapts(spec, site)]
        return sum(spec.rank_at(site.name) * (site.inputs + site.outputs) for site in adapted)

    @contextmanager
    def attached(self, base: BaseModel, cohort: Cohort) -> Iterator[None]:
        """While inside, the base's forward pass reads row k of every batch under slot k's adapter."""
        weights, gradients = self.group_factors(cohort.working_KP), self.group_factors(cohort.gradient_KP)
        scales = self.group_scales(cohort.working_KP)
        frozen = {site.name: base.model.get_submodule(site.name) for site in self.sites}
        for number, sites in enumerate(self.groups):
            linears = [frozen[site.name] for site in sites]
            group = LoraGroup(linears, *weights[number], *gradients[number], cohort, number, scales[number])
            for member, site in enumerate(sites):
                base.model.set_submodule(site.name, LoraSite(group, member))
        try:
            yield
        finally:
            for name, linear in frozen.items():
                base.model.set_submodule(name, linear)


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
    ranks = [spec.row_rank // 2 for spec in specs if spec.init_lora_weights == "pissa"]
    linears = {site.name: base.model.get_submodule(site.name) for site in sites} if ranks else {}
    principals = Principals(linears, max(ranks)) if ranks else None
    return LoraBank(sites, max(spec.row_rank for spec in specs), principals, any(spec.patterned for spec in specs))


def _check_targets(base: BaseModel, spec: LoraSpec) -> None:
    ends = sorted({site.name.rpartition(".")[2] for site in base.sites})
    for target in () if spec.targets == "all-linear" else spec.targets:
        if not any(site.name == target or site.name.endswith(f".{target}") for site in base.sites):
            raise TrainingError(base.name, f"has no linear named {target!r}", f"choose from {', '.join(ends)}")
    if not any(adapts(spec, site) for site in base.sites):
        raise TrainingError(base.name, f"has none of layers {spec.layers}", "choose lower layer numbers")
    for end, _ in (*spec.rank_pattern, *spec.alpha_pattern):
        if not any(site.name == end or site.name.endswith(f".{end}") for site in base.sites):
            raise TrainingError(base.name, f"has no linear at {end!r}", f"choose from {', '.join(ends)}")
    for site in base.sites if spec.init_lora_weights == "pissa" else ():
        most = min(site.inputs, site.outputs)
        if adapts(spec, site) and spec.rank_at(site.name) > most:
            raise TrainingError(base.name, f"has a linear of {most} singular values", f"choose a rank up to {most}")
