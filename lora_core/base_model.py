"""The shared base: loaded once, frozen, fingerprinted, and the list of its adaptable sites."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from lora_core.base_checks import DENSE, check_sharing, grain_of, positions, reads_embeddings, windows_of
from lora_core.base_files import CONVERT, WEIGHTS, check_quantise, fingerprint, locate
from lora_core.batch import Batch, Windows, as_batch, fields_of
from lora_core.data.packing import Row
from lora_core.elementwise import steady, tried
from lora_core.errors import BaseModelError, BaseUnfit, DeviceMissing
from lora_core.products import quick_product, quicken
from lora_core.quantised import QuantisedLinear, packed_in, quantisation, unpack_on_use

SHARDED = "auto"  # the device that means all GPUs: layers lie on one after another


@dataclass(frozen=True)
class Site:
    """One frozen linear that text goes through, so it can be adapted: its path, how wide it is, and what it reads."""

    name: str
    inputs: int
    outputs: int
    reads: int  # sites with the same number read the same tensor: a query, a key and a value, say


@dataclass(frozen=True)
class BaseModel:
    """A frozen model, its tokenizer, and what pins it: revision and digest of its files."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    revision: str
    digest: str
    sites: tuple[Site, ...]
    transposed: bool  # linears keep their weight as [in, out] (GPT-2's Conv1D): PEFT's fan_in_fan_out
    longest: int  # tokens an example may have: the base knows no later position
    windows: Windows  # how far back its layers look
    plain_head: bool  # logits are the last hidden state times the head's weight: no bias, scale or soft cap
    quantised: str = ""  # 8bit, 4bit, or not: as was asked for, or as its files are
    grain: int = 1  # rows are filled up to a multiple of so many tokens
    by_embeddings: bool = True  # it reads nothing of a token but its embedding: virtual tokens have no more

    @property
    def frozen(self) -> list[Tensor]:
        """Every tensor that it keeps: weights, buffers, and the scales of packed weights."""
        packed = [module for module in self.model.modules() if isinstance(module, QuantisedLinear)]
        scales = [tensor for module in packed for tensor in module.scales]
        return [*self.model.parameters(), *self.model.buffers(), *scales]

    @property
    def reach(self) -> int:
        """How many tokens of a document every layer sees from its last one."""
        windows = self.windows.values() if isinstance(self.windows, Mapping) else (self.windows,)
        return min([self.longest, *(window for window in windows if window)])

    def room(self, virtual_tokens: int) -> int:
        """Tokens an example may have behind so many virtual ones, which every layer must see from its end."""
        return self.reach - virtual_tokens if virtual_tokens else self.longest

    def stack(self, rows: Sequence[Row]) -> Batch:
        """K rows as one batch, on the base's device."""
        fields_4KT = fields_of(rows, self.model.device, self.grain)
        return as_batch(fields_4KT, self.model.dtype, self.windows, sum(row.counted for row in rows))

    @property
    def words(self) -> int:
        """How many tokens it has embeddings for: its tokenizer may have been given more, to fill rows with, say."""
        return len(self.model.get_input_embeddings().weight)

    @property
    def parameters(self) -> int:
        """How many numbers the base holds, however few bits each has; tied ones count once."""
        return int(self.model.num_parameters())

    def twin(self) -> "BaseModel":
        """The same tensors in modules of their own, and a tokenizer of its own.

        What is attached to one is not to the other, and two threads may each have one.
        """
        packed = [module.state for module in self.model.modules() if isinstance(module, QuantisedLinear)]
        shared = {id(kept): kept for kept in (*self.frozen, *packed)}
        model = copy.deepcopy(self.model, shared)
        return replace(self, model=model, tokenizer=copy.deepcopy(self.tokenizer))


