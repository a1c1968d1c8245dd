"""LoRA's variants: what PEFT trains, in rows that change no neighbour's bytes."""

import json
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer

from lora_core.artifact import write_artifact
from lora_core.banks.lora import lora_bank
from lora_core.banks.table import make_bank
from lora_core.base_model import BaseModel, freeze
from lora_core.cohort import Cohort
from lora_core.errors import ArtifactRefused, RecipeError, TrainingError
from lora_core.intake import AdapterFiles, read_artifact
from lora_core.learner import Learner, Trained
from lora_core.methods import LoraSpec
from lora_core.recipe import Recipe, make_recipe
from tests.lora_core.conftest import ARCHITECTURES, examples, learner, llama, lora_of, recipe
from tests.lora_core.killing import killed_and_resumed
from tests.lora_core.test_exact import T as ROW_TOKENS
from tests.lora_core.test_exact import run as run_rows
from tests.lora_core.test_peft_parity import load_row, our_logits, peft_loop, peft_model
from tests.lora_core.test_train import run

STEPS = 100


def patterns(base: BaseModel) -> dict[str, object]:
    """Ranks by a whole path and by a name, and an alpha for all of the name."""
    first, last = base.sites[0].name, base.sites[-1].name.rpartition(".")[2]
    return {"rank_pattern": {last: 7, first: 2}, "alpha_pattern": {last: 5}}


def variants(base: BaseModel) -> list[dict[str, object]]:
    """Every variant, alone or with others."""
    pissa = {"init_lora_weights": "pissa", "loraplus_lr_ratio": 2}
    return [{"loraplus_lr_ratio": 16}, pissa, patterns(base), {**pissa, **patterns(base)}]


def parity_recipe(**settings: object) -> Recipe:
    """A hundred steps with a schedule, decay and clipping."""
    defaults: dict[str, object] = {
        "dropout": 0, "epochs": 25, "batch_size": 4, "learning_rate": 2e-3, "schedule": "cosine", "warmup": 0.1,
        "weight_decay": 0.01,
    }  # fmt: skip
    return recipe(**{**defaults, **settings})


def beside_neighbours(base: BaseModel, settings: Recipe, count: int = 16) -> Trained:
    """One user trained between two plain ones."""
    plain = [Learner(f"n{seed}", recipe(seed=seed, epochs=25), examples(seed, count)) for seed in (7, 8)]
    return run(base, [plain[0], Learner("me", settings, examples(3, count)), plain[1]], slots=3)["me"]


def furthest(trained: Trained, expected: list[float]) -> float:
    """The largest difference of two runs' losses."""
    assert len(trained.losses) == len(expected) == STEPS
    return max(abs(ours - theirs) for (_, ours), theirs in zip(trained.losses, expected, strict=True))


def test_loraplus_loses_what_pefts_optimiser_loses(base: BaseModel) -> None:
    """Every loss within 1e-5 over 100 steps: B's rate and decay are a multiple of A's."""
    settings = parity_recipe(loraplus_lr_ratio=8)
    spec, bank = lora_of(settings), lora_bank(base, [lora_of(settings)])
    theirs = peft_model(ARCHITECTURES[base.name]().eval(), spec).eval()
    load_row(theirs, bank.to_tensors(bank.start_row(spec, settings.seed), spec))
    optimiser = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1.0, loraplus_lr_ratio=8, loraplus_weight_decay=settings.weight_decay
    )

    expected = peft_loop(theirs, examples(3, count=16), settings, STEPS, optimiser)

    assert furthest(beside_neighbours(base, settings), expected) < 1e-5


def pissa_model(base: BaseModel, spec: LoraSpec) -> PeftModel:
    """PEFT's own PiSSA on a base of this architecture: it takes the principal part out of the weights."""
    config = LoraConfig(
        r=spec.rank, lora_alpha=spec.alpha, use_rslora=spec.use_rslora, target_modules="all-linear",
        task_type="CAUSAL_LM", init_lora_weights="pissa",
    )  # fmt: skip
    model: PeftModel = get_peft_model(ARCHITECTURES[base.name]().eval(), config)
    return model.eval()


