"""Compiled layers: what the others learn, up to rounding, and to the bit whoever shares the cohort."""

import copy
import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from lora_core.banks.bank import Bank
from lora_core.banks.table import make_bank
from lora_core.base_model import BaseModel, freeze
from lora_core.cohort import Cohort
from lora_core.data.packing import pack
from lora_core.errors import TrainingError
from lora_core.layers import checkpointed, compiled, decoder_layers
from lora_core.learner import Learner, Lesson, Trained
from lora_core.micro_step import read_rows
from lora_core.train import train
from tests.lora_core.conftest import T, learner

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="torch compiles for a CPU with a C++ compiler")

SLOTS = 3


def trained(base: BaseModel, learners: Sequence[Learner], bank: Bank) -> dict[str, Trained]:
    """Everybody trained in one cohort, by name."""
    return {one.name: one for one in train(base, learners, SLOTS, T, bank)}


def digest(one: Trained) -> str:
    """SHA-256 of a row."""
    return hashlib.sha256(one.row_P.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("base", ["gpt2", pytest.param("llama", marks=pytest.mark.long)], indirect=True)
def test_compiled_layers_learn_the_same(base: BaseModel) -> None:
    """Losses as without; equal bytes alone, among neighbours who also wait for a slot, and with checkpointing."""
    mine = learner(1)
    others = [learner(seed, count=6, rank=2) for seed in range(2, 6)]
    bank = make_bank(base, [mine.recipe.method])
    before = dict(base.model.named_modules())

    plain = trained(base, [mine], bank)[mine.name]
    with compiled(base):
        alone = trained(base, [mine], bank)[mine.name]
        packed = trained(base, [*others, mine], bank)[mine.name]
        with checkpointed(base):
            forgetful = trained(base, [mine], bank)[mine.name]

    assert [loss for _, loss in alone.losses] == pytest.approx([loss for _, loss in plain.losses], abs=1e-4)
    assert digest(alone) == digest(packed) == digest(forgetful)
    assert digest(alone) != digest(plain)  # another program really ran
    assert dict(base.model.named_modules()) == before
    assert not any("forward" in vars(layer) for layer in decoder_layers(base))


def test_what_cannot_be_compiled_is_refused_with_the_reason(
    llama_base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never half compiled in silence: the bytes would depend on it."""
    layer = decoder_layers(llama_base)[0]
    own = layer.forward

    def breaking(*inputs: object, **named: object) -> object:
        torch._dynamo.graph_break()
        return own(*inputs, **named)

    monkeypatch.setattr(layer, "forward", breaking)

    with pytest.raises(TrainingError, match="cannot be compiled.*unset LORA_COMPILE"), compiled(llama_base):
        trained(llama_base, [learner(1)], make_bank(llama_base, [learner(1).recipe.method]))


@pytest.mark.long
def test_more_kinds_of_layers_than_were_allowed_for_are_refused_too(
    llama_base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To learn from and to examine are two."""
    monkeypatch.setattr("lora_core.layers.KINDS", 1)
    one = learner(1, count=4, held_out=2, epochs=1, patience=1)

    with pytest.raises(TrainingError, match="cannot be compiled.*unset LORA_COMPILE"), compiled(llama_base):
        trained(llama_base, [one], make_bank(llama_base, [one.recipe.method]))


@pytest.mark.parametrize("compiles", [False, True])
def test_an_examined_rows_loss_has_the_same_bits_whoever_is_beside_it(llama_base: BaseModel, compiles: bool) -> None:
    """In bf16 too, and in the slots of learners, who are never read in the same micro-step."""
    base = freeze(copy.deepcopy(llama_base.model).to(torch.bfloat16), llama_base.tokenizer)
    examined = [Lesson(pack([(0, one)], T)[0], 0.0, 0.0, 0) for one in learner(1, count=16).train]
    bank = make_bank(base, [learner(1).recipe.method])
    cohort = Cohort(2, bank.width, base.model.device, base.model.dtype)
    for slot in range(2):
        row_P = torch.randn(bank.width, generator=torch.Generator().manual_seed(slot)) / 10
        cohort.admit(slot, row_P, 2.0)

    with compiled(base, compiles), bank.attached(base, cohort):
        for one, another in pairwise(examined):
            (alone, _), (beside, _) = (read_rows(base, cohort, [one, other], T) for other in (None, another))
            cohort.borrow(0, 1)
            _, lent = read_rows(base, cohort, [another, one], T)
            cohort.give_back()
            assert alone == beside == lent
        with pytest.raises(AssertionError):
            read_rows(base, cohort, [examined[0], replace(examined[1], weight=1.0)], T)
