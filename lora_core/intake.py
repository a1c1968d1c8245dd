"""Adapter files coming in, ours or PEFT's: checked before any library sees them, refused with a reason.

The header is read by us, against what the method may have on the base: names, shapes, dtypes, offsets and sizes; then
the numbers themselves.  Nothing is unpickled, no pattern of the file is run, and memory is bounded by what the base
implies.
"""

import json
import math
import stat
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_core.artifact import CONFIG, WEIGHTS
from lora_core.banks.bank import Facts, Method, Shapes
from lora_core.banks.table import METHODS
from lora_core.base_model import BaseModel
from lora_core.errors import ArtifactRefused
from lora_core.methods import AnyMethod

_MOST_CONFIG = 1 << 16  # bytes
_MOST_HEADER = 1 << 22
_MOST_SITES = 100_000
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter as its files describe it: fp32 tensors by name, and the settings to read them by."""

    spec: AnyMethod
    tensors: Mapping[str, Tensor]


def read_artifact(folder: Path, base: BaseModel) -> AdapterFiles:
    """The adapter in a folder, for a base.  Raises ArtifactRefused."""
    if folder.is_symlink() or not folder.is_dir():
        raise ArtifactRefused(folder.name, "it is not a folder", "give the folder that holds adapter_config.json")
    for file in folder.iterdir():
        if file.suffix in _PICKLES:
            raise ArtifactRefused(file.name, "it is a pickle, which can run code", "save the adapter as safetensors")
    config = _config(folder / CONFIG)
    method = _method(config)
    spec = method.read_config(config)
    groups = method.layout(base, spec)
    most = _MOST_HEADER + 8 + 4 * sum(math.prod(shape) for group in groups for shape in group.values())
    return AdapterFiles(spec, parse_tensors(_bytes(folder / WEIGHTS, most), groups))


def parse_tensors(data: bytes, groups: Sequence[Shapes]) -> dict[str, Tensor]:
    """The tensors of safetensors bytes, checked against what there may be.  Raises ArtifactRefused."""
    header, body = _header(data)
    shapes = {name: shape for group in groups for name, shape in group.items()}
    tensors: dict[str, Tensor] = {}
    end = 0
    for name, entry in sorted(header.items(), key=_offset):
        if name not in shapes:
            raise _bad(f"the base has no place for a tensor named {ascii(name)[:100]}", "train it on this base")
        start, end = _checked_entry(name, entry, shapes[name], end)
        if end > len(body):
            raise _bad(f"{name} ends after the file does", "fetch it again")
        flat = torch.frombuffer(bytearray(body[start:end]), dtype=_DTYPES[entry["dtype"]])
        tensors[name] = flat.float().reshape(shapes[name])
        if not bool(tensors[name].isfinite().all()):
            raise _bad(f"{name} holds a number that is not finite", "train it again")
    if end != len(body):
        raise _bad(f"{len(body) - end} bytes belong to no tensor", "fetch it again")
    for group in groups:
        _check_whole(group, tensors)
    return tensors


def _method(config: Facts) -> Method:
    name = config.get("peft_type")
    method = next((method for method in METHODS.values() if method.peft_type == name), None)
    if method is None:
        known = ", ".join(sorted(method.peft_type for method in METHODS.values()))
        raise ArtifactRefused(CONFIG, f"peft_type is {ascii(name)[:40]}", f"give an adapter of {known}")
    return method


def _config(path: Path) -> dict[str, object]:
    try:
        config = json.loads(_bytes(path, _MOST_CONFIG), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ArtifactRefused(path.name, f"it is not JSON ({str(error)[:80]})", "fetch it again") from None
    if not isinstance(config, dict):
        raise ArtifactRefused(path.name, "it is not a JSON object", "fetch it again")
    return config


def _bytes(path: Path, most: int) -> bytes:
    """A regular file of limited size, whole."""
    try:
        facts = path.lstat()
    except OSError:
        raise ArtifactRefused(path.name, "it is missing", "fetch the adapter again") from None
    if not stat.S_ISREG(facts.st_mode):
        raise ArtifactRefused(path.name, "it is a link or a special file", "copy the file itself")
    if facts.st_size > most:
        raise ArtifactRefused(path.name, f"it has {facts.st_size:,} bytes, at most {most:,}", "is it for this base?")
    return path.read_bytes()


def _header(data: bytes) -> tuple[dict[str, dict[str, Any]], memoryview]:
    """The header's entries, not checked yet (hence Any), and the data after it."""
    if len(data) < 8:
        raise _bad("it is shorter than a header", "fetch it again")
    (length,) = struct.unpack("<Q", data[:8])
    if length > min(_MOST_HEADER, len(data) - 8):
        raise _bad(f"its header claims {length:,} bytes", "fetch it again")
    try:
        header = json.loads(data[8 : 8 + length].decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise _bad(f"its header is not JSON ({str(error)[:80]})", "fetch it again") from None
    if not isinstance(header, dict) or len(header) > _MOST_SITES:
        raise _bad("its header is not a list of tensors", "fetch it again")
    header.pop("__metadata__", None)
    if not header or not all(isinstance(entry, dict) for entry in header.values()):
        raise _bad("its header describes no tensors", "fetch it again")
    return header, memoryview(data)[8 + length :]


def _offset(item: tuple[str, Mapping[str, object]]) -> int:
    offsets = item[1].get("data_offsets")
    first = offsets[0] if isinstance(offsets, list) and offsets else -1
    return first if type(first) is int else -1


def _checked_entry(name: str, entry: Mapping[str, object], shape: list[int], begin: int) -> tuple[int, int]:
    """Where a tensor's bytes are, when its dtype, shape and place are right: each begins where the last one ended."""
    dtype, offsets = entry.get("dtype"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _bad(f"{name} is of dtype {ascii(dtype)[:20]}", "save it as float32, bfloat16 or float16")
    if entry.get("shape") != shape or any(type(size) is not int for size in shape):
        raise _bad(f"{name} has shape {ascii(entry.get('shape'))[:40]}, not {shape}", "is it for this base and rank?")
    size = math.prod(shape) * _DTYPES[dtype].itemsize
    if offsets != [begin, begin + size] or any(type(offset) is not int for offset in offsets):
        raise _bad(f"{name} overlaps another tensor or leaves a gap", "fetch it again")
    return begin, begin + size


def _check_whole(group: Shapes, tensors: Mapping[str, Tensor]) -> None:
    there, missing = ([name for name in group if (name in tensors) == found] for found in (True, False))
    if there and missing:
        raise _bad(f"{there[0]} has no {missing[0]} beside it", "save the adapter again")


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _bad(why: str, fix: str) -> ArtifactRefused:
    return ArtifactRefused(WEIGHTS, why, fix)
