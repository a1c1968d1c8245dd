"""What a base must keep for users and documents to share it: tried on a few tokens, whatever its architecture is."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from lora_core.batch import Windows, as_batch, fields_of
from lora_core.data.packing import pack
from lora_core.data.rendering import Rendered
from lora_core.errors import BaseUnfit
from lora_core.products import GRAIN
from lora_core.quantised import packed_in

ENDLESS = 1 << 30  # tokens an example may have, or a layer looks back, where a base names no limit
ALIKE, ROUNDED = 1e-3, 0.1  # of a state's norm: how far rounding takes it in fp32, and in 16 bits
FEW = 4  # tokens of a document that is tried
DENSE = "choose a dense base whose layers all attend under a mask, as those of Llama, Mistral, Qwen3, Gemma or GPT-2 do"


def windows_of(config: PreTrainedConfig) -> Windows:
    """How far back a base's layers look, by the rule of transformers' own masks: all alike, or by the kind of layer."""
    text = config.get_text_config()
    window: int | None = getattr(text, "sliding_window", None) or None
    if window is None or not getattr(text, "layer_types", None):
        return window
    return {"full_attention": None, "sliding_attention": window}


def positions(config: PreTrainedConfig) -> int:
    """How many a base has: it knows no later one, or would turn all of them otherwise."""
    text = config.get_text_config()
    limits = (getattr(text, "max_position_embeddings", None), *_switches(text))
    return min(limit for limit in (*limits, ENDLESS) if limit)


def _switches(config: PreTrainedConfig) -> Iterator[int | None]:
    """Where a rotary embedding takes other frequencies, for all rows as soon as one of them is so long (LongRoPE)."""
    rotary = getattr(config, "rope_parameters", None) or {}
    for one in (rotary, *rotary.values()):  # of all layers, or by the kind of layer
        if isinstance(one, Mapping) and one.get("rope_type") == "longrope":
            yield one.get("original_max_position_embeddings")


def fuses_attention(model: PreTrainedModel) -> bool:
    """Whether attention is one kernel, which computes each head of each row by itself."""
    fused: bool = model.config.get_text_config()._attn_implementation == "sdpa"
    return fused


def grain_of(model: PreTrainedModel, widths: Iterable[int]) -> int:
    """Of how many tokens rows are a multiple, for every slot's numbers to lie alike to MKL's batched products.

    Of any number where widths see to that; but not in products of tokens by tokens, as attention in steps has them.
    """
    by_mkl = model.device.type == "cpu" and model.dtype == torch.float32
    even = fuses_attention(model) and all(width % GRAIN == 0 for width in widths)
    return GRAIN if by_mkl and not even else 1


def check_sharing(model: PreTrainedModel, name: str, longest: int, windows: Windows) -> None:
    """Refuse a base in which a document would depend on others, of its row or of other rows.  Raises BaseUnfit."""
    if any(type(module).__name__.endswith("Experts") for module in model.modules()):  # transformers' name
        why = "its experts multiply all users' tokens together, so a user's bytes would depend on its neighbours"
        raise BaseUnfit(name, why, DENSE)
    length, last = min(FEW, longest), 0 if longest == ENDLESS else longest - 1
    try:
        one, two = _behind(model, windows, length, 0, 0), _behind(model, windows, length, 1, last)
        own = _by_itself(model, length)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever an architecture's own code raises
        said = (str(error).splitlines() or [""])[0][:100]
        why = f"it cannot read several documents in a row: {type(error).__name__}: {said}"
        raise BaseUnfit(name, why, DENSE) from error
    if not torch.allclose(one, two, rtol=0, atol=0, equal_nan=True):  # broken weights are another matter
        why = "its documents change each other: recurrent, convolutional and linear-attention layers heed no mask"
        raise BaseUnfit(name, why, DENSE)
    share = ((one - own).norm() / own.norm()).item()
    whole = model.dtype == torch.float32 and not packed_in(model.config)  # packed weights may compute in 16 bits
    if share > (ALIKE if whole else ROUNDED):
        why = "in a row it reads a document otherwise than by itself: it looks ahead, or counts positions its own way"
        raise BaseUnfit(name, why, DENSE)


@torch.inference_mode()
def reads_embeddings(model: PreTrainedModel, tokens_KT: Tensor) -> bool:
    """Whether embeddings, any, tell a base as much as tokens do: some architectures look up more by the token."""
    reader, embedded_KTD = model.base_model, model.get_input_embeddings()(tokens_KT)
    try:
        told_KTD = reader(input_ids=tokens_KT, use_cache=False).last_hidden_state
        found_KTD = reader(inputs_embeds=embedded_KTD, use_cache=False).last_hidden_state
        reader(inputs_embeds=embedded_KTD + 1, use_cache=False)  # no token's
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever an architecture's own code raises
        return False
    return torch.allclose(told_KTD, found_KTD, equal_nan=True)


@torch.inference_mode()
def _by_itself(model: PreTrainedModel, length: int) -> Tensor:
    """The same document's last hidden states as the model reads it, whatever its masks and positions are."""
    tokens = torch.tensor([_document(range(length), model.config.get_text_config().vocab_size).tokens])
    hidden_KTD: Tensor = model.base_model(input_ids=tokens.to(model.device), use_cache=False).last_hidden_state
    return hidden_KTD[0]


@torch.inference_mode()
def _behind(model: PreTrainedModel, windows: Windows, length: int, other: int, position: int) -> Tensor:
    """A document's last hidden states, behind one of the `other` token and beside a row with a token at `position`."""
    words: int = model.config.get_text_config().vocab_size
    mine, earlier = _document(range(length), words), _document([other] * length, words)
    rows = [pack(documents, 2 * length)[0] for documents in ([(0, earlier), (1, mine)], [(0, earlier)])]
    fields_4KT = fields_of(rows, model.device)
    fields_4KT[2, 1, -1] = position
    batch = as_batch(fields_4KT, model.dtype, windows)
    hidden_KTD: Tensor = model.base_model(**batch.inputs).last_hidden_state
    return hidden_KTD[0, length:]


def _document(tokens: Iterable[int], words: int) -> Rendered:
    known = tuple(token % words for token in tokens)
    return Rendered(known, (True,) * len(known))
