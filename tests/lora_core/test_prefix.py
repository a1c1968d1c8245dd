"""Prefix tuning: with and without the MLP, we train, write and read what PEFT does."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from lora_core.artifact import write_artifact
from lora_core.banks.prefix import PREFIX, PrefixBank, keys_of
from lora_core.base_model import BaseModel, freeze
from lora_core.errors import TrainingError
from lora_core.intake import read_artifact
from lora_core.layers import compiled
from lora_core.learner import Learner
from lora_core.methods import PrefixSpec
from lora_core.recipe import Recipe
from lora_core.train import train
from tests.lora_core.conftest import ARCHITECTURES, T, examples, llama
from tests.lora_core.test_peft_parity import peft_loop
from tests.lora_core.test_virtual_tokens import logits_of, user, virtual

STEPS = 100


def prefix_spec(settings: Recipe) -> PrefixSpec:
    """A recipe's method, which is prefix tuning here."""
    assert isinstance(settings.method, PrefixSpec)
    return settings.method


def prefix_bank(base: BaseModel, *specs: PrefixSpec, size: int = 0) -> PrefixBank:
    """The bank of these users."""
    bank = PREFIX.make(base, specs, size)
    assert isinstance(bank, PrefixBank)
    return bank


def peft_model(model: PreTrainedModel, bank: PrefixBank, row_P: Tensor, spec: PrefixSpec) -> PeftModel:
    """The model under stock PEFT, its prefix and MLP starting where ours do."""
    config = PrefixTuningConfig(
        num_virtual_tokens=spec.virtual_tokens,
        prefix_projection=spec.projection,
        encoder_hidden_size=spec.projection_width,
        task_type="CAUSAL_LM",
    )
    made: PeftModel = get_peft_model(model, config)
    encoder, n, m = made.prompt_encoder["default"], spec.virtual_tokens, spec.projection_width or 0
    plain, *mlp = (piece[0].clone() for piece in bank.pieces(row_P[None]))
    encoder.embedding.weight.data = (mlp[0] if spec.projection else plain)[:n]
    if spec.projection:
        into, out = encoder.transform[0], encoder.transform[2]
        into.weight.data, into.bias.data = mlp[1][:m], mlp[2][:m]
        out.weight.data, out.bias.data = mlp[3][:m].mT.contiguous(), mlp[4]
    return made.eval()


