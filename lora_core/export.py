"""A LoRA for engines that do not read PEFT's files: as llama.cpp's GGUF adapter, or merged into its base.

The adapter follows `convert_lora_to_gguf.py` of llama.cpp and what its loader checks.  llama.cpp multiplies by alpha
over rank and knows no rsLoRA, so alpha is what gives the adapter's own scale.  GPT-2's factors stay as PEFT has them:
the script turns them round with the base's transposed weights, after which the loader finds them of the wrong shape.
I inputs and O outputs of a site, R rank.
"""

import shutil
import struct
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from lora_core.base_files import ADVICE, FINGERPRINTED
from lora_core.base_model import BaseModel
from lora_core.decoding import unadvised
from lora_core.errors import BaseModelError, ExportRefused
from lora_core.intake import AdapterFiles
from lora_core.methods import AnyMethod, LoraSpec

PREFIX = "base_model.model."  # PEFT's


@dataclass(frozen=True)
class Family:
    """What llama.cpp calls an architecture, and whether it keeps queries and keys in another order of rows."""

    name: str
    permuted: bool = False


# By transformers' model_type.
FAMILIES = {
    "llama": Family("llama", permuted=True),
    "mistral": Family("llama", permuted=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma": Family("gemma"),
    "gemma2": Family("gemma2"),
    "gemma3": Family("gemma3"),  # what of it reads text
    "gemma3_text": Family("gemma3"),
    "phi3": Family("phi3"),
    "gpt2": Family("gpt2"),
}


@dataclass(frozen=True)
class Delta:
    """What an adapter adds to one linear: scale * up down."""

    down_RI: Tensor
    up_OR: Tensor
    scale: float

    @property
    def alpha(self) -> float:
        """The alpha that, over this rank, gives this scale."""
        return self.scale * len(self.down_RI)


def as_lora(spec: AnyMethod) -> LoraSpec:
    """The settings of a LoRA, which alone can be exported.  Raises ExportRefused for another method's."""
    if spec.name != "lora":
        raise ExportRefused(f"an adapter of {spec.name}", "it is no change of weights", "train it as a LoRA")
    return spec


def deltas(files: AdapterFiles) -> dict[str, Delta]:
    """An adapter's deltas by the path of the linear that each adds to.  Raises ExportRefused for another method's."""
    spec, tensors = as_lora(files.spec), files.tensors
    down, up = ".lora_A.weight", ".lora_B.weight"
    paths = sorted(name.removeprefix(PREFIX).removesuffix(down) for name in tensors if name.endswith(down))
    return {
        path: Delta(tensors[f"{PREFIX}{path}{down}"], tensors[f"{PREFIX}{path}{up}"], spec.scale_at(path))
        for path in paths
    }


def write_gguf(path: Path, config: PretrainedConfig, found: Mapping[str, Delta]) -> None:
    """Write an adapter as llama.cpp's `--lora` reads it.  Raises ExportRefused for what it has no place for."""
    import gguf  # imported late: an extra that only this needs

    family = _family(config)
    named = _named(config, family, found)
    alpha = next(iter(named.values())).alpha
    writer = gguf.GGUFWriter(path, family.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for name, delta in named.items():
        writer.add_tensor(f"{name}.lora_a", delta.down_RI.contiguous().numpy())
        up_OR = delta.up_OR * (delta.alpha / alpha)  # one alpha for all: what another one would have done goes here
        writer.add_tensor(f"{name}.lora_b", up_OR.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def is_gguf_adapter(path: Path) -> bool:
    """Whether a file begins as an adapter for llama.cpp does; a model, a quantised base say, does not."""
    typed = b"general.type" + struct.pack("<IQ", 8, len("adapter")) + b"adapter"  # 8: a string follows
    with path.open("rb") as file:
        head = file.read(1024)
    return head.startswith(b"GGUF") and typed in head


def _family(config: PretrainedConfig) -> Family:
    family = FAMILIES.get(config.model_type)
    if family is None:
        why = f"how llama.cpp names the weights of {config.model_type!r} is not known here"
        raise ExportRefused("as gguf, this adapter", why, f"known are {', '.join(FAMILIES)}; or export it merged")
    return family


def _named(config: PretrainedConfig, family: Family, found: Mapping[str, Delta]) -> dict[str, Delta]:
    """Deltas by the names of llama.cpp's weights, their rows in its order."""
    import gguf

    (number,) = [number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == family.name]
    names = gguf.get_tensor_name_map(number, config.get_text_config().num_hidden_layers)
    named = {}
    for path, delta in found.items():
        # llama.cpp keeps what sees pictures in a file of its own, and names the rest as a model of text alone.
        name = names.get_name(path.replace("language_model.", ""))
        if name is None:
            why = f"llama.cpp's {family.name} has no weight for {path}"
            raise ExportRefused("as gguf, this adapter", why, "train it without that target, or export it merged")
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if family.permuted else {}
        named[f"{name}.weight"] = _reordered(delta, heads.get(path.rpartition(".")[2]))
    return named


def _reordered(delta: Delta, heads: int | None) -> Delta:
    """A query's or key's delta with each head's halves interleaved, as llama.cpp rotates them; others as they are."""
    if heads is None:
        return delta
    up_OR = delta.up_OR.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    return Delta(delta.down_RI, up_OR, delta.scale)


def check_mergeable(quantised: str) -> None:
    """Whether an adapter can be merged into a base that is kept so.  Raises ExportRefused."""
    if quantised:
        why = f"{quantised} weights plus a delta would be rounded to few bits again, to other ones than trained on"
        raise ExportRefused("merged, this adapter", why, "export it as gguf, or train on the whole base")


@torch.no_grad()
def merge(base: BaseModel, found: Mapping[str, Delta]) -> None:
    """Add deltas to the base's own weights, in fp32 and then rounded to what the base is kept in.

    The base is another one afterwards.  Raises ExportRefused for a quantised base.
    """
    check_mergeable(base.quantised)
    for path, delta in found.items():
        linear = base.model.get_submodule(path)
        weight = linear.weight
        assert isinstance(weight, Tensor)  # nn.Module types its attributes loosely
        change_OI = delta.scale * (delta.up_OR @ delta.down_RI).to(weight.device)
        weight.copy_(weight.float() + (change_OI.mT if isinstance(linear, Conv1D) else change_OI))


def write_merged(folder: Path, base: BaseModel, base_folder: Path) -> None:
    """Write a merged base into an empty folder that transformers loads; the tokenizer's files are the base's own.

    So is what its makers advise on generation, which transformers reads but does not write where it contradicts itself.
    Raises ExportRefused.
    """
    try:
        with unadvised(base.model) if (base_folder / ADVICE).is_file() else nullcontext():
            base.model.save_pretrained(folder)
    except (ValueError, NotImplementedError, SafetensorError) as error:  # what transformers says where it cannot
        why = f"transformers cannot save its base: {str(error).strip().splitlines()[0][:200]}"
        raise ExportRefused("merged, this adapter", why, "mend the base's configuration") from None
    for path in folder.glob("*.safetensors"):
        path.chmod((folder / "config.json").stat().st_mode)  # safetensors lets nobody else read what it writes
    for pattern in (*FINGERPRINTED, ADVICE):
        for path in base_folder.glob(pattern):
            if path.is_file() and path.name != "config.json" and ".safetensors" not in path.name:
                shutil.copyfile(path, folder / path.name)


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype that a base's files say they are in; fp32 where they say nothing.  Raises BaseModelError."""
    try:
        found = AutoConfig.from_pretrained(folder, trust_remote_code=False).dtype
    except (OSError, ValueError, KeyError) as error:
        why = f"transformers cannot read its config.json: {str(error).strip().splitlines()[0]}"
        raise BaseModelError(str(folder), why, "give a causal language model that transformers knows") from None
    found = getattr(torch, found, None) if isinstance(found, str) else found
    return found if isinstance(found, torch.dtype) else torch.float32
