"""Virtual tokens before a row: what prompt and prefix tuning guarantee alike."""

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

from benchmarks.memory_law import Setting, make_base, measured
from lora_core.artifact import write_artifact
from lora_core.banks.bank import Bank
from lora_core.banks.table import make_bank
from lora_core.base_model import BaseModel, freeze
from lora_core.cohort import Cohort
from lora_core.data.packing import pack
from lora_core.errors import ArtifactRefused, RecipeError, TrainingError
from lora_core.evaluate import Asked, Trial, evaluate, evaluate_all
from lora_core.forward import token_losses
from lora_core.generate import generate
from lora_core.intake import read_artifact
from lora_core.layers import checkpointed, compiled
from lora_core.learner import Learner, Trained
from lora_core.lower_layers import LowerLayers
from lora_core.memory import predict
from lora_core.recipe import Recipe, make_recipe
from lora_core.row_store import RowMemory, RowStore
from lora_core.saves import Saves
from lora_core.train import train
from tests.lora_core.conftest import ARCHITECTURES, T, examples, gpt2, llama, make_tokenizer
from tests.lora_core.killing import killed_and_resumed
from tests.lora_core.test_peft_parity import opt

KINDS: dict[str, dict[str, object]] = {
    "prompt": {"method": "prompt_tuning"},
    "prefix": {"method": "prefix_tuning"},
    "projected": {"method": "prefix_tuning", "prefix_projection": True, "encoder_hidden_size": 12},
}
SLOTS = 3


def virtual(kind: str, **settings: object) -> Recipe:
    """A recipe of one of the kinds for these tests: five virtual tokens, short rows, quick steps."""
    defaults: dict[str, object] = {
        "num_virtual_tokens": 5, "learning_rate": 2e-2, "epochs": 2, "batch_size": 4, "row_tokens": T,
        "max_length": T, "patience": None,
    }  # fmt: skip
    return make_recipe({**defaults, **KINDS[kind], **settings})


def user(seed: int, kind: str, count: int = 10, held_out: int = 0, **settings: object) -> Learner:
    """A user of its own."""
    recipe = virtual(kind, seed=seed, **settings)
    return Learner(f"user{seed}", recipe, examples(seed, count), examples(seed + 1000, held_out))


def bank_of(base: BaseModel, learners: Sequence[Learner], size: int = 0) -> Bank:
    """The bank that holds them all."""
    return make_bank(base, [one.recipe.method for one in learners], size)


def run(
    base: BaseModel, learners: Sequence[Learner], bank: Bank, slots: int = SLOTS, saves: Saves | None = None
) -> dict[str, Trained]:
    """Train them packed; results by name."""
    return {one.name: one for one in train(base, learners, slots, T, bank, saves=saves)}


def logits_of(base: BaseModel, bank: Bank, settings: Recipe, row_P: Tensor, tokens: Tensor) -> Tensor:
    """What the base says with this row in slot 1 of 3, and without one in the others."""
    cohort = Cohort(SLOTS, bank.width, base.model.device, base.model.dtype)
    cohort.admit(1, row_P, settings.method.scale)
    with bank.attached(base, cohort), torch.inference_mode():
        logits: Tensor = base.model(tokens.expand(SLOTS, -1)).logits
    return logits


