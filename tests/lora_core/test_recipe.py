"""A recipe in any spelling is one recipe, and a wrong one says what is wrong."""

import pickle
from pathlib import Path

import pytest
from peft import LoraConfig

from lora_core.errors import RecipeError
from lora_core.recipe import LEAVES, SPELLINGS, load_recipe, make_recipe
from tests.lora_core.conftest import lora_of


def test_hugging_face_spellings_mean_the_same() -> None:
    """Equal recipes have equal digests, however they were spelt."""
    ours = make_recipe({"method": {"rank": 8, "alpha": 16, "targets": ["q_proj", "v_proj"]}, "clip": 0.5, "epochs": 2})
    theirs = make_recipe(
        {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "r": 8, "lora_alpha": 16.0,
         "target_modules": ["q_proj", "v_proj"], "max_grad_norm": 0.5, "num_train_epochs": 2}
    )  # fmt: skip

    assert ours == theirs
    assert ours.digest == theirs.digest
    assert ours.digest != make_recipe({"r": 8}).digest


def test_defaults_are_those_of_the_source_that_is_named() -> None:
    """LoRA Without Regret: all linear layers, alpha 32, ten times the rate of full fine-tuning."""
    recipe = make_recipe({})

    assert (lora_of(recipe).targets, lora_of(recipe).alpha, recipe.learning_rate) == ("all-linear", 32.0, 2e-4)


def test_every_spelling_leads_to_a_key() -> None:
    """The table cannot rot."""
    assert set(SPELLINGS.values()) <= LEAVES


def test_a_methods_own_names_for_its_settings_need_no_prefix() -> None:
    """The README's table of methods names them so: `projection` of prefix tuning, `activation` of adapter layers."""
    own = {leaf.removeprefix("method.") for leaf in LEAVES if leaf.startswith("method.")} - {"name"}

    assert {key: SPELLINGS.get(key) for key in own} == {key: f"method.{key}" for key in own}


def test_a_yaml_file_with_overrides_on_top(tmp_path: Path) -> None:
    """The last word is the command line's; 1e-3 is a number although YAML 1.1 says text."""
    path = tmp_path / "recipe.yaml"
    path.write_text("lora_alpha: 16\nlearning_rate: 1e-3\ngate:\n  significance: 0.01\n")

    recipe = load_recipe(path, ["learning_rate=5e-4", "r=4", "target_modules=[q_proj]", "gate.min_gain=0.1"])

    assert (lora_of(recipe).rank, lora_of(recipe).alpha, recipe.learning_rate) == (4, 16.0, 5e-4)
    assert (recipe.gate.significance, recipe.gate.min_gain, lora_of(recipe).targets) == (0.01, 0.1, ("q_proj",))


