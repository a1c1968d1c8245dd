"""Files out: the same bytes every time.  Files in: nothing that is not what it should be."""

import json
import os
import random
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file

from lora_core.artifact import public_name, safetensors_bytes, write_artifact
from lora_core.banks.lora import lora_bank
from lora_core.base_model import BaseModel
from lora_core.errors import ArtifactRefused
from lora_core.intake import read_artifact
from tests.lora_core.conftest import lora_of, recipe
from tests.lora_core.test_peft_parity import random_row

FACTS = {"scores": {"base": {"loss": 2.0, "token_accuracy": 0.5}, "candidate": {"loss": 1.0, "token_accuracy": 0.7}}}


def artifact(base: BaseModel, backwards: bool = False) -> dict[str, bytes]:
    """A small adapter's files."""
    spec = lora_of(recipe(targets=("q_proj", "v_proj")))
    bank = lora_bank(base, [spec])
    tensors = bank.to_tensors(random_row(bank, spec), spec)
    if backwards:
        tensors = dict(reversed(tensors.items()))
    return write_artifact(base, spec, tensors, FACTS)


@pytest.fixture
def folder(llama_base: BaseModel, tmp_path: Path) -> Path:
    """A small adapter as files."""
    for name, data in artifact(llama_base).items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def read(folder: Path, base: BaseModel) -> object:
    """As an inference host or the judge would."""
    return read_artifact(folder, base)


def test_the_same_adapter_is_the_same_bytes(llama_base: BaseModel) -> None:
    """In whatever order its tensors come."""
    assert artifact(llama_base) == artifact(llama_base, backwards=True)


@pytest.mark.long
def test_the_bytes_do_not_depend_on_pythons_hash_seed() -> None:
    """PEFT's own files differ from process to process."""
    code = (
        "import hashlib, sys; from tests.lora_core.conftest import llama; from lora_core.base_model import freeze;"
        "from tests.lora_core.test_artifact import artifact;"
        "print(hashlib.sha256(b''.join(artifact(freeze(llama(), None)).values())).hexdigest())"
    )
    root = Path(__file__).parents[2]

    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=root,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    }

    assert len(digests) == 1


def test_the_manifest_comes_last_and_names_every_file(llama_base: BaseModel) -> None:
    """It is what the registry keeps the digest of."""
    files = artifact(llama_base)

    assert list(files) == ["adapter_config.json", "adapter_model.safetensors", "README.md", "manifest.json"]
    assert sorted(json.loads(files["manifest.json"])["files"]) == sorted(list(files)[:-1])


def test_the_safetensors_library_reads_our_bytes() -> None:
    """Odd sizes, one element, several dtypes."""
    tensors = {
        "b": torch.randn(3, 5),
        "a": torch.ones(1, dtype=torch.bfloat16),
        "c": torch.zeros(2, 1, dtype=torch.float16),
    }

    found = load(safetensors_bytes(tensors))

    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_the_card_says_what_hubs_read(llama_base: BaseModel) -> None:
    """Front matter first."""
    card = artifact(llama_base)["README.md"].decode()

    for line in ('library_name: "peft"', 'base_model: "llama"', 'base_model_relation: "adapter"'):
        assert line in card
    assert "| candidate | 1.0000 | 70.0% |" in card


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("org/model", "org/model"),
        ("/home/eve/base", "base-abcdefabcdef"),
        ("./x", "x-abcdefabcdef"),
        ("a/b/c", "c-abcdefabcdef"),
    ],
)
def test_no_path_of_a_machine_gets_into_the_files(name: str, public: str) -> None:
    """A folder is known by its last part and its digest."""
    assert public_name(name, "abcdef" * 12) == public


