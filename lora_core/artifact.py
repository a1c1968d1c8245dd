"""A user's adapter as PEFT's files: canonical bytes out (same input, same SHA-256).  Reading back is in `intake.py`.

Follows PEFT's adapter layout (`adapter_config.json`, `adapter_model.safetensors`) and the safetensors format 0.x.
"""

import hashlib
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

import torch
from torch import Tensor

from lora_core.base_model import BaseModel
from lora_core.recipe import LoraSpec

CONFIG, WEIGHTS, CARD, MANIFEST = "adapter_config.json", "adapter_model.safetensors", "README.md", "manifest.json"
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_HEADER_ALIGNMENT = 8  # the format's own: data begins at a multiple of it

Facts = Mapping[str, object]  # JSON that another module owns


@dataclass(frozen=True)
class AdapterConfig:
    """What PEFT needs to know to apply the tensors."""

    spec: LoraSpec
    base_name: str
    modules: tuple[str, ...]  # full paths of the adapted linears
    all_modules: tuple[str, ...]  # full paths of every linear that could be adapted
    transposed: bool

    @classmethod
    def of(cls, base: BaseModel, spec: LoraSpec, tensors: Mapping[str, Tensor]) -> "AdapterConfig":
        """The configuration of tensors trained on a base."""
        modules = sorted({name.split(".lora_")[0].removeprefix("base_model.model.") for name in tensors})
        every = tuple(site.name for site in base.sites)
        return cls(spec, public_name(base.name, base.digest), tuple(modules), every, base.transposed)

    @property
    def targets(self) -> list[str]:
        """The last parts of the modules' paths where they name exactly these modules, else the whole paths."""
        ends = {module.rpartition(".")[2] for module in self.modules}
        named = {module for module in self.all_modules if module.rpartition(".")[2] in ends}
        return sorted(ends if named == set(self.modules) else self.modules)

    def to_json(self) -> Facts:
        """PEFT's LoraConfig as it saves it."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base_name,
            "r": self.spec.rank,
            "lora_alpha": int(self.spec.alpha) if self.spec.alpha.is_integer() else self.spec.alpha,
            "lora_dropout": self.spec.dropout,
            "use_rslora": self.spec.use_rslora,
            "target_modules": self.targets,
            "fan_in_fan_out": self.transposed,
            "bias": "none",
            "inference_mode": True,
            "init_lora_weights": True,
            "modules_to_save": None,
        }


def write_artifact(tensors: Mapping[str, Tensor], config: AdapterConfig, facts: Facts) -> dict[str, bytes]:
    """The files of a version by name, the manifest last.

    `facts` go into the manifest: base, dataset, recipe, scores, cohort, versions; nothing that names a person.
    """
    files = {
        CONFIG: canonical_json(config.to_json()),
        WEIGHTS: safetensors_bytes(tensors),
        CARD: model_card(config, facts).encode(),
    }
    named = {name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)} for name, data in files.items()}
    return {**files, MANIFEST: canonical_json({"format": 1, "files": named, **facts})}


def canonical_json(value: object) -> bytes:
    """JSON with sorted keys, two spaces and a line end; a number that is not finite becomes null."""
    text = json.dumps(_finite(value), sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def safetensors_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors in order of name, one metadata key: the library itself writes several keys in random order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    blobs: list[bytes] = []
    start = 0
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        blob = tensor.flatten().view(torch.uint8).numpy().tobytes()
        end = start + len(blob)
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        blobs.append(blob)
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    return b"".join([struct.pack("<Q", len(text)), text, *blobs])


def model_card(config: AdapterConfig, facts: Facts) -> str:
    """README.md with the front matter that model hubs read, what it scored, and how to load it."""
    front = {
        "base_model": config.base_name,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
    }
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "tags:", "- lora", "---", ""]
    lines += [
        "# Personal adapter",
        "",
        f"A LoRA of rank {config.spec.rank} on {len(config.modules)} linear layers.",
        "",
    ]
    lines += _score_table(facts)
    lines += [
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({json.dumps(config.base_name)})",
        'model = PeftModel.from_pretrained(base, "path/of/this/folder")',
        "```",
        "",
    ]
    return "\n".join(lines)


def public_name(name: str, digest: str) -> str:
    """A base's name for files: a hub id as it is, a local folder by its last part and its digest."""
    path = PurePath(name)
    local = path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2 or "\\" in name
    return f"{path.name or 'base'}-{digest[:12]}" if local else name


def _score_table(facts: Facts) -> list[str]:
    scores = facts.get("scores")
    if not isinstance(scores, Mapping):
        return []
    name = next((key for one in scores.values() for key in one if key.endswith("_accuracy")), "token_accuracy")
    rows = [f"| {subject} | {figures['loss']:.4f} | {figures[name]:.1%} |" for subject, figures in scores.items()]
    return [f"| on held-out examples | loss | {name.replace('_', ' ')} |", "|---|---|---|", *rows, ""]


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(inner) for inner in value]
    return value
