"""A micro-step computes no more slots than are read in, and nobody's bytes are others for it."""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lora_core.banks.table import make_bank
from lora_core.base_model import BaseModel, freeze
from lora_core.cohort import Cohort
from lora_core.data.packing import pack
from lora_core.height import Lowest, least_height
from lora_core.layers import compiled
from lora_core.learner import Learner, Lesson, Trained
from lora_core.methods import AnyMethod, BottleneckSpec, LoraSpec, PrefixSpec
from lora_core.micro_step import backward_rows
from lora_core.optim import gradient_norms
from lora_core.train import Pace, train
from tests.lora_core.conftest import T, examples, learner

K = 8
METHODS: dict[str, AnyMethod] = {
    "lora": LoraSpec(rank=2, dropout=0.1), "adapter": BottleneckSpec(), "prefix": PrefixSpec(),
}  # fmt: skip


@pytest.fixture(scope="module")
def wide() -> BaseModel:
    """A base wide enough for MKL to share one product among threads."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=200, intermediate_size=352, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=128,
    )  # fmt: skip
    return freeze(LlamaForCausalLM(config), None, "wide")


@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
@pytest.mark.parametrize("method", METHODS)
def test_a_row_has_the_same_bits_in_a_lower_batch(wide: BaseModel, threads: int, method: str) -> None:
    """Its answer, gradient and norm, down to the least height, which for K rows on fewer threads is less than K."""
    bank = make_bank(wide, [METHODS[method]])
    rows = [pack([(0, example)], 48)[0] for example in examples(1, K)]
    lessons = [Lesson(row, 1.0, 0.1, number) for number, row in enumerate(rows)]

    def read(height: int) -> tuple[Tensor, Tensor, Tensor]:
        cohort = Cohort(K, bank.width, wide.model.device, wide.model.dtype)
        for slot in range(K):
            cohort.admit(slot, torch.randn(bank.width, generator=torch.Generator().manual_seed(slot)) / 50, 2.0)
        with Lowest(wide, bank, cohort) as lowest:
            part = lowest.slots(height)
            answers = backward_rows(wide, part, lessons[:height], 48)
        assert not cohort.gradient_KP[height:].any()
        return answers, cohort.gradient_KP[:height], gradient_norms(part)

    whole = read(K)
    least = least_height(wide, K)
    assert least == threads
    for height in range(least, K):
        for found, expected in zip(read(height), whole, strict=True):
            assert torch.equal(found, expected[:height])


def test_where_the_number_of_rows_chooses_the_kernel_all_are_computed(llama_base: BaseModel) -> None:
    """As in bf16, and in layers that are compiled for one shape."""
    assert least_height(llama_base, 64) == torch.get_num_threads()
    with compiled(llama_base):
        assert least_height(llama_base, 64) == 64
    assert least_height(replace(llama_base, model=llama_base.model.to(torch.bfloat16)), 64) == 64


@pytest.mark.parametrize("seed", range(2))
def test_users_train_to_the_same_bytes_in_lower_batches(
    base: BaseModel, threads: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Users of many sizes, who leave gaps in the slots: whoever sits above one moves down, and less is computed."""
    generator = random.Random(seed)
    users = [
        learner(
            number, count=generator.randrange(1, 16), held_out=generator.randrange(0, 6), dropout=0.1,
            batch_size=generator.choice([1, 4]), patience=1,
        )
        for number in range(9)
    ]  # fmt: skip

    low, room = trained(base, users)
    monkeypatch.setattr("lora_core.train.least_height", lambda _, slots: slots)
    high, most = trained(base, users)

    assert room < most
    for name, one in high.items():
        assert torch.equal(low[name].row_P, one.row_P)
        assert low[name].held_out == one.held_out


def trained(base: BaseModel, users: Sequence[Learner]) -> tuple[dict[str, Trained], int]:
    """What became of each, and how many tokens were computed."""
    rooms: list[int] = []

    def watch(pace: Pace) -> None:
        rooms.append(pace.room)

    found = {one.name: one for one in train(base, users, K, T, watch=watch)}
    return found, rooms[-1]