def test_what_was_stored_reads_back() -> None:
    """The registry keeps recipes as JSON."""
    recipe = make_recipe({"layers": [1, 2], "targets": ["q_proj"]})

    assert make_recipe(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize("rslora", [False, True])
def test_the_scale_is_pefts(rslora: bool) -> None:
    """alpha / r, or alpha / sqrt(r)."""
    spec = lora_of(make_recipe({"r": 16, "lora_alpha": 8, "use_rslora": rslora}))

    assert spec.scale == (8 / 4 if rslora else 8 / 16)
    assert LoraConfig(r=16, use_rslora=rslora).use_rslora is rslora


def test_recipes_without_an_objective_have_the_digest_they_always_had() -> None:
    """Else every user would be trained again for nothing; and beta decides the digest of a preference's."""
    assert make_recipe({}).digest == "bf49e9ebce07345d835e4ba8a3653c3b4920cc8e6962b3a137cd82d86a459f8c"
    assert make_recipe({"objective": "sft"}).digest == make_recipe({}).digest
    preferring = make_recipe({"rl": "DPO", "pref_beta": 0.2})
    assert (preferring.objective.name, preferring.objective.beta) == ("dpo", 0.2)
    assert len({make_recipe({}).digest, preferring.digest, make_recipe({"objective": "dpo"}).digest}) == 3
    assert make_recipe(preferring.model_dump(mode="json")) == preferring


UGLY: list[tuple[dict[str, object], str]] = [
    ({"rank": 0}, "rank = 0: .*greater than or equal to 1"),
    ({"rank": 10**6}, "less than or equal to 512"),
    ({"rank": "eight"}, "valid integer"),
    ({"learning_rate": -1}, "greater than 0"),
    ({"learning_rate": float("nan")}, "finite|greater"),
    ({"learning_rate": float("inf")}, "finite"),
    ({"lora_dropout": 1}, "less than 1"),
    ({"epochs": 1.5}, "integer"),
    ({"schedule": "zigzag"}, "'constant', 'linear' or 'cosine'"),
    ({"bias": "all"}, "bias can only be 'none'"),
    ({"learnig_rate": 1}, "did you mean learning_rate"),
    ({"holdout": {"share": 0.9}}, "less than or equal to 0.5"),
    ({"holdout": {"shore": 0.1}}, "not a key"),
    ({"holdout": 3}, "holdout"),
    ({"r": 8, "rank": 16}, "given twice"),
    ({"max_length": 1024}, "must fit a row"),
    ({"seed": -1}, "greater than or equal to 0"),
    ({"peft_type": "IA3"}, "lora"),
    ({"targets": {}}, "targets"),
    ({"objective": "ppo"}, "'sft' or 'dpo'"),
    ({"objective": "dpo", "beta": 0}, "objective.beta = 0: .*greater than 0"),
    ({"objective": {"name": "dpo", "label_smoothing": 0.5}}, "less than 0.5"),
    ({"beta": 0.3}, "beta belong to objective dpo; add objective=dpo"),
    ({"objective": {"beat": 0.3}}, "not a key"),
    ({"": 1}, "not a key"),
    ({"layers": []}, "method.layers = .*at least 1 item"),
    ({"targets": []}, "method.targets.*at least 1 item"),
]


@pytest.mark.parametrize(("given", "words"), UGLY)
def test_a_wrong_recipe_says_which_key_and_what_it_may_hold(given: dict[str, object], words: str) -> None:
    """Before anything is trained; and the error survives pickling."""
    with pytest.raises(RecipeError, match=words) as caught:
        make_recipe(given)

    assert "Value error" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1, 2]", "holds a list"),
        ("a: [", "not YAML"),
        ("a" * 10, "holds a str"),
        ("rank: 2026-99-99", "not YAML"),
        ('rank: !!int ""', "not YAML"),
        ("method: &m {method: *m}", "holds itself"),
        ("rank: &a [*a]\nr: &b [*b]", "holds itself"),
        ("a: &a [1, 1]\nb: &b [*a, *a]\nrank: [*b, *b]", "holds itself"),
        ("#" * 70_000, "bytes"),
        ("[" * 60_000, "not YAML"),
        ("!!python/object/apply:os.getcwd []", "not YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, content: str, words: str) -> None:
    """Nothing in it is run."""
    path = tmp_path / "recipe.yaml"
    path.write_text(content)

    with pytest.raises(RecipeError, match=words):
        load_recipe(path)


@pytest.mark.parametrize("override", ["rank", "=8", "rank=[", "", "rank=2026-99-99"])
def test_an_override_that_is_none_is_refused(override: str) -> None:
    """With an example of one that is."""
    with pytest.raises(RecipeError, match=r"key=value|YAML"):
        load_recipe(None, [override])


def test_a_files_search_is_switched_off_by_null(tmp_path: Path) -> None:
    """As its own `search: null` would; the rest of the file stays."""
    file = tmp_path / "recipe.yaml"
    file.write_text("rank: 4\nsearch:\n  rank: [4, 8]\n")

    found = load_recipe(file, ["search=null", "lr=1e-3"])

    assert found == make_recipe({"rank": 4, "lr": 1e-3})


def test_a_missing_file_is_named() -> None:
    """Not a traceback."""
    with pytest.raises(RecipeError, match="nowhere.yaml: cannot be read"):
        load_recipe("nowhere.yaml")
