"""Bottleneck adapter layers as rows: what a user's P numbers mean, where they enter the base, and how they come back.

Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", 2019: a layer after the attention and one after the
MLP, before the residual addition.  Pfeiffer et al., "AdapterFusion", 2021: one after the MLP.

K slots, D width of the base, W the bank's width, V = W + 1, A the bank's activations, P numbers a user.  A user who is
narrower, or has no layer at some place, has zeros there; these have zero gradient and stay zero.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from lora_core.banks.bank import whole_lines
from lora_core.banks.bottleneck_products import AdapterLayer, Factors
from lora_core.banks.lora import PREFIX
from lora_core.banks.residuals import Place, residual_places
from lora_core.base_model import BaseModel, Site
from lora_core.cohort import Cohort
from lora_core.errors import TrainingError
from lora_core.layers import wrapped
from lora_core.methods import MOST_WIDTH, BottleneckSpec
from lora_core.optim import Stretch


@dataclass(frozen=True)
class BottleneckBank:
    """Where each place's down, up and biases lie in a row of P numbers; last, a switch for each activation.

    Each is whole lines long.
    """

    places: tuple[Place, ...]
    size: int  # W
    activations: tuple[str, ...]

    @property
    def sites(self) -> tuple[Site, ...]:
        """The modules behind which there are adapter layers."""
        return tuple(Site(place.name, place.width, place.width, n) for n, place in enumerate(self.places))

    @property
    def width(self) -> int:
        """P: how many numbers a user has."""
        return sum(map(whole_lines, self._sizes()))

    def start_row(self, spec: BottleneckSpec, seed: int) -> Tensor:
        """How a user starts, shape P: down uniform in +-1/sqrt(D), as torch's linears start, all else zero.

        So a fresh layer adds nothing.
        """
        generator = torch.Generator().manual_seed(seed)
        row_P = torch.zeros(self.width)
        for place, factors in zip(self.places, self.factors(row_P[None]), strict=True):
            if adapts(spec, place):
                bound, width = 1 / math.sqrt(place.width), width_on(spec, place)
                start = torch.empty(width, place.width).uniform_(-bound, bound, generator=generator)
                factors.down_KWD[0, :width] = start
                self._switch_on(factors, spec)
        return row_P

    def factors(self, matrix_KP: Tensor) -> list[Factors]:
        """Each place's factors as views into the cohort matrix."""
        sizes = self._sizes()
        split = matrix_KP.split(list(map(whole_lines, sizes)), dim=1)
        *parts, chosen_KA = (part_KP[:, :size] for part_KP, size in zip(split, sizes, strict=True))
        quarters = zip(*(iter(parts),) * 4, strict=True)  # four by four
        return [
            Factors(
                down_KP.unflatten(1, (self.size, -1)), bias_KW[:, :, None], up_KP.unflatten(1, (self.size + 1, -1)),
                biased_K1[:, :, None], chosen_KA[:, :, None, None],
            )
            for down_KP, up_KP, bias_KW, biased_K1 in quarters
        ]  # fmt: skip

    def stretches(self, spec: BottleneckSpec) -> Sequence[Stretch]:
        """None: all has the recipe's rate."""
        return ()

    def to_tensors(self, row_P: Tensor, spec: BottleneckSpec) -> dict[str, Tensor]:
        """A user's row as the weights of torch's linears: down [w, D] and up [D, w] of each place, and their biases."""
        tensors: dict[str, Tensor] = {}
        for place, factors in zip(self.places, self.factors(row_P[None]), strict=True):
            if adapts(spec, place):
                names, width = tensor_names(place), width_on(spec, place)
                tensors[names["down"]] = factors.down_KWD[0, :width].clone()
                tensors[names["up"]] = factors.up_KVD[0, :width].mT.contiguous()
                if spec.biases:
                    tensors[names["down bias"]] = factors.bias_KW1[0, :width, 0].clone()
                    tensors[names["up bias"]] = factors.up_KVD[0, self.size].clone()
        return tensors

    def from_tensors(self, tensors: Mapping[str, Tensor], spec: BottleneckSpec) -> Tensor:
        """The row of P numbers that such tensors describe; a place that is not named stays zero."""
        row_P = torch.zeros(self.width)
        for place, factors in zip(self.places, self.factors(row_P[None]), strict=True):
            down, up, down_bias, up_bias = (tensors.get(name) for name in tensor_names(place).values())
            if down is not None and up is not None:
                factors.down_KWD[0, : len(down)], factors.up_KVD[0, : len(down)] = down, up.mT
                self._switch_on(factors, spec)
            if down_bias is not None and up_bias is not None:
                factors.bias_KW1[0, : len(down_bias), 0], factors.up_KVD[0, self.size] = down_bias, up_bias
        return row_P

    def parameters(self, spec: BottleneckSpec) -> int:
        """How many numbers of a user's row are trained."""
        mine = [(place.width, width_on(spec, place)) for place in self.places if adapts(spec, place)]
        return sum(2 * inputs * width + spec.biases * (inputs + width) for inputs, width in mine)

    @contextmanager
    def attached(self, base: BaseModel, cohort: Cohort) -> Iterator[None]:
        """While inside, the base's forward pass reads row k of every batch under slot k's adapter layers."""
        views = zip(self.places, self.factors(cohort.working_KP), self.factors(cohort.gradient_KP), strict=True)
        with ExitStack() as stack:
            for number, (place, weights, gradients) in enumerate(views):
                layer = AdapterLayer(weights, gradients, self.activations, cohort, number)
                stack.enter_context(wrapped([base.model.get_submodule(place.name)], layer.around))
            yield

    def _sizes(self) -> list[int]:
        """How many numbers of a row are each place's down, up with its bias, down's bias, and switch; then the last."""
        w = self.size
        of_places = [(w * place.width, (w + 1) * place.width, w, 1) for place in self.places]
        return [*chain.from_iterable(of_places), len(self.activations)]

    def _switch_on(self, factors: Factors, spec: BottleneckSpec) -> None:
        factors.biased_K11[0] = float(spec.biases)
        factors.chosen_KA11[0, self.activations.index(spec.activation)] = 1