def test_pissa_loses_what_pefts_pissa_loses_and_its_files_say_the_same(base: BaseModel, tmp_path: Path) -> None:
    """Every loss within 1e-4 over 100 steps on the whole base; stock PEFT loads it as LoRA of twice the rank."""
    settings = parity_recipe(init_lora_weights="pissa", use_rslora=base.name == "gpt2", learning_rate=1e-3)
    spec, bank = lora_of(settings), lora_bank(base, [lora_of(settings), lora_of(recipe())])
    theirs = pissa_model(base, spec)

    expected = peft_loop(theirs, examples(3, count=16), settings, STEPS)
    trained = beside_neighbours(base, settings)

    assert furthest(trained, expected) < 1e-4
    for name, data in write_artifact(base, spec, bank.to_tensors(trained.row_P, spec), {}).items():
        (tmp_path / name).write_bytes(data)
    tokens = torch.tensor([examples(5)[0].tokens])
    loaded = PeftModel.from_pretrained(ARCHITECTURES[base.name]().eval(), tmp_path)
    ours = our_logits(base, bank, trained.row_P, spec.scale, tokens)
    files = read_artifact(tmp_path, base)
    again = our_logits(base, bank, bank.from_tensors(files.tensors, lora_of_files(files)), spec.scale, tokens)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(tokens).logits, ours, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(theirs(tokens).logits, ours, atol=5e-3, rtol=1e-3)
    assert torch.equal(again, ours)
    assert lora_of_files(files).scale == pytest.approx(spec.scale, rel=1e-12)


def lora_of_files(files: AdapterFiles) -> LoraSpec:
    """What files say, which is LoRA here."""
    assert isinstance(files.spec, LoraSpec)
    return files.spec


def test_pefts_conversion_of_pissa_loads_here_and_its_residual_form_is_refused(
    llama_base: BaseModel, tmp_path: Path
) -> None:
    """Without the conversion its tensors are deltas of another base."""
    spec = lora_of(recipe(init_lora_weights="pissa"))
    theirs = pissa_model(llama_base, spec)
    theirs.save_pretrained(tmp_path / "start")
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path / "residual")
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    tokens = torch.tensor([examples(5)[0].tokens])

    files = read_artifact(tmp_path / "lora", llama_base)

    bank = lora_bank(llama_base, [lora_of_files(files)])
    row_P = bank.from_tensors(files.tensors, lora_of_files(files))
    ours = our_logits(llama_base, bank, row_P, lora_of_files(files).scale, tokens)
    with torch.inference_mode():
        torch.testing.assert_close(theirs(tokens).logits, ours, atol=1e-4, rtol=1e-4)
    with pytest.raises(ArtifactRefused, match="init_lora_weights"):
        read_artifact(tmp_path / "residual", llama_base)


def test_a_start_that_is_taken_off_stays_to_the_bit(base: BaseModel) -> None:
    """Neither gradient nor decay touches it, and it is the same for every seed and in every bank."""
    settings = recipe(init_lora_weights="pissa", weight_decay=0.1, dropout=0.2)
    spec, bank = lora_of(settings), make_bank(base, [settings.method], size=11)
    start = bank.to_tensors(bank.start_row(spec, 0), spec)
    narrow = lora_bank(base, [spec])

    ended = bank.to_tensors(run(base, [Learner("me", settings, examples(3))], 2, bank)["me"].row_P, spec)

    other = narrow.to_tensors(narrow.start_row(spec, 5), spec)
    assert all(torch.equal(start[name], other[name]) for name in start)
    for name in start:
        rows, theirs = (tensors[name] if "lora_A" in name else tensors[name].mT for tensors in (ended, start))
        assert torch.equal(rows[spec.rank :], theirs[spec.rank :])
        assert not torch.equal(rows[: spec.rank], theirs[: spec.rank])


def test_more_singular_values_than_there_are_cannot_be_had(llama_base: BaseModel) -> None:
    """Said before the first step."""
    with pytest.raises(TrainingError, match="choose a rank up to 16"):
        lora_bank(llama_base, [lora_of(recipe(init_lora_weights="pissa", rank=17))])
    with pytest.raises(RecipeError, match="at most rank 256"):
        make_recipe({"init_lora_weights": "pissa", "rank": 257})


