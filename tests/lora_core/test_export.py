"""An adapter in another engine's files computes what it computes here."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

from lora_core.artifact import write_artifact
from lora_core.banks.lora import LoraBank, lora_bank
from lora_core.base_model import BaseModel, freeze, load_base, outline
from lora_core.errors import ExportRefused
from lora_core.export import Delta, deltas, merge, stored_dtype, write_gguf, write_merged
from lora_core.intake import read_artifact
from lora_core.methods import LoraSpec
from tests.lora_core.conftest import ARCHITECTURES, CHATML, WORDS, examples, lora_of, make_tokenizer, recipe
from tests.lora_core.test_peft_parity import our_logits, random_row, seeing

SMALL = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 8,
}  # fmt: skip
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    **ARCHITECTURES,
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, tie_word_embeddings=True)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SMALL)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL)),
    "gemma3": seeing,
    "gemma3_text": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SMALL)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SMALL, pad_token_id=0)),
}
# What llama.cpp calls the linears of a layer, from its own tables, written down here once more.
NAMES = {
    "llama": {
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    },
    "phi3": {
        "attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj", "ffn_up": "mlp.gate_up_proj",
        "ffn_down": "mlp.down_proj",
    },
    "gpt2": {"attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
}  # fmt: skip
TOKENS = torch.tensor([examples(5)[0].tokens])


def made(name: str) -> PreTrainedModel:
    """A tiny model, the same every time."""
    torch.manual_seed(0)
    return MODELS[name]().eval()


def adapted(base: BaseModel, folder: Path, **settings: object) -> tuple[dict[str, Delta], Tensor]:
    """A random adapter of a base, by way of its files, and the logits that it gives here."""
    spec = lora_of(recipe(**settings))
    bank = lora_bank(base, [spec])
    row_P = random_row(bank, spec)
    _write(base, bank, spec, row_P, folder)
    files = read_artifact(folder, base)
    return deltas(files), our_logits(base, bank, row_P, spec.scale, TOKENS)


def _write(base: BaseModel, bank: LoraBank, spec: LoraSpec, row_P: Tensor, folder: Path) -> None:
    tensors = bank.to_tensors(row_P, spec)
    folder.mkdir()
    for name, data in write_artifact(base, spec, tensors, {}).items():
        (folder / name).write_bytes(data)


def apply_gguf(path: Path, model: PreTrainedModel) -> dict[str, object]:
    """Add a GGUF adapter to a model as llama.cpp would, by transformers' own reading of its layout; the file's keys."""
    reader = gguf.GGUFReader(path)
    keys = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    processor = TENSOR_PROCESSORS.get(str(keys["general.architecture"]), TensorProcessor)(model.config.to_dict())
    for name in {name.rpartition(".lora_")[0] for name in tensors}:
        down_RI, up_OR = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        change = up_OR @ down_RI * (keys["adapter.lora.alpha"] / up_OR.shape[1])  # llama_adapter_lora_weight::get_scale
        read = processor.process(change.numpy(), name=name).weights
        _, layer, what, _ = name.split(".")
        names = NAMES.get(str(keys["general.architecture"]), NAMES["llama"])
        layers = model.get_decoder().h if names is NAMES["gpt2"] else model.get_decoder().layers
        weight = layers[int(layer)].get_submodule(names[what]).weight
        with torch.no_grad():
            weight += torch.from_numpy(read.copy())
    return keys


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("architecture", [*MODELS])
def test_a_gguf_adapter_gives_the_adapters_logits(architecture: str, rslora: bool, tmp_path: Path) -> None:
    """Read back and applied: names, the order of queries' and keys' rows, and the scale are llama.cpp's."""
    base, other = freeze(made(architecture), None), made(architecture)
    found, ours = adapted(base, tmp_path / "adapter", use_rslora=rslora)

    write_gguf(tmp_path / "adapter.gguf", base.model.config, found)
    keys = apply_gguf(tmp_path / "adapter.gguf", other)

    with torch.inference_mode():
        torch.testing.assert_close(other(TOKENS).logits, ours, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(base.model(TOKENS).logits, ours, atol=1e-3)
    assert (keys["general.type"], keys["adapter.type"]) == ("adapter", "lora")
    assert keys["general.architecture"] == {"mistral": "llama", "gemma3_text": "gemma3"}.get(architecture, architecture)
    assert keys["adapter.lora.alpha"] == pytest.approx(16 if rslora else 8)  # rank 4, alpha 8: 8 / sqrt(4) * 4


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_gguf_adapters_shapes_are_those_that_llama_cpp_checks(architecture: str, tmp_path: Path) -> None:
    """A weight of O x I takes lora_a of R x I and lora_b of O x R; it refuses any other."""
    base = freeze(made(architecture), None)
    found, _ = adapted(base, tmp_path / "adapter")

    write_gguf(tmp_path / "adapter.gguf", base.model.config, found)

    shapes = {one.name: one.data.shape for one in gguf.GGUFReader(tmp_path / "adapter.gguf").tensors}
    wide = ("blk.1.ffn_down.weight", 56 if architecture == "llama" else 128)
    assert shapes[f"{wide[0]}.lora_a"] == (4, wide[1])
    assert shapes[f"{wide[0]}.lora_b"] == (32, 4)
    assert len(shapes) == 2 * len(base.sites)


def test_deltas_of_different_scales_share_one_alpha(llama_base: BaseModel, tmp_path: Path) -> None:
    """The file has room for one; the others' share goes into their factors."""
    found, _ = adapted(llama_base, tmp_path / "adapter")
    last = [*found][-1]
    found[last] = replace(found[last], scale=7.0)
    merged, other = made("llama"), made("llama")

    write_gguf(tmp_path / "adapter.gguf", llama_base.model.config, found)
    apply_gguf(tmp_path / "adapter.gguf", other)
    merge(freeze(merged, None), found)

    torch.testing.assert_close(other(TOKENS).logits, merged(TOKENS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_linears_with_ranks_and_alphas_of_their_own_are_exported_at_their_own_scale(
    architecture: str, rslora: bool, tmp_path: Path
) -> None:
    """Patterns of ranks, of alphas, of both at once: merged and as GGUF."""
    names = {"llama": ("q_proj", "down_proj", "o_proj"), "gpt2": ("c_attn", "c_fc", "1.mlp.c_proj")}[architecture]
    patterns = {"rank_pattern": {names[0]: 2, names[1]: 3}, "alpha_pattern": {names[1]: 30, names[2]: 1}}
    base, other, merged = (made(architecture) for _ in range(3))
    found, ours = adapted(freeze(base, None), tmp_path / "adapter", use_rslora=rslora, **patterns)

    write_gguf(tmp_path / "adapter.gguf", base.config, found)
    apply_gguf(tmp_path / "adapter.gguf", other)
    merge(freeze(merged, None), found)

    for model in (other, merged):
        torch.testing.assert_close(model(TOKENS).logits, ours, atol=2e-5, rtol=1e-5)


def test_the_same_adapter_is_the_same_gguf_file(llama_base: BaseModel, tmp_path: Path) -> None:
    """Byte by byte."""
    found, _ = adapted(llama_base, tmp_path / "adapter")

    for name in ("one", "two"):
        write_gguf(tmp_path / name, llama_base.model.config, found)

    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_an_architecture_that_llama_cpp_is_not_known_to_name_is_refused(tmp_path: Path) -> None:
    """Rather than written by guesses."""
    config = GPTNeoXConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=56, num_hidden_layers=1, num_attention_heads=4
    )
    base = freeze(GPTNeoXForCausalLM(config), None)
    found, _ = adapted(base, tmp_path / "adapter")

    with pytest.raises(ExportRefused, match="'gpt_neox' is not known here; known are llama, mistral"):
        write_gguf(tmp_path / "adapter.gguf", config, found)

    assert not (tmp_path / "adapter.gguf").exists()


def save(model: PreTrainedModel, folder: Path) -> Path:
    """A base on disk."""
    model.save_pretrained(folder)
    make_tokenizer(CHATML).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("architecture", [*MODELS])
def test_sites_are_known_without_loading_weights(architecture: str, tmp_path: Path) -> None:
    """The architecture alone, whatever the base's size."""
    folder = save(made(architecture), tmp_path / "base")

    known = outline(folder)

    base = load_base(str(folder))
    assert all(parameter.is_meta for parameter in known.model.parameters())
    assert [replace(site, reads=0) for site in known.sites] == [replace(site, reads=0) for site in base.sites]


@pytest.mark.parametrize("architecture", [*MODELS])
def test_merged_weights_give_the_adapters_logits(architecture: str, tmp_path: Path) -> None:
    """From a folder that transformers loads, tokenizer included."""
    folder = save(made(architecture), tmp_path / "base")
    base = load_base(str(folder))
    found, ours = adapted(base, tmp_path / "adapter", use_rslora=True)

    merge(base, found)
    (tmp_path / "merged").mkdir()
    write_merged(tmp_path / "merged", base, folder)

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.inference_mode():
        torch.testing.assert_close(loaded(TOKENS).logits, ours, atol=1e-5, rtol=1e-5)
    tokenizers = [AutoTokenizer.from_pretrained(where) for where in (folder, tmp_path / "merged")]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    assert tokenizers[0].chat_template == tokenizers[1].chat_template


@pytest.mark.parametrize(
    "advice", ['{"eos_token_id": [2, 5], "temperature": 0.6, "do_sample": true}', '{"top_p": 0.9}']
)
def test_merged_weights_keep_what_the_bases_makers_advise(advice: str, tmp_path: Path) -> None:
    """Which tokens end an answer is not in its config alone; the second contradicts itself, as several hubs' do."""
    folder = save(made("llama"), tmp_path / "base")
    (folder / "generation_config.json").write_text(advice)
    base = load_base(str(folder))

    (tmp_path / "merged").mkdir()
    write_merged(tmp_path / "merged", base, folder)

    assert (tmp_path / "merged" / "generation_config.json").read_text() == advice
    assert base.model.generation_config.eos_token_id == ([2, 5] if "eos" in advice else None)


def test_a_base_of_16_bits_is_merged_in_32_and_kept_in_16(tmp_path: Path) -> None:
    """As large as it was; each weight is the right one, rounded once."""
    folder = save(made("llama").to(torch.bfloat16), tmp_path / "base")
    base = load_base(str(folder), dtype=stored_dtype(folder))
    before = base.model.get_submodule("model.layers.0.mlp.up_proj").weight.clone()
    found, _ = adapted(base, tmp_path / "adapter")

    merge(base, found)

    delta = found["model.layers.0.mlp.up_proj"]
    expected = (before.float() + delta.scale * delta.up_OR @ delta.down_RI).to(torch.bfloat16)
    assert torch.equal(base.model.get_submodule("model.layers.0.mlp.up_proj").weight, expected)


def test_a_quantised_base_is_not_merged_into(llama_base: BaseModel, tmp_path: Path) -> None:
    """Its weights would be rounded again, and the adapter would be one for another base."""
    found, _ = adapted(llama_base, tmp_path / "adapter")

    with pytest.raises(ExportRefused, match="4bit weights plus a delta would be rounded"):
        merge(replace(llama_base, quantised="4bit"), found)
