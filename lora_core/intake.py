"""Adapter files coming in, ours or PEFT's: checked before any library sees them, refused with a reason.

The header is read by us, against what the method may have on the base: names, shapes, dtypes, offsets and sizes; then
the numbers themselves.  Nothing is unpickled, no pattern of the file is run, and memory is bounded by what the base
implies.  Where a version's recipe is on record, the settings are rebuilt from it, and the file may say nothing else.
"""

import errno
import json
import math
import os
import stat
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_core.artifact import CONFIG, WEIGHTS, adapter_config, canonical_json
from lora_core.banks.bank import Facts, Method, Shapes
from lora_core.banks.table import METHODS
from lora_core.base_model import BaseModel
from lora_core.errors import ArtifactRefused
from lora_core.methods import AnyMethod

_MOST_CONFIG = 1 << 16  # bytes
_MOST_METADATA = 1 << 16  # of a header, beside its tensors
_MOST_ENTRY = 256  # beside a tensor's name
_MOST_FILES = 1000  # in a folder: what is looked through for pickles
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAME = "base_model_name_or_path"  # where the base lay: it is known by its digest
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter as its files describe it: fp32 tensors by name, and the settings to read them by."""

    spec: AnyMethod
    tensors: Mapping[str, Tensor]


def read_artifact(folder: Path, base: BaseModel, recorded: Sequence[AnyMethod] = ()) -> AdapterFiles:
    """The adapter in a folder, for a base.  Raises ArtifactRefused.

    `recorded` are the settings that it can have been trained with (of a search several), where that is known.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise ArtifactRefused(folder.name, "it is not a folder", "give the folder that holds adapter_config.json")
    _look_through(folder)
    config = _config(folder / CONFIG)
    method = _method(config)
    spec = method.read_config(config)
    groups = method.layout(base, spec)
    most = 8 + _most_header(groups) + 4 * sum(math.prod(shape) for group in groups for shape in group.values())
    tensors = parse_tensors(_bytes(folder / WEIGHTS, most), groups)
    return AdapterFiles(_rebuilt(base, config, tensors, recorded) if recorded else spec, tensors)


def parse_tensors(data: bytes, groups: Sequence[Shapes]) -> dict[str, Tensor]:
    """The tensors of safetensors bytes, checked against what there may be.  Raises ArtifactRefused."""
    header, body = _header(data, _most_header(groups))
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


def _look_through(folder: Path) -> None:
    with os.scandir(folder) as entries:
        for count, entry in enumerate(entries):
            if Path(entry.name).suffix.lower() in _PICKLES:
                name = ascii(entry.name)[1:80]
                raise ArtifactRefused(name, "it is a pickle, which can run code", "save the adapter as safetensors")
            if count >= _MOST_FILES:
                raise ArtifactRefused(folder.name, f"it holds more than {_MOST_FILES:,} files", "is it the adapter's?")


def _rebuilt(base: BaseModel, config: Facts, tensors: Mapping[str, Tensor], recorded: Sequence[AnyMethod]) -> AnyMethod:
    """The settings as the record gives them; the file agrees with it in all that it says, or it is refused."""
    differing = "peft_type"
    for spec in recorded:
        method = METHODS[spec.name]
        if not {name for group in method.layout(base, spec) for name in group} >= set(tensors):
            differing = "the set of modules"
            continue
        ours = json.loads(canonical_json(adapter_config(base, spec, tensors)))
        unlike = [key for key in config if key != _NAME and (key not in ours or config[key] != ours[key])]
        if not unlike:
            known: AnyMethod = method.read_config(ours)
            return known
        differing = ascii(unlike[0])[1:60]
    why = f"{differing} is not what the registry's recipe makes it"
    raise ArtifactRefused(CONFIG, why, "do not use it; have the version published anew")


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
    """A regular file of limited size, whole; what is looked at and what is read are one file."""
    try:
        with open(path, "rb", opener=_no_link) as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode):
                raise ArtifactRefused(path.name, "it is a link or a special file", "copy the file itself")
            data = file.read(most + 1) if facts.st_size <= most else b""
    except FileNotFoundError:
        raise ArtifactRefused(path.name, "it is missing", "fetch the adapter again") from None
    except OSError as error:
        special = error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR)
        why = "it is a link or a special file" if special else f"it cannot be read ({error.strerror})"
        raise ArtifactRefused(path.name, why, "copy the file itself") from None
    if max(facts.st_size, len(data)) > most:
        raise ArtifactRefused(path.name, f"it has {facts.st_size:,} bytes, at most {most:,}", "is it for this base?")
    return data


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe without a writer must not be waited for


def _most_header(groups: Sequence[Shapes]) -> int:
    """Bytes that a header of such tensors can need."""
    return _MOST_METADATA + sum(_MOST_ENTRY + 6 * len(name) for group in groups for name in group)  # 6: \u0041


def _header(data: bytes, most: int) -> tuple[dict[str, dict[str, Any]], memoryview]:
    """The header's entries, not checked yet (hence Any), and the data after it."""
    if len(data) < 8:
        raise _bad("it is shorter than a header", "fetch it again")
    (length,) = struct.unpack("<Q", data[:8])
    if length > min(most, len(data) - 8):
        raise _bad(f"its header claims {length:,} bytes", "fetch it again")
    try:
        header = json.loads(data[8 : 8 + length].decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise _bad(f"its header is not JSON ({str(error)[:80]})", "fetch it again") from None
    if not isinstance(header, dict):
        raise _bad("its header is not a list of tensors", "fetch it again")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _bad("its metadata is not texts by name", "save it again")
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
    given = entry.get("shape")
    if not isinstance(given, list) or given != shape or any(type(size) is not int for size in given):
        raise _bad(f"{name} has shape {ascii(given)[:40]}, not {shape}", "is it for this base and rank?")
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
