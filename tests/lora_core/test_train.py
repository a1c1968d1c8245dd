"""Packing is an optimisation: who shares the GPU changes nobody's weights."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from lora_core.artifact import write_artifact
from lora_core.banks.bank import Bank
from lora_core.banks.lora import LoraBank
from lora_core.banks.table import make_bank
from lora_core.base_model import BaseModel
from lora_core.data.splits import newest
from lora_core.learner import Learner, Trained
from lora_core.train import Pace, train
from tests.lora_core.conftest import T, examples, learner, lora_of, recipe

K = 8


def run(base: BaseModel, learners: Sequence[Learner], slots: int = K, bank: Bank | None = None) -> dict[str, Trained]:
    """Train them packed; results by name."""
    return {trained.name: trained for trained in train(base, learners, slots, T, bank)}


def file_digest(base: BaseModel, trained: Trained, of: Learner, bank: Bank) -> str:
    """SHA-256 of the adapter_model.safetensors that would be published."""
    tensors = bank.to_tensors(trained.row_P, lora_of(of.recipe))
    files = write_artifact(base, of.recipe.method, tensors, {})
    return hashlib.sha256(files["adapter_model.safetensors"]).hexdigest()


def test_a_user_learns_the_same_adapter_with_0_3_and_7_neighbours(base: BaseModel) -> None:
    """The published file has the same SHA-256, dropout on, in whichever slot."""
    alice = learner(1)
    others = [learner(seed, count=seed + 3) for seed in range(2, 9)]
    bank = make_bank(base, [alice.recipe.method])

    digests = {
        file_digest(base, run(base, cohort, bank=bank)["user1"], alice, bank)
        for cohort in ([alice], [*others[:2], alice, others[2]], [*others, alice], [alice, *others])
    }

    assert len(digests) == 1


@pytest.mark.parametrize("seed", range(6))
def test_random_cohorts_change_nobody(llama_base: BaseModel, seed: int) -> None:
    """Mixed ranks, targets, layers, sizes, dropout, early stop and a waiting list: each user as if alone."""
    generator = random.Random(seed)
    mixed = [
        learner(
            100 * seed + number,
            count=generator.randrange(1, 14),
            held_out=generator.randrange(0, 6),
            rank=generator.choice([1, 3, 8]),
            dropout=generator.choice([0, 0.2]),
            targets=generator.choice(["all-linear", ("q_proj", "v_proj"), ("down_proj",)]),
            layers=generator.choice([None, (1,)]),
            patience=generator.choice([None, 1]),
            schedule=generator.choice(["constant", "linear", "cosine"]),
            batch_size=generator.choice([1, 4, 9]),
            weight_decay=generator.choice([0, 0.1]),
        )
        for number in range(9)
    ]
    bank = LoraBank(llama_base.sites, 8)

    packed = run(llama_base, mixed, slots=4, bank=bank)

    for one in generator.sample(mixed, 3):
        alone = run(llama_base, [one], slots=4, bank=bank)[one.name]
        assert torch.equal(alone.row_P, packed[one.name].row_P)
        assert (alone.losses, alone.held_out) == (packed[one.name].losses, packed[one.name].held_out)


def broken(kind: str) -> Learner:
    """A neighbour that no one would choose."""
    bad = learner(66, count=0 if kind == "empty" else 10, learning_rate=1e6 if kind == "rate" else 5e-3)
    return replace(bad, start=torch.full((1,), torch.nan)) if kind == "nan" else bad


@pytest.mark.parametrize("kind", ["nan", "rate", "empty"])
def test_a_broken_neighbour_changes_nobody(base: BaseModel, kind: str) -> None:
    """NaN weights, a rate of a million, no data: the others' bytes stay as they were, and it is retired."""
    bank = make_bank(base, [recipe().method])
    bad = broken(kind)
    if bad.start is not None:
        bad = replace(bad, start=bad.start.expand(bank.width))
    good = [learner(1), learner(2)]
    expected = run(base, good, bank=bank)

    found = run(base, [good[0], bad, good[1]], bank=bank)

    for one in good:
        assert torch.equal(found[one.name].row_P, expected[one.name].row_P)
    if kind != "rate":
        assert found["user66"].outcome == "retired"
        assert found["user66"].reason


def test_a_user_whose_numbers_overflow_is_retired_with_its_last_good_row(llama_base: BaseModel) -> None:
    """Weights that were finite before the step that would have broken them."""
    wild = learner(3, learning_rate=1e38, dropout=0, clip=1e30, schedule="constant", warmup=0)

    trained = run(llama_base, [wild, learner(1)])["user3"]

    assert trained.outcome == "retired"
    assert "not finite" in trained.reason
    assert trained.row_P.isfinite().all()


def test_slots_are_refilled_while_others_train(llama_base: BaseModel) -> None:
    """A short user makes room at once: nobody waits for the longest."""
    sizes = [40, 4, 4, 4, 4]
    seen: list[Pace] = []
    learners = [learner(number, count=size, batch_size=1) for number, size in enumerate(sizes)]

    order = [trained.name for trained in train(llama_base, learners, 2, T, watch=seen.append)]

    assert order == ["user1", "user2", "user3", "user4", "user0"]
    assert seen[-1].micro_steps <= 2 * 40 + 1
    assert seen[-1].finished == 5


def test_the_best_row_is_kept_and_a_user_that_no_longer_gains_stops(llama_base: BaseModel) -> None:
    """Early stop looks at held-out loss; step 0 is the base."""
    trained = run(llama_base, [learner(1, held_out=5, epochs=30, patience=2, learning_rate=2e-2)])["user1"]

    assert trained.outcome == "stopped early"
    steps, losses = zip(*trained.held_out, strict=True)
    assert trained.best_step == steps[losses.index(min(losses))]
    assert steps[0] == 0


def test_without_patience_the_last_row_is_the_result(llama_base: BaseModel) -> None:
    """And the planned steps are taken, no more."""
    trained = run(llama_base, [learner(1, held_out=5, patience=None, max_steps=3)])["user1"]

    assert (trained.steps, trained.best_step, trained.outcome, trained.held_out) == (3, 3, "finished", [])


def test_a_batch_over_several_rows_steps_as_one(llama_base: BaseModel) -> None:
    """Accumulating over rows gives the gradient of the whole batch."""
    data = examples(5, count=8)
    wide = recipe(batch_size=8, epochs=1, dropout=0, row_tokens=256, max_length=T)
    one = list(train(llama_base, [replace(learner(1), recipe=wide, train=data)], 1, 256))[0]
    many = list(train(llama_base, [replace(learner(1), recipe=wide, train=data)], 1, T))[0]

    assert len(one.losses) == len(many.losses) == 1
    assert one.losses[0][1] == pytest.approx(many.losses[0][1], abs=1e-5)
    torch.testing.assert_close(one.row_P, many.row_P, atol=1e-4, rtol=1e-3)


def test_a_budget_takes_the_newest_examples() -> None:
    """Equal token budgets make unequal users comparable."""
    data = examples(1, count=20)

    kept = newest(data, 60)

    assert kept == data[-len(kept) :]
    assert sum(len(one.tokens) for one in kept) <= 60
    assert newest(data, None) == data