def tamper_config(**changes: object) -> Callable[[Path], None]:
    """Change keys of adapter_config.json."""

    def apply(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return apply


def tamper_header(change: Callable[[dict[str, dict[str, object]], list[str]], object]) -> Callable[[Path], None]:
    """Change the header of adapter_model.safetensors."""

    def apply(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        change(header, sorted(name for name in header if name != "__metadata__"))
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return apply


def nan(folder: Path) -> None:
    """A number that is none."""
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + struct.pack("<f", float("nan")))


def link(folder: Path) -> None:
    """A link to somewhere else."""
    path = folder / "adapter_model.safetensors"
    path.rename(folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")


def fifo(folder: Path) -> None:
    """A pipe that nobody writes to."""
    (folder / "adapter_model.safetensors").unlink()
    os.mkfifo(folder / "adapter_model.safetensors")


def subfolder(folder: Path) -> None:
    """A folder where a file should be."""
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").mkdir()


def crowd(folder: Path) -> None:
    """Files without end."""
    for number in range(1100):
        (folder / f"x{number}").touch()


def weights(data: bytes) -> Callable[[Path], object]:
    """Other bytes as adapter_model.safetensors."""
    return lambda folder: (folder / "adapter_model.safetensors").write_bytes(data)


def twice(folder: Path) -> None:
    """One name, two tensors."""
    path = folder / "adapter_model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    text = data[8 : 8 + length].strip()
    text = text[:-1] + b"," + text[1:]
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def empties(header: dict[str, dict[str, object]], names: list[str]) -> None:
    """Very many tensors of nothing."""
    for number in range(200_000):
        header[f"x{number}"] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickle": (lambda folder: (folder / "adapter_model.bin").write_bytes(b"\x80"), "pickle"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "missing"),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "missing"),
    "link": (link, "link"),
    "config not json": (lambda folder: (folder / "adapter_config.json").write_text("{"), "not JSON"),
    "config deep": (lambda folder: (folder / "adapter_config.json").write_text("[" * 60000), "not JSON"),
    "config huge": (lambda folder: (folder / "adapter_config.json").write_text(" " * 70000 + "{}"), "bytes"),
    "config list": (lambda folder: (folder / "adapter_config.json").write_text("[]"), "not a JSON object"),
    "rank huge": (tamper_config(r=10**6), "r is 1000000"),
    "rank true": (tamper_config(r=True), "r is True"),
    "rank other": (tamper_config(r=5), "shape"),
    "alpha nan": (tamper_config(lora_alpha=float("nan")), "lora_alpha"),
    "alpha of 400 digits": (tamper_config(lora_alpha=10**400), "lora_alpha"),
    "alpha pattern of 400 digits": (tamper_config(alpha_pattern={"q_proj": 10**400}), "alpha_pattern"),
    "fifo": (fifo, "special"),
    "folder": (subfolder, "special"),
    "PICKLE": (lambda folder: (folder / "adapter_model.BIN").write_bytes(b"\x80"), "pickle"),
    "very many files": (crowd, "files"),
    "metadata": (tamper_header(lambda h, names: h.update(__metadata__={"format": {}})), "metadata"),
    "shape of floats": (tamper_header(lambda h, names: h[names[0]].update(shape=[4.0, 32.0])), "shape"),
    "header of spaces": (weights(struct.pack("<Q", 2**20) + b" " * 2**20), "claims|bytes"),
    "alpha text": (tamper_config(lora_alpha="1e3"), "lora_alpha"),
    "other method": (tamper_config(peft_type="IA3"), "peft_type"),
    "dora": (tamper_config(use_dora=True), "use_dora"),
    "activated": (tamper_config(alora_invocation_tokens=[5, 6]), "alora_invocation_tokens"),
    "layers again": (tamper_config(layer_replication=[[0, 1], [0, 1]]), "layer_replication"),
    "saved modules": (tamper_config(modules_to_save=["lm_head"]), "modules_to_save"),
    "rank pattern": (tamper_config(rank_pattern={".*": 512}), "rank_pattern"),
    "nan": (nan, "not finite"),
    "empty": (weights(b""), "shorter"),
    "header bomb": (weights(struct.pack("<Q", 2**60) + b"{}"), "claims"),
    "header not json": (weights(struct.pack("<Q", 2) + b"[["), "not JSON"),
    "no tensors": (weights(struct.pack("<Q", 2) + b"{}"), "no tensors"),
    "zip bomb": (weights(b"PK\x03\x04" + b"\0" * 100), "claims"),
    "twice": (twice, "twice"),
    "many empties": (tamper_header(empties), "bytes|claims|list of tensors"),
    "foreign name": (tamper_header(lambda h, names: h.update({"../../etc": h.pop(names[0])})), "no place"),
    "shape": (tamper_header(lambda h, names: h[names[0]].update(shape=[32, 4])), "shape"),
    "shape negative": (tamper_header(lambda h, names: h[names[0]].update(shape=[-4, -32])), "shape"),
    "dtype": (tamper_header(lambda h, names: h[names[0]].update(dtype="I64")), "dtype"),
    "overlap": (tamper_header(lambda h, names: h[names[1]].update(data_offsets=[0, 512])), "overlaps|gap"),
    "beyond": (tamper_header(lambda h, names: h[names[-1]].update(data_offsets=[2**40, 2**40 + 512])), "overlaps|gap"),
    "half a pair": (tamper_header(lambda h, names: h.pop(names[-1])), "belong to no tensor|beside"),
    "trailing": (
        lambda folder: weights((folder / "adapter_model.safetensors").read_bytes() + b"x")(folder),
        "no tensor",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_adapter_is_refused_in_words(folder: Path, llama_base: BaseModel, kind: str) -> None:
    """Quickly, before PEFT or safetensors sees it."""
    spoil, words = HOSTILE[kind]
    spoil(folder)
    start = time.monotonic()

    with pytest.raises(ArtifactRefused, match=words):
        read(folder, llama_base)

    assert time.monotonic() - start < 2


CONFIGS: dict[str, tuple[dict[str, object], str]] = {
    "code of its own": ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
    "modules that take a minute to match": ({"target_modules": "(a+)+$" * 20}, "target_modules"),
    "fewer modules than it holds": ({"target_modules": ["q_proj"]}, "target_modules"),
    "another alpha": ({"lora_alpha": 64}, "lora_alpha"),
    "another scale": ({"use_rslora": True}, "use_rslora"),
    "a path": ({"layer_replication": [[0, 4], [2, 5]]}, "layer_replication"),
    "a key nobody knows": ({"runtime_config": {}}, "runtime_config"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_configuration_says_what_the_recipe_on_record_makes_it_say(
    folder: Path, llama_base: BaseModel, kind: str
) -> None:
    """Of a version of ours it is rebuilt, and what the file says beside that goes to no library."""
    changes, words = CONFIGS[kind]
    recorded = [lora_of(recipe(targets=("q_proj", "v_proj")))]
    assert read_artifact(folder, llama_base, recorded).spec.scale == recorded[0].scale
    tamper_config(**changes)(folder)

    with pytest.raises(ArtifactRefused, match=words):
        read_artifact(folder, llama_base, recorded)


def test_an_adapter_holds_what_its_recipe_adapts(folder: Path, llama_base: BaseModel) -> None:
    """Tensors for other modules than the recipe on record names are somebody else's."""
    with pytest.raises(ArtifactRefused, match="set of modules"):
        read_artifact(folder, llama_base, [lora_of(recipe(targets=("o_proj",)))])


def test_an_adapter_of_another_base_is_refused(folder: Path, base: BaseModel, tmp_path: Path) -> None:
    """Shapes and names are the base's, not the file's."""
    save_file({"base_model.model.h.0.lora_A.weight": torch.zeros(4, 32)}, folder / "adapter_model.safetensors")

    with pytest.raises(ArtifactRefused, match="no place"):
        read(folder, base)


def test_random_damage_is_refused_or_harmless(folder: Path, llama_base: BaseModel) -> None:
    """Two hundred files with a few bytes changed: refused, or read as finite numbers of the right shapes."""
    generator = random.Random(0)
    path = folder / "adapter_model.safetensors"
    good = path.read_bytes()
    refused = 0
    for _ in range(200):
        data = bytearray(good)
        for _ in range(generator.randrange(1, 4)):
            data[generator.randrange(0, 1200)] = generator.randrange(256)
        path.write_bytes(bytes(data))
        try:
            read(folder, llama_base)
        except ArtifactRefused:
            refused += 1

    assert refused > 100
