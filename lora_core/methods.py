"""The settings of each parameter-efficient method: what a recipe holds under `method`.  No torch: recipes are text."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import Annotated, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)


class Frozen(BaseModel):
    """Settings that cannot change after they were read, and know no unknown key."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class MethodSpec(Frozen, ABC):
    """What every method has; each names itself, and overrides what it does otherwise."""

    name: str
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of what enters the adapted places, in training
    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None = None  # None: every layer

    @property
    def scale(self) -> float:
        """The number of a user's slot that says how much it adapts: 0 in a slot that is the base."""
        return 1.0

    @property
    def positions(self) -> int:
        """How many of the base's positions it takes: an example has so many fewer."""
        return 0

    @property
    @abstractmethod
    def shape(self) -> tuple[Hashable, ...]:
        """What decides where the numbers of a row lie: users of equal shape can share a cohort."""


MOST_RANK, MOST_ALPHA = 512, 4096
MOST_KEYS = 1000

T = TypeVar("T")

Rank = Annotated[int, Field(ge=1, le=MOST_RANK)]
Alpha = Annotated[float, Field(gt=0, le=MOST_ALPHA)]
PathEnd = Annotated[str, Field(pattern=r"^\w+(\.\w+)*$", max_length=256)]  # of a linear's path; no pattern is run


def _pairs(given: object) -> object:
    """A mapping as pairs in the order of their keys: then its own order, which JSON may lose, says nothing."""
    return sorted(given.items(), key=str) if isinstance(given, Mapping) else given


Pattern = Annotated[tuple[tuple[PathEnd, T], ...], BeforeValidator(_pairs), Field(max_length=MOST_KEYS)]


def _at(pattern: Sequence[tuple[str, T]], path: str, otherwise: T) -> T:
    """What a pattern gives to a path: the longest of the keys that it ends in decides."""
    found = [(len(end), value) for end, value in pattern if path == end or path.endswith(f".{end}")]
    return max(found, key=lambda pair: pair[0])[1] if found else otherwise


