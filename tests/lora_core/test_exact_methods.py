"""Random packs of the other methods, and of settings at their bounds: the same bytes, or an end with a reason."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora_core.banks.table import make_bank
from lora_core.base_model import BaseModel, freeze
from lora_core.data.rendering import AnyRendered
from lora_core.learner import Learner, Trained
from lora_core.recipe import make_recipe
from lora_core.train import train
from tests.lora_core.conftest import T, examples, gpt2, llama, pairs
from tests.lora_core.doors import OneByOne
from tests.lora_core.killing import killed_and_resumed

PACKS, QUICK = 60, 6
SLOTS = (1, 2, 3, 5)
# What each method may be, and what any recipe may: with the bounds of every field, or what is near to them.
METHODS: dict[str, dict[str, list[object]]] = {
    "lora": {
        "rank": [1, 3, 64], "alpha": [1e-6, 16, 4096], "use_rslora": [True, False], "dropout": [0, 0.5, 0.999999],
        "loraplus_lr_ratio": [1, 16, 1024], "alpha_pattern": [{}, {"0.mlp.c_fc": 1e-6, "1.mlp.up_proj": 4096}],
    },
    "bottleneck": {
        "width": [1, 64], "reduction_factor": [None, 1, 1e9], "placement": ["houlsby", "pfeiffer"],
        "non_linearity": ["relu", "gelu", "silu"], "biases": [True, False], "dropout": [0, 0.99999],
        "layers": [None, [0], [1]],
    },
    "prompt_tuning": {"num_virtual_tokens": [1, 20, 64], "prompt_tuning_init": ["random", "sample_vocab"]},
    "prefix_tuning": {"num_virtual_tokens": [1, 20, 64], "prefix_projection": [True, False]},
}  # fmt: skip
ANY: dict[str, list[object]] = {
    "seed": [0, 2**31 - 1], "schedule": ["constant", "linear", "cosine"], "warmup": [0, 0.5, 0.999999],
    "learning_rate": [1e-30, 1e-4, 1e-2, 1.0, 1e30], "weight_decay": [0, 1], "beta1": [0, 0.9, 0.9999999],
    "beta2": [0, 0.999, 0.999999999], "epsilon": [1e-12, 1e-8, 1], "clip": [1e-6, 1, 1e300], "epochs": [1, 3],
    "max_steps": [None, 1, 1000], "batch_size": [1, 4, 4096], "batch_rows": [None, 1, 4096],
    "patience": [None, 1, 1000],
}  # fmt: skip
PAIRED: dict[str, list[object]] = {"objective": ["dpo"], "beta": [1e-6, 0.1, 100], "label_smoothing": [0, 0.4999]}


@pytest.fixture(scope="module")
def bases() -> list[BaseModel]:
    """One of each architecture, in fp32 and in bf16."""
    return [freeze(make().to(dtype), None) for make in (llama, gpt2) for dtype in (torch.float32, torch.bfloat16)]


def random_learner(draw: random.Random, name: str, method: str, base: BaseModel) -> Learner:
    """Any user of a method."""
    paired = draw.random() < 0.25
    fields = ANY | PAIRED if paired else ANY
    settings = {key: draw.choice(values) for key, values in (fields | METHODS[method]).items()}
    own = settings.get("alpha_pattern")
    if isinstance(own, dict):
        there = {end for end in own for site in base.sites if site.name.endswith(end)}
        settings["alpha_pattern"] = {end: own[end] for end in sorted(there)}
    recipe = make_recipe({"method": method, "row_tokens": T, "max_length": T, **settings})
    some: Callable[[int, int], tuple[AnyRendered, ...]] = pairs if paired else examples
    learnt, held_out = (some(draw.randrange(10**6), draw.choice(sizes)) for sizes in ((1, 3, 17), (0, 1, 9)))
    return Learner(name, recipe, learnt, held_out, priority=draw.randrange(2))


def facts(trained: Trained) -> tuple[object, ...]:
    """All of a result but its row, as text: NaN is not equal to itself."""
    return trained.outcome, trained.reason, trained.steps, str(trained.losses), str(trained.held_out)


@pytest.mark.parametrize(
    "pack", [pytest.param(pack, marks=[pytest.mark.long] if pack >= QUICK else []) for pack in range(PACKS)]
)
def test_any_settings_train_to_the_same_bytes_alone_packed_killed_and_resumed(
    bases: list[BaseModel], tmp_path: Path, pack: int
) -> None:
    """No row comes out that is not finite."""
    draw = random.Random(pack)
    base, method, slots = draw.choice(bases), draw.choice([*METHODS]), draw.choice(SLOTS)
    cohort = [random_learner(draw, f"user{number}", method, base) for number in range(draw.randrange(2, 5))]
    bank = make_bank(base, [one.recipe.method for one in cohort])
    middle, one = draw.randrange(1, len(cohort)), draw.choice(cohort)

    (alone,) = train(base, [one], slots, T, bank)
    packed = {one.name: one for one in train(base, cohort[:middle], slots, T, bank, door=OneByOne(cohort[middle:]))}
    resumed = killed_and_resumed(base, cohort, slots, bank, tmp_path, draw.randrange(1, 12), T)

    assert facts(alone) == facts(packed[one.name])
    assert torch.equal(alone.row_P, packed[one.name].row_P)
    for name, found in packed.items():
        assert found.row_P.isfinite().all()
        assert facts(found) == facts(resumed[name])
        assert torch.equal(found.row_P, resumed[name].row_P)