def outline(folder: Path) -> BaseModel:
    """A base's architecture without its weights, however large those are; what reads what, nobody can try.

    Raises BaseModelError.
    """
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(_config(folder), trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        why = f"transformers cannot read its config.json: {str(error).strip().splitlines()[0]}"
        raise BaseModelError(str(folder), why, "give a causal language model that transformers knows") from None
    linears = adaptable(model)
    sites = tuple(Site(path, *widths(linear), -1 - n) for n, (path, linear) in enumerate(linears.items()))
    transposed = any(isinstance(linear, Conv1D) for linear in linears.values())
    longest, windows = positions(model.config), windows_of(model.config)
    packed = packed_in(model.config)
    return BaseModel(
        model, None, str(folder), "", "", sites, transposed, longest, windows, plain_head=False, quantised=packed
    )


def _config(folder: Path) -> PreTrainedConfig:
    """Its config.json, whatever attention that asks for: fused where the architecture has it, which Gemma 2 has not."""
    config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config._attn_implementation = None
    return config


def default_dtype(device: str) -> torch.dtype:
    """What a base is kept in on a device: fp32 on a CPU, bf16 on a GPU."""
    return torch.float32 if device == "cpu" else torch.bfloat16


def load_base(
    name: str,
    revision: str | None = None,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    quantise: str = "",
) -> BaseModel:
    """Load a causal language model by folder or hub id; fp32 on CPU, bf16 on GPU.  Raises BaseModelError.

    `device` may be "auto": the layers lie on all GPUs, one after another.  `quantise` is 8bit or 4bit, or neither.
    """
    check_quantise(name, quantise)
    folder = locate(name, revision)
    device = check_device(device or default_device())
    dtype = dtype or default_dtype(device)
    if not any(folder.glob(WEIGHTS)):
        raise BaseModelError(name, "it has no safetensors weights", CONVERT)
    placed = _placement(device, dtype, quantise)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder, config=_config(folder), dtype=dtype, use_safetensors=True, trust_remote_code=False, **placed
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        why = f"transformers cannot load it: {str(error).strip().splitlines()[0]}"
        raise BaseModelError(name, why, "give a causal language model that transformers knows") from None
    _check_loaded(name, model, quantise)
    model = model if placed else model.to(device)
    return freeze(model, tokenizer, name, revision or "main", fingerprint(folder, quantise), quantise)


def _check_loaded(name: str, model: PreTrainedModel, quantise: str) -> None:
    """Whether all of it is here, as asked for, and its attention as long as rows are.  Raises BaseModelError."""
    if quantise and (packed := packed_in(model.config)) != quantise:
        raise BaseModelError(name, f"its files are in {packed} already", "unset LORA_QUANTISE, or take the whole base")
    if any(parameter.is_meta for parameter in model.parameters()):  # accelerate's word for what is left on CPU or disk
        raise BaseModelError(name, "it does not fit on the GPUs here", "add GPUs, or set LORA_QUANTISE to 8bit or 4bit")
    if any(parameter.is_floating_point() and parameter.itemsize == 1 for parameter in model.parameters()):
        raise BaseModelError(name, "its weights stay in fp8 here, whose scales no site applies", "take it in bf16")
    if model.config._attn_implementation != "sdpa" and not model._supports_attention_backend:
        raise BaseUnfit(name, "its attention is of an older kind, whose tables end where its positions do", DENSE)


def _placement(device: str, dtype: torch.dtype, quantise: str) -> dict[str, Any]:  # transformers' own arguments
    """What has transformers spread or pack the weights; nothing for a plain base on one device."""
    if not quantise and device != SHARDED:
        return {}
    placed: dict[str, Any] = {"device_map": SHARDED if device == SHARDED else {"": device}}
    return placed | {"quantization_config": quantisation(quantise, dtype)} if quantise else placed


def default_device() -> str:
    """A GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str) -> str:
    """A device, once it has held something; "auto" is the CPU where there is no GPU.  Raises DeviceMissing."""
    if device == SHARDED:
        return SHARDED if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # an assertion says that this build of torch knows no GPU
        raise DeviceMissing(device, str(error).splitlines()[0][:100]) from None
    return device


def freeze(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str = "unnamed",
    revision: str = "main",
    digest: str = "",
    quantised: str = "",
) -> BaseModel:
    """A model already in memory as a base: no gradient, no dropout of its own, the quickest products.

    Raises BaseModelError where there is nothing to adapt, or where users could not share it.
    """
    unpack_on_use(model)
    quicken(model)
    steady(model)
    model.requires_grad_(False).eval()
    linears = adaptable(model)
    if not linears:
        raise BaseModelError(name, "it has no linear layer to adapt", "choose a transformer language model")
    longest, windows = positions(model.config), windows_of(model.config)
    check_sharing(model, name, longest, windows)
    with tried(model):
        reads = _what_is_read(model, linears)
    sites = tuple(Site(path, *widths(linear), reads[path]) for path, linear in linears.items())
    transposed = any(isinstance(linear, Conv1D) for linear in linears.values())
    plain_head = _has_plain_head(model)
    bits = quantised or packed_in(model.config)
    grain = grain_of(model, [width for site in sites for width in (site.inputs, site.outputs)])
    return BaseModel(
        model, tokenizer, name, revision, digest, sites, transposed, longest, windows, plain_head, bits, grain,
        reads_embeddings(model, _few_tokens(model)),
    )  # fmt: skip


@torch.inference_mode()
def _what_is_read(model: PreTrainedModel, linears: Mapping[str, nn.Module]) -> dict[str, int]:
    """A number for the tensor that each linear reads, tried on a few tokens; one that is not run reads its own."""
    seen: dict[str, Tensor] = {}  # kept, lest a later tensor has the address of an earlier one

    def note(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: seen.__setitem__(path, inputs[0])

    hooks = [linear.register_forward_pre_hook(note(path)) for path, linear in linears.items()]
    model.base_model(input_ids=_few_tokens(model), use_cache=False)
    for hook in hooks:
        hook.remove()
    numbers = {id(tensor): number for number, tensor in enumerate(seen.values())}
    return {path: numbers[id(seen[path])] if path in seen else -1 - n for n, path in enumerate(linears)}


def _few_tokens(model: PreTrainedModel) -> Tensor:
    words: int = model.config.get_text_config().vocab_size
    return torch.arange(4, device=model.device)[None] % words


@torch.inference_mode()
def _has_plain_head(model: PreTrainedModel) -> bool:
    """Tried on a few tokens rather than read off the architecture: several scale or cap their logits."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return False
    tokens = _few_tokens(model)
    hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state.to(head.weight.device)
    logits = model(input_ids=tokens, use_cache=False).logits.to(head.weight.device)
    return torch.equal(quick_product(hidden, head.weight.mT), logits)


def adaptable(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Every linear but the output head that text goes through, by path; none of a part that sees or hears."""
    text = {id(module) for module in model.get_decoder().modules()}
    return {path: linear for path, linear in linears_of(model).items() if id(linear) in text}


def linears_of(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Every linear but the output head, by path: what PEFT calls all-linear."""
    head = model.get_output_embeddings()
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | QuantisedLinear | Conv1D) and module is not head
    }


def widths(linear: nn.Module) -> tuple[int, int]:
    """How many numbers go in and come out of a linear, packed or not, or of a Conv1D."""
    if isinstance(linear, nn.Linear | QuantisedLinear):
        return linear.in_features, linear.out_features
    weight = linear.weight
    assert isinstance(weight, Tensor)  # nn.Module types its attributes loosely
    inputs, outputs = weight.shape
    return inputs, outputs