def tensor_names(place: Place) -> dict[str, str]:
    """What the tensors of a place are called."""
    down, up = f"{PREFIX}{place.name}.adapter_down", f"{PREFIX}{place.name}.adapter_up"
    return {"down": f"{down}.weight", "up": f"{up}.weight", "down bias": f"{down}.bias", "up bias": f"{up}.bias"}


def adapts(spec: BottleneckSpec, place: Place) -> bool:
    """Whether a user's recipe has an adapter layer at a place: by its block and its layer."""
    return (spec.placement == "houlsby" or place.block == "mlp") and (spec.layers is None or place.layer in spec.layers)


def width_on(spec: BottleneckSpec, place: Place) -> int:
    """How wide a user's adapter layer is at a place."""
    return spec.width if spec.reduction is None else max(1, int(place.width // spec.reduction))


def bottleneck_bank(base: BaseModel, specs: Sequence[BottleneckSpec], size: int = 0) -> BottleneckBank:
    """The bank that holds every one of these users, at least of a width: their places and activations together.

    Raises TrainingError where the base has no such layers, or an adapter layer would be wider than files may have it.
    """
    everywhere = residual_places(base)
    for spec in specs:
        if not any(adapts(spec, place) for place in everywhere):
            raise TrainingError(base.name, f"has none of layers {spec.layers}", "choose lower layer numbers")
    places = tuple(place for place in everywhere if any(adapts(spec, place) for spec in specs))
    widest = max(width_on(spec, place) for spec in specs for place in places)
    if widest > MOST_WIDTH:
        why = f"an adapter layer of width {widest} is above {MOST_WIDTH}"
        raise TrainingError(base.name, why, "raise reduction or lower width")
    return BottleneckBank(places, max(widest, size), tuple(sorted({spec.activation for spec in specs})))