@pytest.mark.parametrize("kind", ["prefix", "projected"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_100_steps_lose_what_a_plain_peft_loop_loses(architecture: str, kind: str) -> None:
    """Every loss within 1e-5, grouped queries too, beside a neighbour with more virtual tokens (and a wider MLP)."""
    settings = virtual(kind, epochs=25, schedule="cosine", warmup=0.1, weight_decay=0.01, learning_rate=3e-3)
    wider = {"encoder_hidden_size": 20} if kind == "projected" else {}
    neighbours = [user(7, kind, epochs=25), user(8, kind, num_virtual_tokens=11, **wider)]
    data, spec = examples(3, count=16), prefix_spec(settings)
    base = freeze(ARCHITECTURES[architecture](), None)
    bank = prefix_bank(base, spec, *(prefix_spec(one.recipe) for one in neighbours))
    theirs = peft_model(ARCHITECTURES[architecture]().eval(), bank, bank.start_row(spec, settings.seed), spec)

    expected = peft_loop(theirs, data, settings, STEPS)
    trained = {one.name: one for one in train(base, [*neighbours, Learner("me", settings, data)], 3, T, bank)}["me"]

    ours = [loss for _, loss in trained.losses]
    assert len(ours) == STEPS
    assert max(abs(a - b) for a, b in zip(ours, expected, strict=True)) < 1e-5
    saved = theirs.get_prompt_embedding_to_save("default")
    ended = bank.to_tensors(trained.row_P, spec)["prompt_embeddings"]
    torch.testing.assert_close(ended, saved.view_as(ended), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["prefix", "projected"])
def test_our_files_load_in_peft_with_equal_logits(base: BaseModel, tmp_path: Path, kind: str) -> None:
    """Stock PEFT, from the folder that is published; the MLP stays behind."""
    settings = virtual(kind)
    spec = prefix_spec(settings)
    bank = prefix_bank(base, spec, size=9)
    row_P = bank.start_row(spec, 2)
    for name, data in write_artifact(base, spec, bank.to_tensors(row_P, spec), {}).items():
        (tmp_path / name).write_bytes(data)
    tokens = torch.tensor([examples(5)[0].tokens])

    loaded = PeftModel.from_pretrained(ARCHITECTURES[base.name]().eval(), tmp_path)

    with torch.inference_mode():
        theirs = loaded(tokens).logits[0]
    torch.testing.assert_close(theirs, logits_of(base, bank, settings, row_P, tokens)[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["prefix", "projected"])
def test_pefts_files_load_here_with_equal_logits(base: BaseModel, tmp_path: Path, kind: str) -> None:
    """What `save_pretrained` writes: the prefix itself, whoever made it."""
    settings = virtual(kind)
    spec = prefix_spec(settings)
    maker = prefix_bank(base, spec)
    theirs = peft_model(ARCHITECTURES[base.name]().eval(), maker, maker.start_row(spec, 4), spec)
    theirs.save_pretrained(tmp_path)
    tokens = torch.tensor([examples(5)[0].tokens])

    files = read_artifact(tmp_path, base)

    assert isinstance(files.spec, PrefixSpec)
    bank = prefix_bank(base, files.spec, size=8)
    ours = logits_of(base, bank, settings, bank.from_tensors(files.tensors, files.spec), tokens)
    with torch.inference_mode():
        torch.testing.assert_close(theirs(tokens).logits[0], ours[1], atol=1e-5, rtol=1e-5)


def test_a_users_start_does_not_depend_on_the_bank(base: BaseModel) -> None:
    """The same prefix in a bank of more virtual tokens and of a wider MLP."""
    for kind in ("prefix", "projected"):
        spec, other = prefix_spec(virtual(kind)), prefix_spec(virtual("projected", encoder_hidden_size=20))
        narrow, wide = prefix_bank(base, spec), prefix_bank(base, spec, other, size=9)

        first, second = (bank.to_tensors(bank.start_row(spec, 1), spec) for bank in (narrow, wide))

        torch.testing.assert_close(first["prompt_embeddings"], second["prompt_embeddings"], atol=1e-6, rtol=0)


def test_what_peft_reads_off_a_grouped_query_base_we_do(llama_base: BaseModel) -> None:
    """Keys are as wide as the base's own, not as its queries."""
    spec = PrefixSpec(virtual_tokens=3)
    theirs = peft_model(
        ARCHITECTURES["llama"](), bank := prefix_bank(llama_base, spec), bank.start_row(spec, 0), spec
    ).peft_config["default"]

    ours = PREFIX.config(llama_base, spec, {})

    for key in ("token_dim", "num_attention_heads", "num_layers", "encoder_hidden_size"):
        assert ours[key] == getattr(theirs, key)
    assert keys_of(llama_base).token == 16


def test_a_base_whose_layers_keep_something_else_is_refused(
    llama_base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tried, not believed."""
    monkeypatch.setattr(llama_base.model.config, "num_key_value_heads", 4)

    with pytest.raises(TrainingError, match="do not keep keys and values"):
        prefix_bank(llama_base, PrefixSpec())


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch compiles for a CPU with a C++ compiler")
def test_many_layers_compile_to_one_graph() -> None:
    """Each has its own prefix, and the compiler takes no more than eight kinds of one layer."""
    model = llama()
    deep = type(model)(LlamaConfig(**{**model.config.to_diff_dict(), "num_hidden_layers": 10}))
    base, mine = freeze(deep, None), user(1, "prefix", epochs=1)
    bank = prefix_bank(base, prefix_spec(mine.recipe))
    (plain,) = train(base, [mine], 2, T, bank)

    with compiled(base):
        (fast,) = train(base, [mine], 2, T, bank)

    assert [loss for _, loss in fast.losses] == pytest.approx([loss for _, loss in plain.losses], abs=1e-4)
