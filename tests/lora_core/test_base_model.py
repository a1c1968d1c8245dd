"""The shared base: loaded once, frozen, pinned by its bytes."""

import json
import os
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lora_core.base_files import count_parameters, fingerprint
from lora_core.base_model import BaseModel, freeze, load_base, outline
from lora_core.data.packing import pack
from lora_core.data.rendering import IGNORED
from lora_core.decoding import end_tokens
from lora_core.errors import BaseModelError, BaseUnfit, DeviceMissing
from lora_core.forward import token_losses
from tests.lora_core.conftest import ARCHITECTURES, WORDS, T, examples

SMALL = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny Llama and a tokenizer, saved as Hugging Face does."""
    ARCHITECTURES[getattr(request, "param", "llama")]().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("folder", ["llama", "gpt2"], indirect=True)
def test_a_folder_is_loaded_frozen_and_pinned(folder: Path) -> None:
    """fp32 on CPU, no gradient, no dropout, every linear but the head a site."""
    base = load_base(str(folder))

    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not base.model.training
    assert base.model.dtype == torch.float32
    assert len(base.sites) == (14 if "Llama" in type(base.model).__name__ else 8)
    assert base.digest == fingerprint(folder) == load_base(str(folder)).digest
    assert base.parameters <= count_parameters(folder) <= base.parameters * 1.2  # tied heads may be stored


def test_one_changed_weight_is_another_base(folder: Path) -> None:
    """The name alone pins nothing."""
    before = fingerprint(folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})

    assert fingerprint(folder) != before


def test_a_copy_elsewhere_is_the_same_base(folder: Path, tmp_path: Path) -> None:
    """What is digested is content."""
    shutil.copytree(folder, tmp_path / "copy")

    assert fingerprint(tmp_path / "copy") == fingerprint(folder)


def test_a_place_without_a_base_has_no_fingerprint(tmp_path: Path) -> None:
    """Nothing is mounted there, or the disk is broken: jobs would be made that nobody can do."""
    with pytest.raises(BaseModelError, match="no safetensors weights"):
        fingerprint(tmp_path)
    os.symlink("/proc/self/mem", tmp_path / "model.safetensors")  # reading it is an input/output error
    with pytest.raises(BaseModelError, match="cannot be read"):
        fingerprint(tmp_path)


def test_pickled_weights_are_never_opened(folder: Path) -> None:
    """A pickle can run code."""
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.")

    with pytest.raises(BaseModelError, match="safetensors"):
        load_base(str(folder))


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c", "no such id!", "", "x" * 300])
def test_a_base_that_is_none_is_told(name: str) -> None:
    """What to give instead."""
    with pytest.raises(BaseModelError, match="folder or a Hugging Face id"):
        load_base(name)


def test_a_hub_id_without_a_hub_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what to check."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    with pytest.raises(BaseModelError, match="HF_HUB_OFFLINE"):
        load_base("nobody/nothing")


@pytest.mark.parametrize("damage", ["config", "weights", "tokenizer"])
def test_a_broken_folder_is_told(folder: Path, damage: str) -> None:
    """In one line, from whichever library."""
    {"config": folder / "config.json", "weights": folder / "model.safetensors", "tokenizer": folder / "tokenizer.json"}[
        damage
    ].write_text("{")

    with pytest.raises(BaseModelError) as caught:
        load_base(str(folder))

    assert "\n" not in str(caught.value)


def test_weights_that_are_none_are_told_before_anything_is_loaded(folder: Path) -> None:
    """By the name of the file: a base of several may have one that was cut off."""
    (folder / "model.safetensors").write_bytes(b"junk")

    with pytest.raises(BaseModelError, match=r"model\.safetensors is no safetensors file"):
        count_parameters(folder)


@pytest.mark.parametrize("device", ["bogus", "cuda:99", "cpu:1:2"])
def test_a_device_that_is_none_is_told(folder: Path, device: str) -> None:
    """With the variable that names it."""
    with pytest.raises(DeviceMissing, match=f"{device}.*LORA_DEVICE"):
        load_base(str(folder), device=device)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize(("architecture", "kind"), [("llama", "sdpa"), ("gemma2", "eager")])
def test_attention_is_fused_where_it_can_be(
    architecture: str, kind: str, key: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Gemma 2 caps its attention, and is loaded all the same; what a config.json asks for needs not be installed."""
    {**ARCHITECTURES, "gemma2": capped}[architecture]().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: "flash_attention_2"}))

    base, known = load_base(str(tmp_path)), outline(tmp_path)

    assert base.model.config._attn_implementation == known.model.config._attn_implementation == kind


def test_an_attention_with_tables_of_its_own_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """GPT-Neo's are as long as its positions, and a packed row may be longer."""
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
    GPTNeoForCausalLM(GPTNeoConfig(vocab_size=WORDS, max_position_embeddings=128, **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    with pytest.raises(BaseUnfit, match="of an older kind, whose tables end"):
        load_base(str(tmp_path))


def test_weights_that_stay_in_fp8_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers leaves them on a GPU that multiplies them itself: a scale beside each is not in its linear."""
    model = ARCHITECTURES["llama"]()
    weight = model.get_submodule("model.layers.0.mlp.up_proj").get_parameter("weight")
    weight.data = weight.data.to(torch.float8_e4m3fn)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: model)

    with pytest.raises(BaseModelError, match="stay in fp8"):
        load_base(str(folder))


def capped() -> Gemma2ForCausalLM:
    """Caps its logits softly."""
    return Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=5.0))


def scaled() -> CohereForCausalLM:
    """Scales its logits."""
    return CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25))


@pytest.mark.parametrize("make", [capped, scaled, *ARCHITECTURES.values()])
def test_losses_are_the_models_own_whatever_its_head_does(make: Callable[[], PreTrainedModel]) -> None:
    """The fused loss is used only where trying it showed that it is right."""
    torch.manual_seed(0)
    base: BaseModel = freeze(make(), None)
    one = examples(1)[0]
    row = pack([(0, one)], T)[0]

    losses_KT, _ = token_losses(base, base.stack([row]))

    with torch.inference_mode():
        logits = base.model(torch.tensor([one.tokens])).logits[0, :-1]
    wanted = torch.where(torch.tensor(one.trained), torch.tensor(one.tokens), IGNORED)[1:]
    expected = cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="none")
    torch.testing.assert_close(losses_KT[0, : len(expected)], expected, atol=1e-5, rtol=1e-4)
    assert base.plain_head == (make in ARCHITECTURES.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 256])
def test_a_head_is_plain_at_every_width(width: int, dtype: torch.dtype) -> None:
    """Two libraries' products differ in their last bits where rows are long: that is no scale or cap."""
    sizes = SMALL | {"vocab_size": 4096, "hidden_size": width, "num_hidden_layers": 1}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=dtype)

    assert freeze(model, None).plain_head


def test_a_base_from_the_hub_ends_its_answers_as_its_makers_say(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their word is in a file of its own, which no digest depends on."""
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        there = shutil.copytree(folder, folder.with_name("hub"))
        for path in there.iterdir():
            if not any(fnmatch(path.name, pattern) for pattern in allow_patterns):
                path.unlink()
        return str(there)

    monkeypatch.setattr("lora_core.base_files.snapshot_download", download)

    base = load_base("makers/base")

    assert {3, 4} <= set(end_tokens(base) or ())
    assert base.digest == fingerprint(folder)
