"""Prompt tuning (Lester et al., 2021) as rows: embeddings that are read before the text's.

K slots, T tokens a slot, V virtual tokens of the bank, D the base's embedding width, P numbers a user.
A user of fewer virtual tokens has zeros behind them, which nobody sees: they have zero gradient and stay zero.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

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
from lora_core.cohort import Cohort, as_leaf
from lora_core.errors import TrainingError
from lora_core.methods import PromptSpec
from lora_core.optim import Stretch


@dataclass(frozen=True)
class PromptBank:
    """V embeddings a user, one after the other."""

    base: BaseModel = field(repr=False, compare=False)
    size: int  # V
    embedding_width: int  # D

    @property
    def sites(self) -> tuple[Site, ...]:
        """None: linears stay as they are."""
        return ()

    @property
    def width(self) -> int:
        """P: how many numbers a user has."""
        return whole_lines(self.size * self.embedding_width)

    def prompts(self, matrix_KP: Tensor) -> Tensor:
        """The embeddings of all rows, K V D, as a view into the cohort matrix."""
        mine_KP = matrix_KP[:, : self.size * self.embedding_width]
        return mine_KP.view(len(mine_KP), self.size, -1)

    def start_row(self, spec: PromptSpec, seed: int) -> Tensor:
        """How a user starts, shape P: from chance, a text or the vocabulary, as in PEFT."""
        generator = torch.Generator().manual_seed(seed)
        if spec.start == "random":
            return self._row(torch.randn(spec.virtual_tokens, self.embedding_width, generator=generator))
        embeddings = self.base.model.get_input_embeddings()
        if spec.start == "text":
            ids = torch.tensor(self.text_tokens(spec))
        else:
            ids = torch.randint(0, len(embeddings.weight), (spec.virtual_tokens,), generator=generator)
        return self._row(embeddings(ids.to(self.base.model.device)).detach().float().cpu())

    def stretches(self, spec: PromptSpec) -> Sequence[Stretch]:
        """None: all has the recipe's rate."""
        return ()

    def to_tensors(self, row_P: Tensor, spec: PromptSpec) -> dict[str, Tensor]:
        """A user's row as PEFT's tensor."""
        return {TENSOR: self.prompts(row_P[None])[0, : spec.virtual_tokens].clone()}

    def from_tensors(self, tensors: Mapping[str, Tensor], spec: PromptSpec) -> Tensor:
        """The row of P numbers that PEFT's tensor describes."""
        return self._row(tensors[TENSOR])

    def parameters(self, spec: PromptSpec) -> int:
        """How many numbers of a user's row are trained."""
        return spec.virtual_tokens * self.embedding_width

    @contextmanager
    def attached(self, base: BaseModel, cohort: Cohort) -> Iterator[None]:
        """While inside, row k of every batch is read behind slot k's virtual tokens, and their answers are cut off."""
        prompts_KVD = as_leaf(self.prompts(cohort.working_KP), self.prompts(cohort.gradient_KP))
        reading = _Reading(base, Ahead(base, cohort, self.size), prompts_KVD)
        with called(reader(base), reading.change, reading.answer):
            yield

    def _row(self, own_ND: Tensor) -> Tensor:
        row_P = torch.zeros(self.width)
        self.prompts(row_P[None])[0, : len(own_ND)] = own_ND
        return row_P

    def text_tokens(self, spec: PromptSpec) -> list[int]:
        """The start text's tokens, cut or repeated until there is one for each virtual token.  Raises TrainingError."""
        tokens: list[int] = self.base.tokenizer(spec.start_text)["input_ids"]
        if not tokens:
            raise TrainingError(self.base.name, "its tokenizer makes nothing of start_text", "give another text")
        if max(tokens) >= self.base.words:
            raise TrainingError(self.base.name, "has no embedding for a token of start_text", "give another text")
        return (tokens * -(-spec.virtual_tokens // len(tokens)))[: spec.virtual_tokens]


class _Reading:
    """One call of the base at a time: how it is changed, and its answer."""

    def __init__(self, base: BaseModel, ahead: Ahead, prompts_KVD: Tensor) -> None:
        self.embeddings, self.cache = base.model.get_input_embeddings(), cache_name(reader(base))
        self.ahead, self.prompts_KVD = ahead, prompts_KVD
        self.added = 0  # tokens that this call reads before those that were asked for

    def change(self, asked: Arguments) -> Arguments:
        """The call with virtual tokens; where a cache holds them already, masks and positions alone are changed."""
        embedded_KTD = asked.pop("inputs_embeds", None)
        ids_KT = asked.pop("input_ids", None)
        if embedded_KTD is None:
            embedded_KTD = self.embeddings(ids_KT)
        cache, tokens = asked.get(self.cache), embedded_KTD.shape[1]
        read, begins = self.ahead.read(cache), self.ahead.begins(cache)
        mask, positions_KT = self.ahead.mask(asked, tokens, read), self.ahead.positions(asked, tokens, read)
        self.added = self.ahead.most if begins else 0
        if begins:
            virtual_KV = torch.arange(self.added, device=positions_KT.device).expand(len(positions_KT), -1)
            embedded_KTD = torch.cat([self.prompts_KVD.to(embedded_KTD), embedded_KTD], dim=1)
            mask, positions_KT = self.ahead.mask_with_themselves(mask), torch.cat([virtual_KV, positions_KT], dim=1)
        return asked | {"inputs_embeds": embedded_KTD, "attention_mask": mask, "position_ids": positions_KT}

    def answer(self, output: Any) -> None:  # transformers' own
        """Cut off what the virtual tokens gave."""
        output.last_hidden_state = output.last_hidden_state[:, self.added :]


def _make(base: BaseModel, specs: Sequence[PromptSpec], size: int) -> PromptBank:
    if not base.by_embeddings:
        raise TrainingError(base.name, "reads more of a token than its embedding", "choose another method")
    bank = PromptBank(base, most_tokens(base, specs, size), _embedding_width(base))
    for spec in specs:
        check_room(base, spec)
        if spec.start == "text":
            bank.text_tokens(spec)  # which must not fail first where a whole cohort's rows are drawn
    return bank


def _embedding_width(base: BaseModel) -> int:
    width: int = base.model.get_input_embeddings().weight.shape[1]
    return width


def _config(base: BaseModel, spec: PromptSpec, tensors: Mapping[str, Tensor]) -> Facts:
    """PEFT's PromptTuningConfig as it saves it.  How it started matters no more; a text would ask for a tokenizer."""
    config = base.model.config.get_text_config()
    return {
        "num_virtual_tokens": spec.virtual_tokens,
        "token_dim": _embedding_width(base),
        "num_transformer_submodules": 1,
        "num_attention_heads": config.num_attention_heads,
        "num_layers": config.num_hidden_layers,
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "tokenizer_name_or_path": None,
        "modules_to_save": None,
    }


def _read_config(config: Facts) -> PromptSpec:
    return PromptSpec(virtual_tokens=read_virtual_tokens(config), start="random")


def _layout(base: BaseModel, spec: PromptSpec) -> list[Shapes]:
    return one_tensor(base, spec, _embedding_width(base))


def _sentence(spec: PromptSpec, tensors: Mapping[str, Tensor]) -> str:
    return f"A prompt of {spec.virtual_tokens} virtual tokens."


PROMPT = Method("PROMPT_TUNING", _make, _config, _read_config, _layout, _sentence)