class LoraSpec(MethodSpec):
    """Low-rank adaptation (Hu et al., 2021): a delta B A of rank r on each target."""

    name: Literal["lora"] = "lora"
    rank: Rank = 16
    alpha: Alpha = 32.0
    targets: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all-linear"
    use_rslora: bool = False  # scale by alpha / sqrt(rank) instead of alpha / rank (Kalajdzievski, 2023)
    loraplus_lr_ratio: Annotated[float, Field(ge=1, le=1024)] = 1.0  # B's rate over A's (Hayou et al., 2024)
    init_lora_weights: Literal[True, "pissa"] = True  # True: no delta; pissa: the weights' principal part
    rank_pattern: Pattern[Rank] = ()  # other ranks and alphas, by the end of a linear's path
    alpha_pattern: Pattern[Alpha] = ()

    @property
    def scale(self) -> float:
        """What multiplies B A, where no pattern says otherwise."""
        return self.alpha / (self.rank**0.5 if self.use_rslora else self.rank)

    @property
    def patterned(self) -> bool:
        """Whether linears have ranks or scales of their own."""
        return bool(self.rank_pattern or self.alpha_pattern)

    def rank_at(self, path: str) -> int:
        """The rank that is trained at a linear."""
        return _at(self.rank_pattern, path, self.rank)

    def rows_at(self, path: str) -> int:
        """The rank at a linear in the row and in files: twice the trained one where the start is taken off again."""
        return self.rank_at(path) * (1 if self.init_lora_weights is True else 2)

    def alpha_at(self, path: str) -> float:
        """Alpha at a linear."""
        return _at(self.alpha_pattern, path, self.alpha)

    def scale_at(self, path: str) -> float:
        """What multiplies B A at a linear."""
        rank = self.rank_at(path)
        return self.alpha_at(path) / (rank**0.5 if self.use_rslora else rank)

    @property
    def shape(self) -> tuple[Hashable, ...]:
        """Rank in the row, which linears, and what a bank has for some users only."""
        extra = [word for word, there in (("patterned", self.patterned), ("pissa", self.init_lora_weights == "pissa"))
                 if there]  # fmt: skip
        return (self.name, self.row_rank, self.targets, self.layers, *extra)

    @property
    def row_rank(self) -> int:
        """The rank that a bank must have."""
        widest = max([self.rank, *(rank for _, rank in self.rank_pattern)])
        return widest if self.init_lora_weights is True else 2 * widest

    @property
    def most_rank(self) -> int:
        """The highest rank that it may ask for: half of what a row may have where the start is kept beside it."""
        return MOST_RANK if self.init_lora_weights is True else MOST_RANK // 2

    @model_validator(mode="after")
    def _has_room_for_its_start(self) -> Self:
        alpha = max([self.alpha, *(alpha for _, alpha in self.alpha_pattern)])
        if self.init_lora_weights == "pissa" and (self.row_rank > MOST_RANK or alpha > MOST_ALPHA // 2):
            most = f"rank {MOST_RANK // 2} and alpha {MOST_ALPHA // 2}"
            raise ValueError(f"a pissa start is kept beside what it becomes: at most {most}")
        return self

    @model_serializer(mode="wrap")
    def _says_what_is_asked_for(self, dump: SerializerFunctionWrapHandler) -> dict[str, object]:
        """A variant that is not used is not named: a recipe from before there was the variant keeps its digest."""
        fields = type(self).model_fields
        unused = {name for name in LORA_VARIANTS if getattr(self, name) == fields[name].default}
        return {name: value for name, value in dump(self).items() if name not in unused}


LORA_VARIANTS = ("loraplus_lr_ratio", "init_lora_weights", "rank_pattern", "alpha_pattern")


class VirtualTokensSpec(MethodSpec):
    """What methods have in common that put tokens of their own before a user's."""

    virtual_tokens: Annotated[int, Field(ge=1, le=256)] = 20  # a slot holds the number, and bf16 counts to 256

    @property
    def scale(self) -> float:
        """How many virtual tokens a slot's rows see."""
        return float(self.virtual_tokens)

    @property
    def positions(self) -> int:
        """Positions restart behind the virtual tokens."""
        return self.virtual_tokens

    @model_validator(mode="after")
    def _asks_for_nothing_that_linears_have(self) -> Self:
        if self.dropout or self.layers is not None:
            raise ValueError("it has no dropout and no choice of layers; leave them out")
        return self


class PromptSpec(VirtualTokensSpec):
    """Prompt tuning (Lester et al., 2021): embeddings before the text's.  Wants a rate of about 3e-2."""

    name: Literal["prompt_tuning"] = "prompt_tuning"
    start: Literal["random", "text", "sample_vocab"] = "sample_vocab"  # the vocabulary beats chance in the paper
    start_text: Annotated[str, Field(min_length=1, max_length=4096)] | None = None

    @property
    def shape(self) -> tuple[Hashable, ...]:
        """How many there are, wherever they start."""
        return (self.name, self.virtual_tokens)

    @model_validator(mode="after")
    def _has_a_text_to_start_from(self) -> Self:
        if (self.start == "text") != (self.start_text is not None):
            raise ValueError("a text start needs start_text, and no other start takes one")
        return self


class PrefixSpec(VirtualTokensSpec):
    """Prefix tuning (Li & Liang, 2021): keys and values before the text's, in every layer.

    With `projection` an MLP makes them, in training alone: files hold what it makes.
    """

    name: Literal["prefix_tuning"] = "prefix_tuning"
    projection: bool = False
    projection_width: Annotated[int, Field(ge=1, le=8192)] | None = None  # of the MLP; None: as wide as a layer's keys

    @property
    def shape(self) -> tuple[Hashable, ...]:
        """How many there are, and the MLP."""
        return (self.name, self.virtual_tokens, self.projection, self.projection_width)

    @model_validator(mode="after")
    def _has_an_mlp_to_be_wide(self) -> Self:
        if self.projection_width is not None and not self.projection:
            raise ValueError("projection_width is of the MLP; set projection too, or leave it out")
        return self


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


AnyMethod = Annotated[LoraSpec | PromptSpec | PrefixSpec | BottleneckSpec, Field(discriminator="name")]
