"""What only a GPU can show.  Elsewhere all of it is skipped."""

import copy
import hashlib

import pytest
import torch

from lora_core.banks.table import make_bank
from lora_core.base_model import BaseModel, freeze
from lora_core.learner import Learner
from lora_core.memory import predict
from lora_core.micro_step import Replay, read_rows
from lora_core.train import Compute, train
from tests.lora_core.conftest import T, learner, recipe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
K = 4


@pytest.fixture
def gpu_base(llama_base: BaseModel) -> BaseModel:
    """The small base in bf16 on the GPU."""
    return freeze(copy.deepcopy(llama_base.model).to("cuda", torch.bfloat16), llama_base.tokenizer)


def users(dropout: float = 0.0) -> list[Learner]:
    """Of several sizes, examined on the way; more than there are slots."""
    return [learner(seed, held_out=2, patience=3, dropout=dropout, epochs=4) for seed in range(K + 2)]


def rows(base: BaseModel, learners: list[Learner], compute: Compute | None = None) -> dict[str, str]:
    """SHA-256 of everybody's row."""
    bank = make_bank(base, [recipe().method])
    trained = train(base, learners, K, T, bank, compute=compute)
    return {one.name: hashlib.sha256(one.row_P.numpy().tobytes()).hexdigest() for one in trained}


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_row_has_the_same_bytes_alone_and_packed(gpu_base: BaseModel, dropout: float) -> None:
    """In bf16, whoever the others are."""
    together = rows(gpu_base, users(dropout))

    assert together == {name: digest for one in users(dropout) for name, digest in rows(gpu_base, [one]).items()}


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_cuda_graph_gives_the_bytes_of_its_kernels(gpu_base: BaseModel, dropout: float) -> None:
    """Recorded once, played for everybody who comes after; and it is really recorded."""
    replay = Replay()

    assert rows(gpu_base, users(dropout), replay) == rows(gpu_base, users(dropout), read_rows)
    assert {learns for learns, _ in replay._recorded} == {True, False}


def test_the_peak_is_the_predicted_one(gpu_base: BaseModel) -> None:
    """Within a hundredth, workspaces included."""
    bank = make_bank(gpu_base, [recipe().method])
    predicted = predict(gpu_base, bank, K, T, drops=False)
    torch.cuda.reset_peak_memory_stats()

    rows(gpu_base, users())

    assert abs(torch.cuda.max_memory_allocated() / predicted - 1) < 0.01
