"""Prefix tuning (Li & Liang, 2021) as rows: keys and values that every layer sees before the text's.

K slots, T tokens a slot, V virtual tokens of the bank, E = H D numbers of a key or a value (H heads), F numbers of a
virtual token in all layers (a key and a value in each, N in all), M the MLP's width, P numbers a user.
A user of fewer virtual tokens has zeros behind them, which nobody sees: they have zero gradient and stay zero.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from lora_core.banks.bank import Facts, Method, Shapes, whole_lines
from lora_core.banks.virtual_tokens import (
    TENSOR,
    Ahead,
    Arguments,
    cache_name,
    called,
    check_room,
    most_tokens,
    one_tensor,
    read_virtual_tokens,
    reader,
)
from lora_core.base_model import BaseModel, Site
from lora_core.cohort import Cohort
from lora_core.errors import TrainingError
from lora_core.layers import decoder_layers
from lora_core.methods import PrefixSpec
from lora_core.optim import Stretch


@dataclass(frozen=True)
class Keys:
    """What a base's layers keep of a token: a key and a value each, of so many heads."""

    heads: int
    head_width: int
    devices: tuple[torch.device, ...] = field(repr=False)  # one a layer

    @property
    def token(self) -> int:
        """E: numbers of one key or value."""
        return self.heads * self.head_width

    @property
    def numbers(self) -> int:
        """F: numbers that a token has in all layers together."""
        return 2 * len(self.devices) * self.token

    def by_layer(self, prefix_KVF: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Each layer's keys and values, K H V D, in PEFT's order."""
        all_KVNHD = prefix_KVF.unflatten(2, (2 * len(self.devices), self.heads, self.head_width))
        pieces_KHVD = [piece.transpose(1, 2) for piece in all_KVNHD.unbind(2)]
        pairs = zip(pieces_KHVD[::2], pieces_KHVD[1::2], self.devices, strict=True)
        return [(keys.to(device), values.to(device)) for keys, values, device in pairs]


@dataclass(frozen=True)
class PrefixBank:
    """Where a prefix lies in a row of P numbers: V F of it as it is, then the embeddings and weights of an MLP, if any.

    A row with embeddings has its prefix from the MLP; one without, as it is.  So one bank trains both and judges files.
    """

    size: int  # V
    keys: Keys
    mlp_width: int = 0  # M; 0 where nobody projects

    @property
    def sites(self) -> tuple[Site, ...]:
        """None: linears stay as they are."""
        return ()

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the pieces of a row: the prefix; the MLP's embeddings, hidden layer and bias, output layer and bias."""
        V, E, F, M = self.size, self.keys.token, self.keys.numbers, self.mlp_width
        return [(V, F), (V, E), (M, E), (M,), (M, F), (F,)] if M else [(V, F)]

    @property
    def width(self) -> int:
        """P: how many numbers a user has."""
        return whole_lines(sum(map(math.prod, self.shapes)))

    def pieces(self, matrix_KP: Tensor) -> list[Tensor]:
        """The pieces of all rows, as views into the cohort matrix."""
        sizes = [math.prod(shape) for shape in self.shapes]
        parts_KP = matrix_KP[:, : sum(sizes)].split(sizes, dim=1)
        return [part_KP.unflatten(1, shape) for part_KP, shape in zip(parts_KP, self.shapes, strict=True)]

    def start_row(self, spec: PrefixSpec, seed: int) -> Tensor:
        """How a user starts, shape P: by chance, as in PEFT (and torch)."""
        generator = torch.Generator().manual_seed(seed)
        row_P = torch.zeros(self.width)
        plain_VF, *mlp = (piece[0] for piece in self.pieces(row_P[None]))
        into = mlp[0] if spec.projection else plain_VF
        into[: spec.virtual_tokens] = torch.randn(spec.virtual_tokens, into.shape[1], generator=generator)
        if spec.projection:
            width = self._width(spec)
            bounds = [1 / math.sqrt(size) for size in (self.keys.token, self.keys.token, width, width)]
            for piece, bound in zip(_own(mlp, width), bounds, strict=True):
                piece.copy_(torch.empty(piece.shape).uniform_(-bound, bound, generator=generator))
        return row_P

    def stretches(self, spec: PrefixSpec) -> Sequence[Stretch]:
        """None: all has the recipe's rate."""
        return ()

    def to_tensors(self, row_P: Tensor, spec: PrefixSpec) -> dict[str, Tensor]:
        """A user's row as PEFT's tensor: the prefix itself, also of a row with an MLP."""
        return {TENSOR: _prefix(self.pieces(row_P[None]))[0, : spec.virtual_tokens].clone()}

    def from_tensors(self, tensors: Mapping[str, Tensor], spec: PrefixSpec) -> Tensor:
        """The row of P numbers that PEFT's tensor describes: the MLP that may have made it is not known any more."""
        row_P = torch.zeros(self.width)
        self.pieces(row_P[None])[0][0, : len(tensors[TENSOR])] = tensors[TENSOR]
        return row_P

    def parameters(self, spec: PrefixSpec) -> int:
        """How many numbers of a user's row are trained."""
        if not spec.projection:
            return spec.virtual_tokens * self.keys.numbers
        E, F, M = self.keys.token, self.keys.numbers, self._width(spec)
        return spec.virtual_tokens * E + M * (E + 1) + F * (M + 1)

    @contextmanager
    def attached(self, base: BaseModel, cohort: Cohort) -> Iterator[None]:
        """While inside, row k of every batch sees slot k's keys and values before its own, in every layer."""
        leaves = [piece.detach().requires_grad_() for piece in self.pieces(cohort.working_KP)]
        gradients = self.pieces(cohort.gradient_KP)
        ahead, name = Ahead(base, cohort, self.size), cache_name(reader(base))

        def change(asked: Arguments) -> Arguments:
            tokens = next(asked[key] for key in ("input_ids", "inputs_embeds") if asked.get(key) is not None).shape[1]
            cache = asked.get(name)
            read = ahead.read(cache)
            mask, positions_KT = ahead.mask(asked, tokens, read), ahead.positions(asked, tokens, read)
            if ahead.begins(cache):
                pairs = zip(leaves, gradients, strict=True)
                prefix_KVF = _prefix([_Learnt.apply(*pair) for pair in pairs])  # type: ignore[no-untyped-call]  # torch's
                cache = self._cache(base, cache, prefix_KVF, asked.get("use_cache") is not False)
            return asked | {name: cache, "attention_mask": mask, "position_ids": positions_KT}

        with called(reader(base), change, lambda _: None), _each_its_own(decoder_layers(base)):
            yield

    def _cache(self, base: BaseModel, given: Cache | None, prefix_KVF: Tensor, grows: bool) -> Cache:
        """The prefix as layers look for it: in the cache that was given, if any, or one that keeps nothing else."""
        pairs = self.keys.by_layer(prefix_KVF)
        if not grows:
            return _Prefix(layers=[_Before(*pair) for pair in pairs])
        cache = DynamicCache() if given is None else given
        for number, pair in enumerate(pairs):
            cache.update(*pair, number)
        return cache

    def _width(self, spec: PrefixSpec) -> int:
        return spec.projection_width or self.keys.token


def _own(mlp: Sequence[Tensor], width: int) -> list[Tensor]:
    """A user's own part of a wider bank's hidden layer and bias, output layer and bias."""
    _, hidden_ME, bias_M, output_MF, bias_F = mlp
    return [hidden_ME[:width], bias_M[:width], output_MF[:width], bias_F]


def _prefix(pieces: Sequence[Tensor]) -> Tensor:
    """Each slot's prefix, K V F: what its MLP makes of its embeddings, or where it has none, the prefix as it is."""
    plain_KVF, *mlp = pieces
    if not mlp:
        return plain_KVF
    embeddings_KVE, hidden_KME, bias_KM, output_KMF, bias_KF = mlp
    hidden_KVM = torch.baddbmm(bias_KM[:, None], embeddings_KVE, hidden_KME.mT).tanh()
    made_KVF = torch.baddbmm(bias_KF[:, None], hidden_KVM, output_KMF)
    return torch.where(embeddings_KVE.flatten(1).any(1)[:, None, None], made_KVF, plain_KVF)


class _Learnt(torch.autograd.Function):
    """A piece of all rows as it is.  Its backward adds the gradient to the cohort's at once, and keeps no copy."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, gradient: Tensor) -> Tensor:  # torch's context object has no public type
        ctx.gradient = gradient
        return leaf.view_as(leaf)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, None]:  # torch's context object
        ctx.gradient.add_(g)
        return None, None


class _Before(DynamicLayer):  # type: ignore[misc]  # transformers' are untyped
    """A layer's keys and values before those of the text.  It keeps nothing of what it sees: a layer may run twice."""

    def __init__(self, keys_KHVD: Tensor, values_KHVD: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys_KHVD, values_KHVD, True

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """All that a layer's tokens may see."""
        return torch.cat([self.keys, key_states], dim=2), torch.cat([self.values, value_states], dim=2)


class _Prefix(Cache):  # type: ignore[misc]  # transformers' are untyped
    """The same of all layers."""


@contextmanager
def _each_its_own(layers: Sequence[nn.Module]) -> Iterator[None]:
    """While inside, a layer is handed its own part of a prefix and need not look for it: all compile to one graph."""

    def own(number: int) -> Callable[..., Any]:  # what layers take is transformers' own
        def pick(given: Any) -> Any:  # any of that
            return given.layers[number] if isinstance(given, _Prefix) else given

        return lambda _, given, named: (tuple(map(pick, given)), {name: pick(one) for name, one in named.items()})

    hooks = [layer.register_forward_pre_hook(own(number), with_kwargs=True) for number, layer in enumerate(layers)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def keys_of(base: BaseModel) -> Keys:
    """Of one shape in all layers, as PEFT reads it off the configuration."""
    config = base.model.config.get_text_config()
    heads, head_width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    if getattr(config, "num_key_value_heads", None):  # grouped queries
        heads, head_width = config.num_key_value_heads, getattr(config, "head_dim", None) or head_width
    layers = decoder_layers(base)
    devices = [next(layer.parameters()).device for layer in layers] or [base.model.device] * config.num_hidden_layers
    return Keys(heads, head_width, tuple(devices))


@torch.inference_mode()
def _check_keys(base: BaseModel, keys: Keys) -> None:
    """Tried on a token: some architectures keep less, or not the same in all layers.  Raises TrainingError."""
    cache, model = DynamicCache(config=base.model.config), base.model.base_model
    model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=base.model.device), **{cache_name(model): cache})
    shapes = [list(kept.shape) for layer in cache.layers for kept in (layer.keys, layer.values)]
    if shapes != [[1, keys.heads, 1, keys.head_width]] * (2 * len(keys.devices)):
        raise TrainingError(base.name, "its layers do not keep keys and values alike", "choose another method")


def _make(base: BaseModel, specs: Sequence[PrefixSpec], size: int) -> PrefixBank:
    for spec in specs:
        check_room(base, spec)
    keys = keys_of(base)
    _check_keys(base, keys)
    mlp_width = max((spec.projection_width or keys.token) * spec.projection for spec in specs)
    return PrefixBank(most_tokens(base, specs, size), keys, mlp_width + -mlp_width % base.grain)


def _config(base: BaseModel, spec: PrefixSpec, tensors: Mapping[str, Tensor]) -> Facts:
    """PEFT's PrefixTuningConfig as it saves it, without an MLP: PEFT's load_prompt_embeddings takes no other."""
    keys = keys_of(base)
    return {
        "num_virtual_tokens": spec.virtual_tokens,
        "token_dim": keys.token,
        "num_transformer_submodules": 1,
        "num_attention_heads": keys.heads,
        "num_layers": len(keys.devices),
        "prefix_projection": False,
        "encoder_hidden_size": keys.token,
        "init_weights": None,
        "modules_to_save": None,
    }


def _read_config(config: Facts) -> PrefixSpec:
    return PrefixSpec(virtual_tokens=read_virtual_tokens(config))


def _layout(base: BaseModel, spec: PrefixSpec) -> list[Shapes]:
    return one_tensor(base, spec, keys_of(base).numbers)


def _sentence(spec: PrefixSpec, tensors: Mapping[str, Tensor]) -> str:
    return f"A prefix of {spec.virtual_tokens} virtual tokens in every layer."


PREFIX = Method("PREFIX_TUNING", _make, _config, _read_config, _layout, _sentence)