def same(one: Trained, other: Trained) -> bool:
    """Row, losses, held-out losses and outcome, to the bit."""
    facts = [(trained.losses, trained.held_out, trained.outcome) for trained in (one, other)]
    return torch.equal(one.row_P, other.row_P) and facts[0] == facts[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_cleared_slot_is_the_base(base: BaseModel, kind: str) -> None:
    """Up to the rounding of a longer sum of which the added terms are zero; and its neighbour is adapted."""
    settings = virtual(kind)
    bank = make_bank(base, [settings.method], 9)
    tokens = torch.tensor([examples(1)[0].tokens])

    logits = logits_of(base, bank, settings, bank.start_row(settings.method, 1), tokens)

    with torch.inference_mode():
        plain = base.model(tokens).logits[0]
    torch.testing.assert_close(logits[0], plain, atol=1e-6, rtol=0)
    assert torch.equal(logits[0], logits[2])
    assert not torch.allclose(logits[1], plain, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_detaching_gives_the_base_back(base: BaseModel, kind: str) -> None:
    """No hook stays behind, also after an error."""
    bank = bank_of(base, [user(1, kind)])
    tokens = torch.tensor([examples(1)[0].tokens])
    before = base.model(tokens).logits

    with pytest.raises(KeyError), bank.attached(base, Cohort(1, bank.width, base.model.device, base.model.dtype)):
        raise KeyError

    assert torch.equal(base.model(tokens).logits, before)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_of_a_row_see_the_virtual_tokens_and_not_each_other(base: BaseModel, kind: str) -> None:
    """One copy serves all: each loses what it loses alone in a row."""
    settings, data = virtual(kind), examples(4, count=3, longest=14)
    bank = make_bank(base, [settings.method], 7)
    cohort = Cohort(1, bank.width, base.model.device, base.model.dtype)
    cohort.admit(0, bank.start_row(settings.method, 3), settings.method.scale)

    with bank.attached(base, cohort), torch.inference_mode():
        together_KT, _ = token_losses(base, base.stack(pack(list(enumerate(data)), T)))
        alone = [token_losses(base, base.stack(pack([(0, one)], T)))[0][0, : len(one.tokens)] for one in data]

    torch.testing.assert_close(together_KT[0, : sum(map(len, alone))], torch.cat(alone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_lies_beyond_a_users_own_tokens_stays_zero(base: BaseModel, kind: str) -> None:
    """No masks on gradients are needed, also with weight decay, and in a bank with a wider MLP."""
    small = user(1, kind, num_virtual_tokens=2, weight_decay=0.1)
    wide = user(2, kind, **({"encoder_hidden_size": 20} if kind == "projected" else {}))
    bank = bank_of(base, [small, wide])

    trained = run(base, [small], bank)[small.name]

    assert int((trained.row_P != 0).sum()) == bank.parameters(small.recipe.method)
    if kind != "projected":
        spec = small.recipe.method
        assert torch.equal(bank.from_tensors(bank.to_tensors(trained.row_P, spec), spec), trained.row_P)


@pytest.mark.parametrize("pack_number", range(18))
def test_a_user_is_the_same_alone_packed_taken_aside_killed_and_resumed(tmp_path: Path, pack_number: int) -> None:
    """Unlike numbers of virtual tokens, sizes, steps, slots, waiting lists: row and losses to the bit."""
    generator = random.Random(pack_number)
    kind = list(KINDS)[pack_number % 3]
    architecture = generator.choice(["llama", "gpt2"])
    base = freeze(ARCHITECTURES[architecture](), None, architecture)
    learners = [
        user(
            100 * pack_number + number,
            kind,
            count=generator.choice([1, 5, 12]),
            held_out=generator.randrange(0, 4),
            num_virtual_tokens=generator.choice([1, 3, 8, 21]),
            schedule=generator.choice(["constant", "cosine"]),
            weight_decay=generator.choice([0, 0.1]),
            patience=generator.choice([None, 1]),
            batch_size=generator.choice([1, 4]),
            epochs=generator.randrange(1, 3),
            **(
                generator.choice([{}, {"prefix_projection": False, "encoder_hidden_size": None}])
                if kind == "projected"
                else {}
            ),
        )
        for number in range(generator.randrange(2, 7))
    ]
    bank, slots, one = bank_of(base, learners), generator.choice([1, 2, 4]), generator.choice(learners)

    alone = run(base, [one], bank, slots)[one.name]
    packed = run(base, learners, bank, slots)[one.name]
    resumed = killed_and_resumed(base, learners, slots, bank, tmp_path, generator.randrange(1, 12), T)[one.name]

    assert same(alone, packed)
    assert same(alone, resumed)


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_neighbour_changes_nobody(base: BaseModel, kind: str) -> None:
    """NaN weights, or a rate that overflows: it is retired, and whoever sits down in its slot is not told."""
    good = [user(seed, kind) for seed in (1, 2, 3)]
    bank = bank_of(base, good)
    nan = replace(user(66, kind), start=torch.full((bank.width,), torch.nan))
    wild = user(67, kind, learning_rate=1e38, clip=1e30, schedule="constant", warmup=0)
    expected = run(base, good, bank)

    found = run(base, [nan, good[0], wild, *good[1:]], bank)

    assert all(same(found[one.name], expected[one.name]) for one in good)
    assert found[nan.name].outcome == found[wild.name].outcome == "retired"
    assert found[wild.name].row_P.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_no_byte(base: BaseModel, kind: str) -> None:
    """A layer that runs twice finds the same before its tokens."""
    learners = [user(seed, kind, held_out=3) for seed in (1, 2)]
    bank = bank_of(base, learners)
    plain = run(base, learners, bank)

    with checkpointed(base):
        forgetful = run(base, learners, bank)

    assert all(same(plain[name], forgetful[name]) for name in plain)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch compiles for a CPU with a C++ compiler")
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_compiled_layers_learn_the_same(base: BaseModel, kind: str) -> None:
    """Losses as without, and a user's own bytes alone and packed."""
    mine, other = user(1, kind, epochs=1), user(2, kind, epochs=1, num_virtual_tokens=2)
    bank = bank_of(base, [mine, other])
    plain = run(base, [mine], bank)[mine.name]

    with compiled(base):
        alone = run(base, [mine], bank)[mine.name]
        packed = run(base, [other, mine], bank)[mine.name]

    assert same(alone, packed)
    assert [loss for _, loss in alone.losses] == pytest.approx([loss for _, loss in plain.losses], abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("forget", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_memory_law_holds(architecture: str, kind: str, forget: bool) -> None:
    """Within a quarter of a percent, from shapes alone."""
    setting = Setting(architecture, 2, 4, 8, 64, 1, "all-linear", 0.0, forget)
    base = make_base(setting, "cpu")
    bank = bank_of(base, [user(1, kind, num_virtual_tokens=16)])

    predicted = predict(base, bank, setting.slots, setting.row_tokens, False, forget)

    assert predicted == pytest.approx(measured(base, bank, setting), rel=0.0025)


def windowed() -> PreTrainedModel:
    """A token sees the 24 before it; what a batch is padded to and a prefix are more together."""
    torch.manual_seed(0)
    settings = llama().config.to_diff_dict() | {"sliding_window": 24, "model_type": "mistral"}
    return MistralForCausalLM(MistralConfig(**settings))


ANSWERING = {**ARCHITECTURES, "opt": opt, "windowed": windowed}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ANSWERING)
def test_answers_of_a_mixed_batch_are_each_users_own(architecture: str, kind: str) -> None:
    """With a cache, prompts of unlike lengths: each token is the one that reading everything anew would choose.

    OPT's calls go past its `base_model`; in a window neither padding nor others' virtual tokens count.
    """
    tokenizer = make_tokenizer(None)
    model = ANSWERING[architecture]()
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    base = freeze(model, tokenizer, architecture)
    several = [virtual(kind, num_virtual_tokens=number) for number in (2, 6)]
    bank = make_bank(base, [settings.method for settings in several])
    rows = [bank.start_row(settings.method, seed) for seed, settings in enumerate(several)]
    trials = [Trial(row_P, one.method.scale, ()) for row_P, one in zip(rows, several, strict=True)]
    trials.append(Trial(None, 0.0, ()))
    prompts = [examples(seed)[0].tokens[: 4 + seed] for seed in range(3)]

    answers = generate(base, bank, list(zip(trials, prompts, strict=True)), 3, max_new_tokens=6)

    for answer, trial, prompt in zip(answers, trials, prompts, strict=True):
        cohort = Cohort(1, bank.width, base.model.device, base.model.dtype)
        if trial.row_P is not None:
            cohort.admit(0, trial.row_P, trial.scale)
        said = list(prompt)
        with bank.attached(base, cohort), torch.inference_mode():
            while len(said) < len(prompt) + 6 and tokenizer.eos_token_id not in said[len(prompt) :]:
                said.append(int(base.model(torch.tensor([said]), use_cache=False).logits[0, -1].argmax()))
        assert answer == tokenizer.decode(said[len(prompt) :], skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ANSWERING)
def test_who_answers_reads_what_was_trained(architecture: str, kind: str) -> None:
    """Training calls the model inside of a base, generation the whole: either sees the virtual tokens."""
    base, settings = freeze(ANSWERING[architecture](), None), virtual(kind)
    bank, tokens = make_bank(base, [settings.method]), torch.tensor([examples(1)[0].tokens])
    cohort = Cohort(1, bank.width, base.model.device, base.model.dtype)
    cohort.admit(0, bank.start_row(settings.method, 1), settings.method.scale)

    with bank.attached(base, cohort), torch.inference_mode():
        whole = base.model(tokens).logits
        inside = base.model.get_output_embeddings()(base.model.base_model(tokens).last_hidden_state)

    torch.testing.assert_close(whole, inside, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_scores_what_its_row_scored(base: BaseModel, kind: str) -> None:
    """Also where an MLP made the prefix: the judge reads what is published, in a bank of any kind."""
    mine = user(1, kind)
    bank, spec, data = bank_of(base, [mine]), mine.recipe.method, examples(9, 4)
    row_P = run(base, [mine], bank)[mine.name].row_P

    (trained,) = evaluate(base, bank, [Trial(row_P, spec.scale, data)], 2, T)
    asked = Asked(spec, bank.to_tensors(row_P, spec), data)
    (published,) = evaluate_all(base, [asked], 2, T)
    (plain, judged) = evaluate(base, bank, [Trial(None, 0.0, data), asked.trial(bank)], 2, T)

    assert published.loss == pytest.approx(trained.loss, abs=1e-5)
    assert judged.loss == pytest.approx(trained.loss, abs=1e-5)
    assert abs(plain.loss - trained.loss) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_lies_under_virtual_tokens(llama_base: BaseModel, kind: str) -> None:
    """They enter below the lowest layer, so no lower states are kept."""
    bank = bank_of(llama_base, [user(1, kind)])

    assert LowerLayers(llama_base, bank, RowStore(RowMemory(1 << 20), lambda: 0.0)).first == 0


HOSTILE: dict[str, tuple[dict[str, object], str]] = {
    "huge": ({"num_virtual_tokens": 10**6}, "not 1 to 256"),
    "text": ({"num_virtual_tokens": "5"}, "num_virtual_tokens is '5'"),
    "truth": ({"num_virtual_tokens": True}, "num_virtual_tokens is True"),
    "none": ({"num_virtual_tokens": 0}, "num_virtual_tokens is 0"),
    "other": ({"num_virtual_tokens": 4}, "shape"),
    "longer than the base": ({"num_virtual_tokens": 125}, "room for only 128"),
    "encoder": ({"num_transformer_submodules": 2}, "num_transformer_submodules"),
    "more modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "another task": ({"task_type": "SEQ_2_SEQ_LM"}, "task_type"),
}


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize("attack", [*HOSTILE, "nan", "another tensor"])
def test_a_hostile_file_is_refused_in_words(llama_base: BaseModel, tmp_path: Path, kind: str, attack: str) -> None:
    """Before PEFT or safetensors sees it."""
    settings = virtual(kind)
    bank = make_bank(llama_base, [settings.method])
    tensors = bank.to_tensors(bank.start_row(settings.method, 0), settings.method)
    if attack == "nan":
        tensors["prompt_embeddings"][2, 3] = torch.nan
    if attack == "another tensor":
        tensors["base_model.model.lm_head.weight"] = torch.zeros(2, 2)
    changes, words = HOSTILE.get(attack, ({}, "not finite|no place"))
    for name, data in write_artifact(llama_base, settings.method, tensors, {}).items():
        (tmp_path / name).write_bytes(data)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))

    with pytest.raises(ArtifactRefused, match=words):
        read_artifact(tmp_path, llama_base)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"method": "prompt_tuning", "rank": 8}, "method.rank = 8: prompt_tuning has no such setting"),
        ({"method": "prefix_tuning", "prompt_tuning_init": "TEXT"}, "method.start .*prefix_tuning has no such"),
        ({"num_virtual_tokens": 8}, "method.virtual_tokens = 8: lora has no such setting"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 257}, "method.virtual_tokens = 257: .*less than"),
        ({"method": "prompt_tuning", "dropout": 0.1}, "no dropout"),
        ({"method": "prefix_tuning", "layers": [1]}, "no choice of layers"),
        ({"method": "prompt_tuning", "prompt_tuning_init": "TEXT"}, "needs start_text"),
        ({"method": "prompt_tuning", "prompt_tuning_init_text": "hello"}, "needs start_text"),
        ({"method": "prefix_tuning", "encoder_hidden_size": 8}, "set projection too"),
    ],
)
def test_a_recipe_with_anothers_settings_says_so(given: dict[str, object], words: str) -> None:
    """By the key, and by the method that does not have it."""
    with pytest.raises(RecipeError, match=words):
        make_recipe(given)


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_of_few_positions_is_refused(llama_base: BaseModel, kind: str) -> None:
    """Before the first step."""
    with pytest.raises(TrainingError, match="has room for 128 tokens"):
        make_bank(llama_base, [virtual(kind, num_virtual_tokens=121).method])


def test_examples_that_fill_a_table_of_positions_can_be_judged() -> None:
    """An adapter meets an example that another method could train on: the last tokens share a position."""
    base = freeze(gpt2(), None, "gpt2")
    spec = virtual("prefix").method
    bank = make_bank(base, [spec])

    (scores,) = evaluate(base, bank, [Trial(bank.start_row(spec, 0), spec.scale, examples(1, 1, 128))], 1, 128)

    assert scores.loss > 0
