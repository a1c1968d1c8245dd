"""A base as files: where they are, which it is and how large, known without loading it and without torch."""

import hashlib
import math
import os
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from lora_core.errors import BaseModelError

# What decides a base's behaviour.  Weights are safetensors only: nothing is unpickled.
WEIGHTS = "*.safetensors"
FINGERPRINTED = (
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "*.tiktoken",
)
ADVICE = "generation_config.json"  # its makers': which tokens end answers, how to sample; no adapter depends on it
CONVERT = "convert them; pickles are never opened"
QUANTISERS = ("bitsandbytes", "accelerate")


def locate(name: str, revision: str | None = None) -> Path:
    """The folder of a base's files: the path itself, or a download from the hub.  Raises BaseModelError."""
    if name and os.path.isdir(name):  # which, unlike pathlib's, takes a name that is too long for none
        return Path(name)
    if not name or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise BaseModelError(name, "there is no such folder", "give a folder or a Hugging Face id")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[*FINGERPRINTED, ADVICE]))
    except HFValidationError as error:
        raise BaseModelError(name, str(error).splitlines()[0], "give a folder or a Hugging Face id") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        why = f"cannot be had from the hub ({type(error).__name__})"
        raise BaseModelError(name, why, "check the id, HF_TOKEN and HF_HUB_OFFLINE, or give a folder") from None


def fingerprint(folder: Path, quantise: str = "") -> str:
    """SHA-256 over the names and SHA-256 of the files that decide what the base computes, and how it is quantised.

    Raises BaseModelError, for a folder without weights too: it may be where a disk is missing.
    """
    total = hashlib.sha256()
    try:
        files = sorted({path for pattern in FINGERPRINTED for path in folder.glob(pattern) if path.is_file()})
        for path in files:
            with path.open("rb") as stream:
                total.update(f"{path.name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    except OSError as error:
        raise BaseModelError(str(folder), f"cannot be read ({error.strerror})", "look at the disk") from None
    if not any(path.match(WEIGHTS) for path in files):
        raise BaseModelError(str(folder), "it has no safetensors weights", CONVERT)
    if quantise:
        total.update(f"\0{quantise}\n".encode())  # no file has that name
    return total.hexdigest()


def count_parameters(folder: Path) -> int:
    """How many numbers the files of a base hold, from their headers alone.  Raises BaseModelError."""
    return sum(_parameters_in(path) for path in folder.glob(WEIGHTS))


def _parameters_in(path: Path) -> int:
    try:
        with safe_open(path, framework="np") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118  not a dict
    except (OSError, SafetensorError) as error:
        why = f"{path.name} is no safetensors file ({str(error).splitlines()[0][:100]})"
        raise BaseModelError(str(path.parent), why, "fetch or save the base again") from None


def check_quantise(name: str, quantise: str) -> None:
    """Whether a base can be quantised so, here.  Raises BaseModelError."""
    if quantise not in ("", "4bit", "8bit"):
        raise BaseModelError(name, f"cannot be quantised to {quantise!r}", "give 4bit or 8bit, or nothing")
    for library in QUANTISERS if quantise else ():
        if find_spec(library) is None:
            why = f"{quantise} weights need {library}, which is not installed"
            raise BaseModelError(name, why, "pip install 'lora-factory[quantise]'")
