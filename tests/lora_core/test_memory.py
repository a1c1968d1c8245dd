"""The memory law: what a pack will take is known before its first step."""

import random
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch

from benchmarks.memory_law import Setting, error_of, make_base, measured, random_setting
from benchmarks.memory_law import compare as compare_peaks
from lora_core.banks import lora_sites
from lora_core.banks.lora import lora_bank
from lora_core.banks.lora_products import sums
from lora_core.base_model import BaseModel
from lora_core.layers import checkpointed, decoder_layers
from lora_core.memory import predict
from lora_core.train import Pace, train
from tests.lora_core.conftest import T, learner, lora_of, recipe


@pytest.mark.long
def test_the_predicted_peak_is_the_measured_one_within_a_quarter_of_a_percent() -> None:
    """Random architectures, sizes, slots, row lengths, ranks, targets and dropout, against torch's own profiler."""
    generator = random.Random(7)

    settings = [replace(random_setting(generator, layers=3), lends=number % 2 == 1) for number in range(30)]
    results = [compare_peaks(setting, "cpu") for setting in settings]

    assert max(abs(error_of(result)) for result in results) < 0.0025


def test_predicting_leaves_the_base_as_it_was(base: BaseModel) -> None:
    """The same modules, weights and outputs; nothing without data stays behind."""
    bank = lora_bank(base, [lora_of(recipe())])
    modules, tokens = dict(base.model.named_modules()), torch.arange(8)[None]
    before = base.model(input_ids=tokens).logits

    predict(base, bank, 2, T, drops=True, layers_forget=True)

    assert dict(base.model.named_modules()) == modules
    assert torch.equal(base.model(input_ids=tokens).logits, before)


def test_checkpointing_takes_less_memory_where_layers_are_many(llama_base: BaseModel) -> None:
    """Really, not only in the prediction."""
    plain = Setting("llama", 4, 4, 8, 64, 4, "all-linear", 0.0, False)
    forgetful = Setting("llama", 4, 4, 8, 64, 4, "all-linear", 0.0, True)
    base = make_base(plain, "cpu")
    bank = lora_bank(base, [plain.spec])

    assert measured(base, bank, forgetful) < 0.6 * measured(base, bank, plain)


def test_a_checkpointed_layer_is_not_computed_again_to_its_end(
    llama_base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last wide products of a layer are needed by nobody in the backward pass: four groups, then three again."""
    micro_steps: list[Pace] = []
    counted = Mock(side_effect=sums)
    monkeypatch.setattr(lora_sites, "sums", counted)

    with checkpointed(llama_base):
        list(train(llama_base, [learner(1, held_out=0, patience=None)], 1, T, watch=micro_steps.append))

    assert counted.call_count == 7 * len(decoder_layers(llama_base)) * len(micro_steps)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_checkpointing_changes_no_byte(base: BaseModel, dropout: float) -> None:
    """Rows, losses and held-out losses are those of training without; masks come out the same the second time."""
    learners = [learner(seed, held_out=3, patience=2, dropout=dropout) for seed in (1, 2, 3)]
    plain = {trained.name: trained for trained in train(base, learners, 2, T)}

    with checkpointed(base):
        forgetful = {trained.name: trained for trained in train(base, learners, 2, T)}

    for name, trained in plain.items():
        assert torch.equal(trained.row_P, forgetful[name].row_P)
        assert (trained.losses, trained.held_out) == (forgetful[name].losses, forgetful[name].held_out)
    assert not any("forward" in vars(layer) for layer in decoder_layers(base))
