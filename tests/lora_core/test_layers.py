"""Compiled layers: what the others learn, up to rounding, and to the bit whoever shares the cohort."""

import hashlib
import shutil
from collections.abc import Sequence

import pytest
import torch

from lora_core.banks.bank import Bank
from lora_core.banks.table import make_bank
from lora_core.base_model import BaseModel
from lora_core.curriculum import Learner, Trained
from lora_core.errors import TrainingError
from lora_core.layers import checkpointed, compiled, decoder_layers
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
