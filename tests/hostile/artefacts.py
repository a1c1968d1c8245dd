"""Hostile adapter folders: a valid adapter of each method, spoilt in one way."""

import gzip
import io
import json
import os
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from lora_core.artifact import write_artifact
from lora_core.banks.table import make_bank
from lora_core.base_model import BaseModel, freeze
from lora_core.recipe import make_recipe
from tests.hostile.oddities import MUTATIONS, dumped, odd
from tests.lora_core.conftest import llama

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
RECIPES: tuple[dict[str, object], ...] = (
    {"method": "lora", "rank": 4}, {"method": "lora", "rank": 3, "rank_pattern": {"q_proj": 2}, "alpha": 7},
    {"method": "bottleneck", "width": 4}, {"method": "prompt_tuning", "virtual_tokens": 5},
    {"method": "prefix_tuning", "virtual_tokens": 3},
)  # fmt: skip
Header = dict[str, dict[str, object]]


def hostile_base() -> BaseModel:
    """The base that all of them claim to be for."""
    return freeze(llama(), None, "llama")


def valid_adapters(base: BaseModel) -> list[dict[str, bytes]]:
    """One of each method, of random numbers."""
    made = []
    for settings in RECIPES:
        spec = make_recipe(settings).method
        bank = make_bank(base, [spec])
        row_P = torch.randn(bank.width, generator=torch.Generator().manual_seed(1))
        made.append(write_artifact(base, spec, bank.to_tensors(bank.start_row(spec, 0) + 0.01 * row_P, spec), {}))
    return made


