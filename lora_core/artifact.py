"""A user's adapter as PEFT's files: canonical bytes out (same input, same SHA-256).  Reading back is in `intake.py`.

Follows PEFT's adapter layout (`adapter_config.json`, `adapter_model.safetensors`) and the safetensors format 0.x.
"""

import hashlib
import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import PurePath

import torch
from torch import Tensor

from lora_core.banks.bank import Facts
from lora_core.banks.table import METHODS
from lora_core.base_model import BaseModel
from lora_core.methods import AnyMethod

CONFIG, WEIGHTS, CARD, MANIFEST = "adapter_config.json", "adapter_model.safetensors", "README.md", "manifest.json"
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_HEADER_ALIGNMENT = 8  # the format's own: data begins at a multiple of it


def adapter_config(base: BaseModel, spec: AnyMethod, tensors: Mapping[str, Tensor]) -> Facts:
    """`adapter_config.json` of tensors trained on a base: what every PEFT method has, and the method's own keys."""
    method = METHODS[spec.name]
    return {
        "peft_type": method.peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": public_name(base.name, base.digest),
        "inference_mode": True,
        **method.config(base, spec, tensors),
    }


def write_artifact(base: BaseModel, spec: AnyMethod, tensors: Mapping[str, Tensor], facts: Facts) -> dict[str, bytes]:
    """The files of a version by name, the manifest last.

    `facts` go into the manifest: base, dataset, recipe, scores, cohort, versions; nothing that names a person.
    """
    files = {
        CONFIG: canonical_json(adapter_config(base, spec, tensors)),
        WEIGHTS: safetensors_bytes(tensors),
        CARD: model_card(public_name(base.name, base.digest), spec, tensors, facts).encode(),
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


def model_card(base_name: str, spec: AnyMethod, tensors: Mapping[str, Tensor], facts: Facts) -> str:
    """README.md with the front matter that model hubs read, what it scored, and how to load it."""
    method = METHODS[spec.name]
    front = {
        "base_model": base_name,
        "base_model_relation": "adapter",
        "library_name": method.library,
        "pipeline_tag": "text-generation",
    }
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in front.items()),
        "tags:",
        f"- {spec.name}",
        "---",
        "",
    ]
    lines += [
        "# Personal adapter",
        "",
        method.sentence(spec, tensors),
        "",
    ]
    lines += _score_table(facts)
    lines += ["```python", method.usage.format(base=json.dumps(base_name)), "```", ""]
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
