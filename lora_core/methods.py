"""The settings of each parameter-efficient method: what a recipe holds under `method`.  No torch: recipes are text."""

from collections.abc import Hashable
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Frozen(BaseModel):
    """Settings that cannot change after they were read, and know no unknown key."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class MethodSpec(Frozen):
    """What every method has; each names itself, and overrides what it does otherwise."""

    name: str

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of what enters the adapted places, in training
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None  # None adapts every layer

    @property
    def scale(self) -> float:
        """The number of a user's slot that says how much it adapts: 0 in a slot that is the base."""
        return 1.0

    @property
    def shape(self) -> tuple[Hashable, ...]:
        """What decides where the numbers of a row lie: users of equal shape can share a cohort."""
        raise NotImplementedError


class LoraSpec(MethodSpec):
    """Low-rank adaptation (Hu et al., 2021): a delta B A of rank r on each target."""

    name: Literal["lora"] = "lora"
    rank: Annotated[int, Field(ge=1, le=512)] = 16
    alpha: Annotated[float, Field(gt=0, le=4096)] = 32.0
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    use_rslora: bool = False  # scale by alpha / sqrt(rank) instead of alpha / rank (Kalajdzievski, 2023)

    @property
    def scale(self) -> float:
        """What multiplies B A."""
        return self.alpha / (self.rank**0.5 if self.use_rslora else self.rank)

    @property
    def shape(self) -> tuple[Hashable, ...]:
        """Rank, and which linears."""
        return (self.name, self.rank, self.targets, self.layers)


MOST_WIDTH = 4096


def _plain_name(activation: object) -> object:
    return "silu" if activation == "swish" else activation


class BottleneckSpec(MethodSpec):
    """Bottleneck adapter layers (Houlsby et al., 2019): h + up(act(down(h))) of what a block adds to the stream."""

    name: Literal["bottleneck"] = "bottleneck"
    width: Annotated[int, Field(ge=1, le=MOST_WIDTH)] = 64
    reduction: Annotated[float, Field(ge=1)] | None = None  # instead: the base's hidden width over this
    placement: Literal["houlsby", "pfeiffer"] = "pfeiffer"  # after attention and MLP, or after the MLP alone
    activation: Annotated[Literal["relu", "gelu", "silu"], BeforeValidator(_plain_name)] = "relu"
    biases: bool = True

    @property
    def shape(self) -> tuple[Hashable, ...]:
        """Width, places, and what an adapter layer is made of."""
        return (self.name, self.width, self.reduction, self.placement, self.activation, self.biases, self.layers)


AnyMethod = Annotated[LoraSpec | BottleneckSpec, Field(discriminator="name")]
METHOD_NAMES = ("lora", "bottleneck")
