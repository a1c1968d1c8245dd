"""Virtual tokens before every row: what prompt and prefix tuning share, of how the base is called and of files.

A slot's `scale` says how many of the bank's virtual tokens its user has; what lies beyond is hidden from everybody.
They come first and see only themselves, so one copy serves all documents of a row.
K slots, T tokens a slot, V virtual tokens of the bank, S tokens of a row so far.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from lora_core.banks.bank import Facts, Shapes
from lora_core.base_checks import positions
from lora_core.base_model import BaseModel
from lora_core.batch import Masks
from lora_core.cohort import Cohort
from lora_core.errors import ArtifactRefused, TrainingError
from lora_core.methods import VirtualTokensSpec

Arguments = dict[str, Any]  # a model's, by name: they are transformers' own
CONFIG, TENSOR = "adapter_config.json", "prompt_embeddings"  # PEFT's names
MOST = 256  # virtual tokens
LEAST_TEXT = 8  # tokens that a base must know positions for behind the virtual ones
# PEFT's keys that change what the tensor means, and the values under which it means what it means here.
_PLAIN: Mapping[str, tuple[object, ...]] = {
    "modules_to_save": (None, []), "num_transformer_submodules": (None, 1), "task_type": (None, "CAUSAL_LM"),
}  # fmt: skip


class Ahead:
    """What a batch has ahead of its own tokens, as masks and positions: slot k's own number n_k of V virtual tokens."""

    def __init__(self, base: BaseModel, cohort: Cohort, most: int) -> None:
        self.cohort, self.most = cohort, most
        self.there_are, self.dtype = positions(base.model.config), base.model.dtype
        self.windowed = base.windows is not None

    def counts(self) -> Tensor:
        """n_k, K 1."""
        return self.cohort.scale_K11[:, :, 0].long()

    def visible(self) -> Tensor:
        """Which virtual tokens a slot's rows see, K V."""
        return torch.arange(self.most, device=self.cohort.scale_K11.device) < self.counts()

    def read(self, cache: Any) -> int:  # transformers' cache
        """How many tokens of a row's own a cache holds; the virtual ones are in it before the first of them."""
        return max(0, cache.get_seq_length() - self.most) if cache is not None else 0

    def begins(self, cache: Any) -> bool:  # transformers' cache
        """Whether a call is the first of its rows; their cache is made to keep all: a window's would drop the first."""
        first = cache is None or not cache.get_seq_length()
        if first and cache is not None and self.windowed:
            cache.layers = [DynamicLayer() for _ in cache.layers]
        return first

    def positions(self, asked: Arguments, tokens: int, read: int) -> Tensor:
        """Where tokens are, K T: as asked, behind the slot's own virtual tokens.

        A base's positions may end sooner for whoever judges an adapter on longer examples than it was trained on:
        what would lie behind the end shares the last one.
        """
        given_KT = asked.get("position_ids")
        if given_KT is None:
            given_KT = torch.arange(read, read + tokens, device=self.cohort.scale_K11.device)[None]
        return torch.minimum(given_KT + self.counts(), given_KT.clamp_min(self.there_are - 1))

    def mask(self, asked: Arguments, tokens: int, read: int) -> Masks:
        """What tokens see, K S or, added to attention, K 1 T S: as asked, behind the slot's own virtual tokens."""
        visible_KV, given = self.visible(), asked.get("attention_mask")
        if given is None:
            given = torch.ones(len(visible_KV), read + tokens, dtype=torch.int64, device=visible_KV.device)
        return _each(given, lambda mask: self._behind(visible_KV, mask, tokens))

    def _behind(self, visible_KV: Tensor, given: Tensor, tokens: int) -> Tensor:
        if given.dim() == 2:
            seen_KS = torch.cat([visible_KV.to(given), given], dim=1)
            return self._without_window(seen_KS, tokens) if self.windowed else seen_KS
        return torch.cat([_added(visible_KV[:, None, None], given).expand(-1, 1, given.shape[2], -1), given], dim=3)

    def _without_window(self, seen_KS: Tensor, tokens: int) -> Tensor:
        """What the last tokens see of all, K 1 T S: a window would count the padding that lies before their own text.

        No row of text with its virtual tokens is longer than the window.
        """
        earlier_TS = torch.ones(tokens, seen_KS.shape[1], dtype=torch.bool, device=seen_KS.device)
        earlier_TS = earlier_TS.tril(seen_KS.shape[1] - tokens)
        return _added(seen_KS[:, None, None].bool() & earlier_TS, seen_KS.to(self.dtype))

    def mask_with_themselves(self, masks: Masks) -> Masks:
        """A mask for rows that begin with the virtual tokens themselves: they see each other, causally, and no text."""
        return _each(masks, self._with_themselves)

    def _with_themselves(self, mask: Tensor) -> Tensor:
        if mask.dim() == 2:
            return mask
        square_VS = torch.ones(self.most, mask.shape[3], dtype=torch.bool, device=mask.device).tril()
        return torch.cat([_added(square_VS, mask).expand(len(mask), 1, -1, -1), mask], dim=2)


