"""Prompt tuning: how users start, and that we train, write and read what PEFT does."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import Gemma4ForCausalLM, Gemma4TextConfig, PreTrainedModel

from lora_core.artifact import write_artifact
from lora_core.banks.prompt import PROMPT
from lora_core.banks.table import make_bank
from lora_core.base_model import BaseModel, freeze
from lora_core.errors import TrainingError
from lora_core.intake import read_artifact
from lora_core.learner import Learner
from lora_core.methods import PromptSpec
from lora_core.train import train
from tests.lora_core.conftest import ARCHITECTURES, WORDS, T, examples, llama, make_tokenizer
from tests.lora_core.test_peft_parity import peft_loop
from tests.lora_core.test_virtual_tokens import logits_of, user, virtual

STEPS = 100


def peft_model(model: PreTrainedModel, own_ND: Tensor) -> PeftModel:
    """The model under stock PEFT, its virtual tokens starting where ours do."""
    config = PromptTuningConfig(num_virtual_tokens=len(own_ND), task_type="CAUSAL_LM")
    made: PeftModel = get_peft_model(model, config)
    made.prompt_encoder["default"].embedding.weight.data = own_ND.clone()
    return made.eval()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_100_steps_lose_what_a_plain_peft_loop_loses(architecture: str) -> None:
    """Every loss within 1e-5, beside neighbours with more and fewer virtual tokens, several documents in a row."""
    settings = virtual("prompt", epochs=25, schedule="cosine", warmup=0.1, weight_decay=0.01)
    data, spec = examples(3, count=16), settings.method
    base = freeze(ARCHITECTURES[architecture](), None)
    neighbours = [user(7, "prompt", epochs=25), user(8, "prompt", num_virtual_tokens=11)]
    bank = make_bank(base, [spec, *(one.recipe.method for one in neighbours)])
    start = bank.to_tensors(bank.start_row(spec, settings.seed), spec)["prompt_embeddings"]

    theirs = peft_model(ARCHITECTURES[architecture]().eval(), start)
    expected = peft_loop(theirs, data, settings, STEPS)
    trained = {one.name: one for one in train(base, [*neighbours, Learner("me", settings, data)], 3, T, bank)}["me"]

    ours = [loss for _, loss in trained.losses]
    assert len(ours) == STEPS
    assert max(abs(a - b) for a, b in zip(ours, expected, strict=True)) < 1e-5
    ended = bank.to_tensors(trained.row_P, spec)["prompt_embeddings"]
    torch.testing.assert_close(ended, theirs.prompt_encoder["default"].embedding.weight.data, atol=2e-4, rtol=1e-3)


def test_our_files_load_in_peft_with_equal_logits(base: BaseModel, tmp_path: Path) -> None:
    """Stock PEFT, from the folder that is published."""
    settings = virtual("prompt")
    bank = make_bank(base, [settings.method], 9)
    row_P = bank.start_row(settings.method, 2)
    for name, data in write_artifact(base, settings.method, bank.to_tensors(row_P, settings.method), {}).items():
        (tmp_path / name).write_bytes(data)
    tokens = torch.tensor([examples(5)[0].tokens])

    loaded = PeftModel.from_pretrained(ARCHITECTURES[base.name]().eval(), tmp_path)

    with torch.inference_mode():
        theirs = loaded(tokens).logits[0, 5:]
    torch.testing.assert_close(theirs, logits_of(base, bank, settings, row_P, tokens)[1], atol=1e-5, rtol=1e-5)


def test_pefts_files_load_here_with_equal_logits(base: BaseModel, tmp_path: Path) -> None:
    """What `save_pretrained` writes, read by us into a bank of more virtual tokens."""
    theirs = peft_model(ARCHITECTURES[base.name]().eval(), torch.randn(5, 32))
    theirs.save_pretrained(tmp_path)
    tokens = torch.tensor([examples(5)[0].tokens])

    files = read_artifact(tmp_path, base)

    bank = make_bank(base, [files.spec], 8)
    ours = logits_of(base, bank, virtual("prompt"), bank.from_tensors(files.tensors, files.spec), tokens)
    with torch.inference_mode():
        torch.testing.assert_close(theirs(tokens).logits[0, 5:], ours[1], atol=1e-5, rtol=1e-5)


def test_a_text_start_is_the_texts_embeddings_as_often_as_they_fit() -> None:
    """Repeated and cut, as PEFT does."""
    tokenizer = make_tokenizer(None)
    model = llama()
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    base, text = freeze(model, tokenizer), "the quick brown fox"
    spec = PromptSpec(virtual_tokens=9, start="text", start_text=text)
    ids = tokenizer(text)["input_ids"]

    row_P = PROMPT.make(base, [spec], 12).start_row(spec, 0)

    wanted = model.get_input_embeddings()(torch.tensor((ids * 9)[:9]))
    assert 0 < len(ids) < 9
    assert torch.equal(row_P.view(12, -1)[:9], wanted)
    assert not row_P.view(12, -1)[9:].any()


@pytest.mark.parametrize(("tokens", "why"), [([], "makes nothing"), ([1, WORDS], "no embedding for a token")])
def test_a_text_that_is_no_token_is_refused_before_its_user_joins_a_cohort(tokens: list[int], why: str) -> None:
    """A tokenizer may make nothing of it: that is told as the bank is made, which is tried for each user alone."""
    base = freeze(llama(), lambda text: {"input_ids": tokens}, "llama")
    spec = PromptSpec(start="text", start_text=" ")

    with pytest.raises(TrainingError, match=why):
        PROMPT.make(base, [spec], 0)


def test_a_vocabulary_start_takes_the_bases_own_embeddings(llama_base: BaseModel) -> None:
    """By the seed; and the same in a wider bank."""
    spec = PromptSpec(virtual_tokens=4)
    vocabulary = {tuple(row) for row in llama_base.model.get_input_embeddings().weight.tolist()}
    narrow, wide = (PROMPT.make(llama_base, [spec], size) for size in (0, 9))

    rows = narrow.start_row(spec, 1).view(4, -1)

    assert {tuple(row) for row in rows.tolist()} <= vocabulary
    assert torch.equal(rows, wide.start_row(spec, 1).view(9, -1)[:4])
    assert not torch.equal(rows, narrow.start_row(spec, 2).view(4, -1))


def test_a_random_start_is_as_far_from_zero_as_pefts(llama_base: BaseModel) -> None:
    """torch's own for embeddings: a standard deviation of 1."""
    spec = PromptSpec(virtual_tokens=100, start="random")

    row_P = PROMPT.make(llama_base, [spec], 0).start_row(spec, 1)

    assert float(row_P.std()) == pytest.approx(1.0, abs=0.05)


def test_a_base_that_reads_more_of_a_token_than_its_embedding_is_refused() -> None:
    """Gemma 4 looks up what else it reads by the token, and a virtual one is none."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "head_dim": 16, "global_head_dim": 16, "num_kv_shared_layers": 0,
             "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip
    words = {"vocab_size": WORDS, "vocab_size_per_layer_input": WORDS}
    for more in (0, 16):
        config = Gemma4TextConfig(**words, **sizes, hidden_size_per_layer_input=more)
        base = freeze(Gemma4ForCausalLM(config), None, "gemma4")
        if more:
            with pytest.raises(TrainingError, match="gemma4: reads more of a token than its embedding"):
                make_bank(base, [PromptSpec()])
        else:
            make_bank(base, [PromptSpec()])
