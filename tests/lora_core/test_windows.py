"""Bases some of whose layers look only so far back: longer documents are read as the base reads them alone."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Exaone4Config,
    Gemma2Config,
    Gemma3TextConfig,
    MistralConfig,
    Olmo3Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Starcoder2Config,
)

from lora_core.banks.lora import lora_bank
from lora_core.banks.table import make_bank
from lora_core.base_model import BaseModel, freeze
from lora_core.batch import Windows, as_batch, fields_of
from lora_core.data.packing import Row, pack
from lora_core.data.rendering import Rendered
from lora_core.forward import token_losses
from lora_core.learner import Learner
from lora_core.recipe import make_recipe
from lora_core.serving import Adapter, Request, Server
from lora_core.train import train
from tests.lora_core.conftest import WORDS, T, examples, lora_of, recipe
from tests.lora_core.test_peft_parity import random_row

WINDOW = 12
SMALL = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "sliding_window": WINDOW,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BY_LAYER = SMALL | {"layer_types": ["sliding_attention", "full_attention"]}
WINDOWED = [
    Cohere2Config(**BY_LAYER), Exaone4Config(**BY_LAYER), Gemma2Config(**BY_LAYER, head_dim=8),
    Gemma3TextConfig(**BY_LAYER, head_dim=8), MistralConfig(**SMALL), Olmo3Config(**BY_LAYER), Phi3Config(**SMALL),
    Qwen2Config(**BY_LAYER, use_sliding_window=True), Starcoder2Config(**SMALL),
]  # fmt: skip
GEMMA3 = WINDOWED[3]


def frozen(config: PreTrainedConfig) -> BaseModel:
    """A random base of a configuration."""
    torch.manual_seed(0)
    return freeze(AutoModelForCausalLM.from_config(config), None, "tiny")


def long(seed: int, tokens: int = 3 * WINDOW) -> Rendered:
    """A document three windows long."""
    one = examples(seed, 1, 90)[0].tokens * tokens
    return Rendered(one[:tokens], (True,) * tokens)


def losses(base: BaseModel, rows: list[Row], windows: Windows) -> Tensor:
    """Each token's, K T, as if the base's layers looked so far."""
    batch = as_batch(fields_of(rows, base.model.device), base.model.dtype, windows)
    return token_losses(base, batch)[0].detach()


@pytest.mark.parametrize("config", WINDOWED, ids=lambda config: type(config).__name__.removesuffix("Config"))
def test_a_long_document_reads_in_a_row_as_alone(config: PreTrainedConfig) -> None:
    """Behind another document, in which there are tokens that a window's width alone would not hide."""
    base, one = frozen(config), long(1)
    before = examples(2, 1, 20)[0]
    rows = pack([(0, before), (1, one)], 2 * T)
    first = len(before.tokens)

    mine = losses(base, rows, base.windows)[0, first : first + len(one.tokens) - 1]

    with torch.inference_mode():
        logits = base.model(torch.tensor([one.tokens]), use_cache=False).logits[0, :-1].float()
    expected = cross_entropy(logits, torch.tensor(one.tokens[1:]), reduction="none")
    torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)
    unlimited = losses(base, rows, None)[0, first : first + len(one.tokens) - 1]
    assert torch.allclose(unlimited[: WINDOW - 1], expected[: WINDOW - 1], atol=1e-5)
    assert not torch.allclose(unlimited, expected, atol=1e-3)
    assert base.longest == 128


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("method", ["lora", "bottleneck", "prompt_tuning", "prefix_tuning"])
def test_a_user_learns_the_same_alone_and_beside_long_documents(method: str) -> None:
    """Every method; virtual tokens must be seen from a document's end, so they leave it less room."""
    base = frozen(GEMMA3)
    settings = make_recipe(
        {"method": method, "learning_rate": 1e-2, "row_tokens": T, "max_length": T, "epochs": 2, "patience": None}
        | ({"virtual_tokens": 4} if "tuning" in method else {})
    )
    room = min(T, base.room(settings.method.positions))
    users = [Learner(f"user{n}", settings, tuple(long(10 * n + k, room) for k in range(3))) for n in range(3)]
    bank = make_bank(base, [settings.method])

    (alone,) = train(base, users[:1], 2, T, bank)
    packed = {one.name: one for one in train(base, users, 2, T, bank)}["user0"]

    assert room == (WINDOW - 4 if "tuning" in method else T)
    assert torch.equal(alone.row_P, packed.row_P)
    assert alone.losses == packed.losses
    assert alone.losses[-1][1] < alone.losses[0][1]


@pytest.mark.usefixtures("one_thread")
def test_answers_to_long_prompts_are_the_bases_own_and_each_alone() -> None:
    """The prompt of three windows; in a batch of several users and the base."""
    base, spec = frozen(GEMMA3), lora_of(recipe())
    bank = lora_bank(base, [spec])
    rows = {f"user{seed}": random_row(bank, spec, seed) for seed in range(2)}
    prompt = list(long(3).tokens)
    asked = [Request(name, prompt[-n:], 20) for name, n in (("user0", 36), (None, 36), ("user1", 30), ("user1", 5))]

    def server() -> Server:
        return Server(base, bank, 4, lambda name: Adapter(rows[name], spec.scale))

    together = server().answer(asked)

    assert together == [server().answer([one])[0] for one in asked]
    with torch.inference_mode():
        own = base.model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=0)
    answer = own[0, len(prompt) :].tolist()
    assert together[1] == [token for token in answer if token != 2]  # the end is not part of it