def _each(masks: Masks, change: Callable[[Tensor], Tensor]) -> Masks:
    """The one mask changed, or that of each kind of layer."""
    return change(masks) if isinstance(masks, Tensor) else {kind: change(mask) for kind, mask in masks.items()}


def _added(visible: Tensor, like: Tensor) -> Tensor:
    """What is added to attention: 0 where something is visible."""
    hidden = torch.finfo(like.dtype).min
    return torch.zeros(visible.shape, dtype=like.dtype, device=like.device).masked_fill_(~visible, hidden)


@contextmanager
def called(
    model: PreTrainedModel, change: Callable[[Arguments], Arguments], answer: Callable[[Any], None]
) -> Iterator[None]:
    """While inside, a model is called with a `change` of its arguments, and `answer` may change what it gives."""
    names = list(inspect.signature(model.forward).parameters)
    before = model.register_forward_pre_hook(
        lambda _, given, named: ((), change({**dict(zip(names, given, strict=False)), **named})), with_kwargs=True
    )
    after = model.register_forward_hook(lambda _, given, output: answer(output))
    try:
        yield
    finally:
        before.remove()
        after.remove()


def reader(base: BaseModel) -> PreTrainedModel:
    """What reads every row: the base's own model, or the decoder in it, which OPT's calls go to straight away."""
    whole: PreTrainedModel = base.model.base_model
    return getattr(whole, "decoder", whole)


def cache_name(model: PreTrainedModel) -> str:
    """What this release of transformers calls the argument that holds keys and values."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def check_room(base: BaseModel, spec: VirtualTokensSpec) -> None:
    """Raises TrainingError where a base knows too few positions, or its layers look too few tokens back."""
    if base.room(spec.virtual_tokens) < LEAST_TEXT:
        why = f"has room for {base.reach} tokens, too few for {spec.virtual_tokens} virtual ones and a text"
        raise TrainingError(base.name, why, "lower num_virtual_tokens")


def most_tokens(base: BaseModel, specs: Sequence[VirtualTokensSpec], size: int) -> int:
    """V of a bank for these users, at least of a size: as rows of text it is filled up to the base's grain."""
    most = max(size, *(spec.virtual_tokens for spec in specs))
    return most + -most % base.grain


def read_virtual_tokens(config: Facts) -> int:
    """How many virtual tokens a file has.  Raises ArtifactRefused, also for what would change their meaning."""
    for key, allowed in _PLAIN.items():
        if key in config and config[key] not in allowed:
            raise ArtifactRefused(CONFIG, f"{key} is {ascii(config[key])[:40]}", "train without it")
    count = config.get("num_virtual_tokens")
    if type(count) is not int or not 1 <= count <= MOST:
        raise ArtifactRefused(CONFIG, f"num_virtual_tokens is {ascii(count)[:40]}, not 1 to {MOST}", "use fewer")
    return count


def one_tensor(base: BaseModel, spec: VirtualTokensSpec, width: int) -> list[Shapes]:
    """What files of virtual tokens hold, so many numbers a token.  Raises ArtifactRefused for a base too short."""
    if base.room(spec.virtual_tokens) < LEAST_TEXT:
        raise ArtifactRefused(CONFIG, f"the base has room for only {base.reach} tokens", "is it for this base?")
    return [{TENSOR: [spec.virtual_tokens, width]}]