def test_stretches_of_one_rate_step_as_the_whole_row(base: BaseModel) -> None:
    """A ratio of 1 is plain LoRA: no stretches, the same call, the same bytes."""
    bank = make_bank(base, [recipe().method])
    plain, one = learner(1), learner(1, loraplus_lr_ratio=1)

    assert bank.stretches(one.recipe.method) == ()
    assert plain.digest == one.digest
    assert torch.equal(run(base, [plain], 2)["user1"].row_P, run(base, [one], 2)["user1"].row_P)


def user(number: int, count: int, settings: Mapping[str, object], held_out: int = 0) -> Learner:
    """A user of any variant."""
    return replace(learner(number, count, held_out), recipe=recipe(seed=number, **settings))


def random_user(generator: random.Random, number: int, base: BaseModel) -> Learner:
    """A plain user or one of any variant, of any size."""
    settings = {
        "rank": generator.choice([2, 4]),
        "dropout": generator.choice([0, 0.2]),
        "weight_decay": generator.choice([0, 0.1]),
        "patience": generator.choice([None, 1]),
        **generator.choice([{}, *variants(base)]),
    }
    return user(number, generator.randrange(3, 12), settings, generator.choice([0, 3]))


@pytest.mark.parametrize("pack", range(8))
def test_variants_and_plain_users_change_nobody(tmp_path: Path, pack: int) -> None:
    """Alone, packed, or killed and resumed: the same rows and losses, to the bit."""
    generator = random.Random(pack)
    base = freeze(list(ARCHITECTURES.values())[pack % 2](), None)
    cohort = [random_user(generator, number, base) for number in range(4)]
    cohort += [user(9, 8, variants(base)[pack // 2 % 4])]
    bank = make_bank(base, [one.recipe.method for one in cohort])
    one = generator.choice(cohort)

    alone = run_rows(base, [one], 3, bank)[one.name]
    packed = run_rows(base, cohort[:2], 3, bank, cohort[2:])[one.name]
    resumed = killed_and_resumed(base, cohort, 3, bank, tmp_path, generator.randrange(1, 12), ROW_TOKENS)[one.name]

    for other in (packed, resumed):
        assert torch.equal(alone.row_P, other.row_P)
        assert (alone.losses, alone.held_out) == (other.losses, other.held_out)


def test_recipes_without_variants_keep_their_digest(llama_base: BaseModel) -> None:
    """What is not used is not named in a stored recipe; what is used comes back."""
    assert make_recipe({}).digest == "bf49e9ebce07345d835e4ba8a3653c3b4920cc8e6962b3a137cd82d86a459f8c"
    assert "loraplus_lr_ratio" not in make_recipe({"loraplus_lr_ratio": 1}).model_dump(mode="json")["method"]
    for variant in variants(llama_base):
        one = make_recipe(variant)
        assert make_recipe(one.model_dump(mode="json")) == one
        assert one.digest != make_recipe({}).digest


def patterned_model(base: BaseModel, spec: LoraSpec, ranks: object, alphas: object) -> PeftModel:
    """PEFT with patterns as they are given, in their order."""
    config = LoraConfig(
        r=spec.rank, lora_alpha=spec.alpha, use_rslora=spec.use_rslora, target_modules="all-linear",
        task_type="CAUSAL_LM", rank_pattern=ranks, alpha_pattern=alphas,
    )  # fmt: skip
    model: PeftModel = get_peft_model(ARCHITECTURES[base.name]().eval(), config)
    return model.eval()


def test_patterns_lose_what_pefts_lose_and_files_go_both_ways(base: BaseModel, tmp_path: Path) -> None:
    """Every loss within 1e-5 over 100 steps beside plain users: each linear has its own rank and its own scale."""
    settings = parity_recipe(**patterns(base), use_rslora=base.name == "gpt2")
    spec, bank = lora_of(settings), lora_bank(base, [lora_of(settings)])
    theirs = patterned_model(base, spec, dict(spec.rank_pattern), dict(spec.alpha_pattern))
    load_row(theirs, bank.to_tensors(bank.start_row(spec, settings.seed), spec))
    tokens = torch.tensor([examples(5)[0].tokens])

    expected = peft_loop(theirs, examples(3, count=16), settings, STEPS)
    trained = beside_neighbours(base, settings)

    assert furthest(trained, expected) < 1e-5
    ours = our_logits(base, bank, trained.row_P, spec.scale, tokens)
    for name, data in write_artifact(base, spec, bank.to_tensors(trained.row_P, spec), {}).items():
        (tmp_path / name).write_bytes(data)
    loaded = PeftModel.from_pretrained(ARCHITECTURES[base.name]().eval(), tmp_path)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(tokens).logits, ours, atol=1e-5, rtol=1e-5)
    assert torch.equal(read_logits(base, tmp_path, tokens), ours)
    theirs.save_pretrained(tmp_path)
    with torch.inference_mode():
        torch.testing.assert_close(theirs(tokens).logits, read_logits(base, tmp_path, tokens), atol=1e-5, rtol=1e-5)


def read_logits(base: BaseModel, folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """What the base says with the adapter in a folder."""
    files = read_artifact(folder, base)
    spec = lora_of_files(files)
    bank = lora_bank(base, [spec])
    return our_logits(base, bank, bank.from_tensors(files.tensors, spec), spec.scale, tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linears_scale_is_what_its_pattern_says_in_few_bits_too(dtype: torch.dtype) -> None:
    """A hundredth of the user's: as a share of it, -0.99, bf16 would make a sixth more of it."""
    base = freeze(llama().to(dtype), None)
    spec = lora_of(recipe(alpha_pattern={"down_proj": 0.08}))
    bank = lora_bank(base, [spec])
    cohort = Cohort(1, bank.width, base.model.device, dtype)
    cohort.admit(0, bank.start_row(spec, 0), spec.scale)

    with bank.attached(base, cohort):
        found = {site.name: base.model.get_submodule(site.name).group.factors(base.model.device)[2]
                 for site in base.sites if site.name.endswith(("down_proj", "o_proj"))}  # fmt: skip

    for name, scale_1S1 in found.items():
        torch.testing.assert_close(scale_1S1.float(), torch.full_like(scale_1S1.float(), spec.scale_at(name)))


def test_of_two_keys_that_fit_the_first_decides_in_pefts_files(llama_base: BaseModel, tmp_path: Path) -> None:
    """In our recipes the longer does, whatever their order."""
    spec = lora_of(recipe())
    theirs = patterned_model(llama_base, spec, {"q_proj": 2, "self_attn.q_proj": 3}, {"q_proj": 1})
    theirs.save_pretrained(tmp_path)

    files = read_artifact(tmp_path, llama_base)

    assert lora_of_files(files).rank_pattern == (("q_proj", 2),)
    ours = make_recipe({"rank_pattern": {"q_proj": 2, "layers.0.self_attn.q_proj": 3}})
    assert lora_of(ours).rank_at("model.layers.0.self_attn.q_proj") == 3
    assert lora_of(ours).rank_at("model.layers.1.self_attn.q_proj") == 2
    assert lora_of(ours).rank_at("model.layers.1.self_attn.xq_proj") == 16


@pytest.mark.parametrize("pattern", [{".*q_proj": 2}, {"q_proj": True}, {"q_proj": 513}, {"q_proj": "2"}, ["q_proj"]])
def test_patterns_that_are_not_plain_names_are_refused(llama_base: BaseModel, tmp_path: Path, pattern: object) -> None:
    """No regular expression of a file is run."""
    patterned_model(llama_base, lora_of(recipe()), {}, {}).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "rank_pattern": pattern}))

    with pytest.raises(ArtifactRefused, match="rank_pattern"):
        read_artifact(tmp_path, llama_base)


def test_a_key_that_names_no_linear_is_refused(llama_base: BaseModel) -> None:
    """A slip of the pen must not train something else."""
    with pytest.raises(TrainingError, match="choose from"):
        lora_bank(llama_base, [lora_of(recipe(alpha_pattern={"q_prj": 2}))])