class Spoiler:
    """One folder, and one way to spoil it."""

    def __init__(self, folder: Path, generator: random.Random) -> None:
        self.folder, self.generator = folder, generator

    def mutate(self) -> None:
        """Bytes of one file changed, cut, dropped, doubled or put in."""
        path = self.folder / self.generator.choice([CONFIG, WEIGHTS, WEIGHTS])
        path.write_bytes(self.generator.choice(MUTATIONS)(path.read_bytes(), self.generator))

    def odd_setting(self) -> None:
        """Keys of the configuration with values that nobody should send."""
        config = json.loads((self.folder / CONFIG).read_text())
        keys = [*config, "auto_map", "rank_pattern", "alpha_pattern", "use_dora", "modules_to_save", "layers_pattern"]
        for _ in range(self.generator.randrange(1, 3)):
            config[self.generator.choice(keys)] = odd(self.generator)
        (self.folder / CONFIG).write_bytes(dumped(config))

    def odd_pattern(self) -> None:
        """Very many patterns, or odd ones."""
        config = json.loads((self.folder / CONFIG).read_text())
        many = {f"{self.generator.randrange(10**6)}.q_proj": 2 for _ in range(self.generator.choice([5, 1500]))}
        pattern = self.generator.choice([many, {"q_proj": odd(self.generator)}, {str(odd(self.generator)): 2}])
        config[self.generator.choice(["rank_pattern", "alpha_pattern"])] = pattern
        (self.folder / CONFIG).write_bytes(dumped(config))

    def other_config(self) -> None:
        """Something else where the configuration should be."""
        good = (self.folder / CONFIG).read_bytes()
        choices = [
            b"", b"null", b"[]", b"[" * 60_000, b'{"a":' * 9_000, b" " * 70_000 + good, good.decode().encode("utf-16"),
            b"\xef\xbb\xbf" + good, good[:-2] + b',"r":4}', good.replace(b"\n", b"\0"), b"\xff" * 100, b"9" * 6000,
            b'{"peft_type":' + b"9" * 5000 + b"}", dumped({"peft_type": odd(self.generator)}), b"\x80\x04" + good,
        ]  # fmt: skip
        (self.folder / CONFIG).write_bytes(self.generator.choice(choices))

    def odd_entry(self) -> None:
        """One entry of the header with a shape, type or place that nobody should send."""

        def change(header: Header, names: list[str]) -> None:
            entry = header[self.generator.choice(names)]
            key = self.generator.choice(["dtype", "shape", "data_offsets"])
            choices: dict[str, list[object]] = {
                "dtype": ["F64", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "f32"],
                "shape": [[-1, -4], [2**62, 4], [True, 4], [4.0, 32.0], [], [0], [[4], 32], [128]],
                "data_offsets": [[0, 0], [512, 0], [-8, 504], [2**63, 2**63 + 512], [0.0, 512.0], [False, 512], [0]],
            }
            entry[key] = self.generator.choice([*choices[key], odd(self.generator)])

        self._header(change)

    def moved_entries(self) -> None:
        """Tensors that overlap, leave a gap, exchange their places or share one."""

        def change(header: Header, names: list[str]) -> None:
            one, other = header[self.generator.choice(names)], header[self.generator.choice(names)]
            offsets = one["data_offsets"]
            assert isinstance(offsets, list)
            start, end = offsets
            moved = [[start + 4, end + 4], [start, end + 4], [start + 4, end], other["data_offsets"]]
            one["data_offsets"], other["data_offsets"] = self.generator.choice(moved), one["data_offsets"]

        self._header(change)

    def renamed_entries(self) -> None:
        """Names that lead out, hold nothing, or are another tensor's."""
        names = [
            "../../etc/passwd",
            "/etc/passwd",
            "",
            "\0",
            "\ud800",
            "é",
            "a" * 100_000,
            "__proto__",
            "x.lora_A.weight",
        ]
        self._header(lambda header, there: header.update({self.generator.choice(names): header.pop(there[0])}))

    def crowded_header(self) -> None:
        """Very many tensors of nothing, metadata without end, or other things that make a header long."""
        nothing: dict[str, object] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        count = self.generator.choice([1_000, 30_000, 1_000_000 if self.generator.random() < 0.1 else 2_000])
        crowds: list[Callable[[Header, list[str]], object]] = [
            lambda header, _: header.update({f"x{number}": dict(nothing) for number in range(count)}),
            lambda header, _: header.update(__metadata__={f"x{number}": "y" for number in range(count)}),
            lambda header, _: header.update(__metadata__=odd(self.generator)),  # type: ignore[call-overload]  # odd
            lambda header, names: header[names[0]].update(more=["z"] * count),
        ]
        self._header(self.generator.choice(crowds))

    def other_header(self) -> None:
        """A length that lies, or something else where the header should be."""
        data = (self.folder / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        text, body = data[8 : 8 + length], data[8 + length :]
        lie = self.generator.choice([0, 1, length - 1, length + 1, 2**31, 2**60, 2**64 - 1, len(data)])
        deep, twice = b"[" * 100_000, text.strip()[:-1] + b"," + text.strip()[1:]
        texts = [b"{}", b"[]", b"null", deep, twice, text.decode().encode("utf-16"), b"\xff" * 64, b" " * 2**20, b""]
        chosen = self.generator.choice(texts)
        honest = struct.pack("<Q", len(chosen)) + chosen + body
        lying = struct.pack("<Q", lie) + text + body
        (self.folder / WEIGHTS).write_bytes(self.generator.choice([honest, lying]))

    def odd_numbers(self) -> None:
        """A number that is none, or that no float16 can hold."""
        data = bytearray((self.folder / WEIGHTS).read_bytes())
        (length,) = struct.unpack("<Q", data[:8])
        place = 8 + length + 4 * self.generator.randrange((len(data) - 8 - length) // 4)
        data[place : place + 4] = struct.pack("<f", self.generator.choice([float("nan"), float("inf"), -float("inf")]))
        (self.folder / WEIGHTS).write_bytes(bytes(data))

    def other_weights(self) -> None:
        """Another format in the weights' place: pickles, archives, nothing, random bytes."""
        archive, pickled = io.BytesIO(), io.BytesIO()
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as bomb:
            bomb.writestr("x", bytes(1 << 22))
        torch.save({"x": torch.zeros(3)}, pickled)
        good = (self.folder / WEIGHTS).read_bytes()
        others = [archive.getvalue(), pickled.getvalue(), gzip.compress(good), b"", b"\0" * 9, good + b"x", good[:-1]]
        (self.folder / WEIGHTS).write_bytes(self.generator.choice([*others, self.generator.randbytes(5000)]))

    def odd_file(self) -> None:
        """No file at all in a file's place, one without end, or a pickle beside it."""
        path = self.folder / self.generator.choice([CONFIG, WEIGHTS])
        kind = self.generator.choice(["gone", "link", "device", "loop", "pipe", "folder", "huge", "pickle"])
        if kind == "pickle":
            (self.folder / f"adapter_model{self.generator.choice(['.bin', '.pt', '.PKL'])}").write_bytes(b"\x80\x04.")
            return
        path.unlink()
        if kind in ("link", "device", "loop"):
            path.symlink_to({"link": "README.md", "device": "/dev/zero", "loop": path.name}[kind])
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "huge":
            with path.open("wb") as file:
                file.truncate(1 << 36)  # holes: it takes no room

    def _header(self, change: Callable[[Header, list[str]], object]) -> None:
        data = (self.folder / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        change(header, sorted(name for name in header if name != "__metadata__"))
        text = dumped(header)
        (self.folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


KINDS = (
    "mutate", "mutate", "mutate", "odd_setting", "odd_setting", "odd_pattern", "other_config", "odd_entry", "odd_entry",
    "moved_entries", "renamed_entries", "crowded_header", "other_header", "odd_numbers", "other_weights", "odd_file",
)  # fmt: skip


def make_folder(folder: Path, generator: random.Random, valid: list[dict[str, bytes]]) -> str:
    """A spoilt adapter in a new folder; returns the kind."""
    folder.mkdir()
    for name, data in generator.choice(valid).items():
        (folder / name).write_bytes(data)
    kind = generator.choice(KINDS)
    getattr(Spoiler(folder, generator), kind)()
    return kind
