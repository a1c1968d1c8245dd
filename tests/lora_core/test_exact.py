"""Two hundred random packs: whoever the neighbours are, wherever a user sat and was stopped, the same bytes."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from lora_core.banks.bank import Bank
from lora_core.banks.lora import LoraBank
from lora_core.base_model import BaseModel, freeze
from lora_core.data.rendering import AnyRendered
from lora_core.learner import Learner, Trained
from lora_core.objectives import ObjectiveSpec
from lora_core.train import train
from tests.lora_core.conftest import examples, gpt2, llama, lora_of, pairs, recipe
from tests.lora_core.doors import OneByOne
from tests.lora_core.killing import killed_and_resumed

PACKS, T = 200, 32


@pytest.fixture(scope="module")
def bases() -> dict[str, BaseModel]:
    """One of each architecture."""
    return {"llama": freeze(llama(), None, "llama"), "gpt2": freeze(gpt2(), None, "gpt2")}


def random_learner(generator: random.Random, name: str, base: BaseModel) -> Learner:
    """Any user: rank 1 to 64, any targets and layers, schedule, size, batches by examples or by rows, pairs or not."""
    ends = sorted({site.name.rpartition(".")[2] for site in base.sites})
    settings = recipe(
        seed=generator.randrange(1000),
        rank=generator.choice([1, 2, 8, 16, 64]),
        alpha=generator.choice([1, 16, 100]),
        use_rslora=generator.random() < 0.3,
        dropout=generator.choice([0, 0.1, 0.5]),
        targets=generator.choice(["all-linear", tuple(generator.sample(ends, 2))]),
        layers=generator.choice([None, (0,), (1,)]),
        schedule=generator.choice(["constant", "linear", "cosine"]),
        learning_rate=generator.choice([1e-4, 1e-2]),
        weight_decay=generator.choice([0, 0.1]),
        epochs=generator.randrange(1, 4),
        patience=generator.choice([None, 1]),
        batch_size=generator.choice([1, 4, 9]),
        batch_rows=generator.choice([None, 1, 3]),
        row_tokens=T,
        max_length=T,
    )
    some: Callable[[int, int], tuple[AnyRendered, ...]] = examples
    if generator.random() < 0.25:
        some, objective = pairs, ObjectiveSpec(name="dpo", beta=generator.choice([0.05, 0.5]))
        settings = settings.model_copy(update={"objective": objective})
    held_out = some(generator.randrange(10**6), generator.choice([0, 1, 3, 12]))
    size = generator.choice([1, 3, 9, 20])
    return Learner(name, settings, some(generator.randrange(10**6), size), held_out, priority=generator.randrange(2))


def run(
    base: BaseModel,
    now: Sequence[Learner],
    slots: int,
    bank: Bank,
    later: Sequence[Learner] = (),
) -> dict[str, Trained]:
    """Train some at once and let others arrive one by one."""
    return {one.name: one for one in train(base, now, slots, T, bank, door=OneByOne(later))}


@pytest.mark.parametrize(
    "pack", [pytest.param(pack, marks=[pytest.mark.long] if pack >= PACKS // 2 else []) for pack in range(PACKS)]
)
def test_a_user_is_the_same_alone_packed_taken_aside_killed_and_resumed(
    bases: dict[str, BaseModel], tmp_path: Path, pack: int
) -> None:
    """Rows, losses and held-out losses, to the bit, at the same number of slots and row length."""
    generator = random.Random(pack)
    base = bases[generator.choice(["llama", "gpt2"])]
    slots = generator.choice([1, 2, 4, 8])
    cohort = [random_learner(generator, f"user{number}", base) for number in range(generator.randrange(2, 8))]
    bank = LoraBank(base.sites, max(lora_of(one.recipe).rank for one in cohort))
    middle = generator.randrange(1, len(cohort))
    one = generator.choice(cohort)

    alone = run(base, [one], slots, bank)[one.name]
    packed = run(base, cohort[:middle], slots, bank, cohort[middle:])[one.name]
    resumed = killed_and_resumed(base, cohort, slots, bank, tmp_path, generator.randrange(1, 12), T)[one.name]

    for other in (packed, resumed):
        assert torch.equal(alone.row_P, other.row_P)
        assert (alone.losses, alone.held_out, alone.outcome) == (other.losses, other.held_out, other.outcome)
