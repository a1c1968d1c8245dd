"""Odd widths, odd lengths of rows, attention in steps: wherever a user's numbers lie, they have the same bits."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    XGLMConfig,
    XGLMForCausalLM,
)

from lora_core.banks.table import make_bank
from lora_core.base_model import freeze
from lora_core.cohort import Cohort
from lora_core.data.packing import pack
from lora_core.data.rendering import AnyRendered
from lora_core.height import Lowest, least_height
from lora_core.learner import Learner, Lesson
from lora_core.lower_layers import LowerLayers
from lora_core.methods import AnyMethod, BottleneckSpec, LoraSpec, PrefixSpec, PromptSpec
from lora_core.micro_step import backward_rows
from lora_core.recipe import make_recipe
from lora_core.row_store import RowMemory, RowStore
from lora_core.train import train
from tests.lora_core.conftest import WORDS, examples, pairs

K = 4
METHODS: dict[str, AnyMethod] = {
    "lora": LoraSpec(rank=3, dropout=0.1), "adapter": BottleneckSpec(width=3, placement="houlsby"),
    "prompt": PromptSpec(virtual_tokens=5), "prefix": PrefixSpec(virtual_tokens=5),
    "prefix from an MLP": PrefixSpec(virtual_tokens=5, projection=True, projection_width=7),
}  # fmt: skip


def odd(attention: str = "sdpa") -> PreTrainedModel:
    """No width is even a multiple of four."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=30, intermediate_size=37, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=3, max_position_embeddings=128, attn_implementation=attention,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def in_steps() -> PreTrainedModel:
    """Its widths are even, and its attention multiplies tokens by tokens."""
    torch.manual_seed(0)
    sizes = {"d_model": 48, "ffn_dim": 64, "num_layers": 2, "attention_heads": 3, "max_position_embeddings": 128}
    return XGLMForCausalLM(XGLMConfig(vocab_size=WORDS, **sizes))


def with_powers() -> PreTrainedModel:
    """Its norms raise numbers to the power of -1/2, whose gradient rounds otherwise at the end of a tensor."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "head_dim": 16, "global_head_dim": 16, "hidden_size_per_layer_input": 16,
             "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip
    words = {"vocab_size": WORDS, "vocab_size_per_layer_input": WORDS, "max_position_embeddings": 128}
    return Gemma4ForCausalLM(Gemma4TextConfig(**words, **sizes))


BASES: dict[str, Callable[[], PreTrainedModel]] = {
    "odd": odd,
    "in steps": in_steps,
    "both": partial(odd, "eager"),
    "powers": with_powers,
}


@pytest.mark.parametrize("threads", [1], indirect=True)
@pytest.mark.parametrize("row_tokens", [33, 50])
@pytest.mark.parametrize(
    ("kind", "method"),
    [(kind, method) for kind in BASES for method in METHODS if kind != "powers" or method in ("lora", "prefix")],
)
@pytest.mark.usefixtures("threads")
def test_a_row_has_the_same_bits_in_every_slot(kind: str, method: str, row_tokens: int) -> None:
    """Its answer and its gradient; in lower batches too."""
    base = freeze(BASES[kind](), None, "odd")
    spec = METHODS[method]
    bank = make_bank(base, [spec])
    rows = [pack([(0, one)], row_tokens)[0] for one in examples(1, K)]
    lessons = [Lesson(row, 1.0, spec.dropout, number) for number, row in enumerate(rows)]

    def read(users: list[int]) -> list[tuple[Tensor, Tensor]]:
        cohort = Cohort(K, bank.width, base.model.device, base.model.dtype)
        for slot, user in enumerate(users):
            noise_P = torch.randn(bank.width, generator=torch.Generator().manual_seed(user)) / 50
            cohort.admit(slot, noise_P, spec.scale)
        with Lowest(base, bank, cohort) as lowest:
            part = lowest.slots(max(len(users), least_height(base, K)))
            idle = [None] * (part.slots - len(users))
            answers = backward_rows(base, part, [*(lessons[user] for user in users), *idle], row_tokens)
        return [(answers[slot], cohort.gradient_KP[slot]) for slot in range(len(users))]

    packed = read(list(range(K)))
    for users in ([3, 2, 1, 0], [1, 2, 3, 0], [2], [1, 3], [0, 3, 2]):
        for user, found in zip(users, read(users), strict=True):
            assert all(map(torch.equal, found, packed[user]))


@pytest.mark.parametrize("settings", [{}, {"objective": "dpo"}, {"layers": [1], "batch_rows": 2}], ids=str)
@pytest.mark.parametrize("threads", [1], indirect=True)
@pytest.mark.usefixtures("threads")
def test_users_of_an_odd_base_train_to_the_same_bytes(settings: dict[str, object]) -> None:
    """Pairs too, and with lower states kept."""
    base, tokens = freeze(odd(), None, "odd"), 33
    asked = {"rank": 3, "dropout": 0.1, "epochs": 2, "batch_size": 3, "row_tokens": tokens, "max_length": tokens}
    recipe = make_recipe({**asked, "learning_rate": 1e-2, "patience": 1, **settings})
    some: Callable[[int, int], tuple[AnyRendered, ...]] = pairs if recipe.objective.paired else examples
    users = [Learner(f"user{number}", recipe, some(number, 7), some(10 + number, 3)) for number in range(K)]
    bank = make_bank(base, [recipe.method])
    kept = LowerLayers(base, bank, RowStore(RowMemory(1 << 20), lambda: 0.0))

    alone = [next(train(base, [one], K, tokens, bank)) for one in users]
    packed = {one.name: one for one in train(base, users, K, tokens, bank, compute=kept.read_rows)}

    for one in alone:
        assert torch.equal(one.row_P, packed[one.name].row_P)
        assert (one.losses, one.held_out) == (packed[one.name].losses, packed[one.name].held_out)
