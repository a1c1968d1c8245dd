"""The yardstick: full fine-tuning is what a plain loop makes of the same lessons."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from benchmarks.measuring import profiled_peak
from lora_core.base_model import BaseModel, freeze
from lora_core.data.packing import epoch_batches, pack
from lora_core.errors import TrainingError
from lora_core.full_tuning import adamw, backward, predict_full, step_all, trainable, tune_fully
from lora_core.learner import Learner, Lesson
from lora_core.optim import RowStep, rate_at
from lora_core.recipe import Recipe
from lora_core.train import train
from tests.lora_core.conftest import ARCHITECTURES, T, examples, pairs, recipe
from tests.lora_core.test_peft_parity import padded

STEPS = 20


def plain_loop(model: PreTrainedModel, learner: Learner) -> list[float]:
    """transformers' own loss, PyTorch's AdamW, one padded batch a step."""
    settings, data = learner.recipe, learner.train
    optimiser = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=settings.weight_decay)
    losses: list[float] = []
    for epoch in range(settings.epochs):
        for batch in epoch_batches(len(data), settings.batch_size, settings.seed, epoch):
            tokens, mask, labels = padded([text for index in batch for text in data[index].documents])
            loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            optimiser.param_groups[0]["lr"] = rate_at(settings, len(losses) + 1, STEPS)
            optimiser.step()
            optimiser.zero_grad()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_20_steps_lose_what_a_plain_loop_loses(architecture: str) -> None:
    """Every loss within 1e-5, tied heads and learnt positions included."""
    settings = recipe(dropout=0, epochs=5, batch_size=4, learning_rate=1e-3, schedule="cosine", weight_decay=0.01)
    learner = Learner("me", settings, examples(3, count=16))
    base = freeze(ARCHITECTURES[architecture](), None)

    ours = tune_fully(base, learner, T)

    expected = plain_loop(ARCHITECTURES[architecture]().eval(), learner)
    assert len(expected) == ours.steps == STEPS
    assert max(abs(a - b) for (_, a), b in zip(ours.losses, expected, strict=True)) < 1e-5
    assert ours.parameters == base.parameters


def test_it_is_examined_and_stopped_as_a_packed_user_is(base: BaseModel) -> None:
    """Before the first step both know only the base, and the same batches follow."""
    settings = recipe(dropout=0, epochs=6, learning_rate=5e-2, patience=2)
    learner = Learner("me", settings, examples(3), examples(4, count=4))

    full = tune_fully(base, learner, T)
    (packed,) = train(base, [learner], 1, T)

    assert full.held_out[0] == pytest.approx(packed.held_out[0], abs=1e-5)
    assert full.losses[0] == pytest.approx(packed.losses[0], abs=1e-5)
    assert full.outcome == "stopped early"
    assert full.held_out_loss == min(loss for _, loss in full.held_out)


def test_the_base_stays_as_it_was(base: BaseModel) -> None:
    """Others train on it."""
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}

    tune_fully(base, Learner("me", recipe(learning_rate=1e-2), examples(3)), T, layers_forget=True)

    assert all(torch.equal(tensor, before[name]) for name, tensor in base.model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_forgetting_layers_changes_no_loss(base: BaseModel) -> None:
    """It only takes less memory."""
    learner = Learner("me", recipe(dropout=0), examples(3))

    assert tune_fully(base, learner, T).losses == tune_fully(base, learner, T, layers_forget=True).losses


def test_what_is_not_finite_ends_it_with_the_reason(base: BaseModel) -> None:
    """An absurd rate."""
    found = tune_fully(base, Learner("me", recipe(learning_rate=1e30, epochs=3), examples(3)), T)

    assert found.outcome == "retired"
    assert "not finite" in found.reason


def test_a_quantised_base_is_refused(base: BaseModel) -> None:
    """Its weights are codes, not numbers that could take a step."""
    with pytest.raises(TrainingError, match="4bit cannot be trained"):
        tune_fully(replace(base, quantised="4bit"), Learner("me", recipe(), examples(3)), T)


def test_pairs_are_refused(base: BaseModel) -> None:
    """Its base changes with it: nothing would be left to measure against."""
    with pytest.raises(TrainingError, match="objective dpo is not fully tuned"):
        tune_fully(base, Learner("me", recipe(objective="dpo"), pairs(3)), T)


def two_steps(base: BaseModel) -> Callable[[], None]:
    """What the peak is the peak of, on a copy that is there already."""
    twin = trainable(base)
    row = pack([(0, examples(3)[0]), (1, examples(4)[0])], T)[0]

    def run() -> None:
        optimiser = adamw(twin)
        for _ in range(2):
            backward(twin, Lesson(row, 1.0, 0.0, 0))
            step_all(optimiser, RowStep(1, 0.0, Recipe()))

    return run


def test_the_predicted_peak_is_the_measured_one(base: BaseModel) -> None:
    """Weights, gradients, two moments and a micro-step, against torch's own profiler."""
    predicted = predict_full(base, T)

    measured = profiled_peak(two_steps(base)) + sum(p.nbytes for p in base.model.parameters())

    assert predicted == pytest.approx(measured, rel=0.01)
