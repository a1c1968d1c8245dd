"""Methods side by side: every one is really trained, and what is said of them is drawn from it."""

from dataclasses import replace
from typing import Any

import pytest

from lora_core.banks.table import METHODS
from lora_core.base_model import BaseModel
from lora_core.compare import CONTENDERS, FULL, Compared, advice, bare, compare, rates
from lora_core.errors import TrainingError
from lora_core.methods import LoraSpec
from lora_core.worked_examples import gpt2, one_matrix, remarks
from tests.lora_core.conftest import learner

EASY: dict[str, Any] = {"epochs": 3, "patience": 3, "learning_rate": 5e-3, "dropout": 0}


def unexpected(name: str, error: TrainingError) -> None:
    """Nobody is to be missed."""
    raise AssertionError(f"{name}: {error}")


def test_every_method_and_full_fine_tuning_are_compared_on_the_same_examples(base: BaseModel) -> None:
    """Sizes are those of the files, shares those of the base; nobody is worse than the base, whose row is a choice."""
    user = replace(learner(1, count=12, held_out=4, **EASY), name="acme/alice")
    told: list[str] = []

    results = list(compare(base, user, told.append, unexpected))

    before = bare(base, user).loss
    assert [one.method for one in results] == told == [*CONTENDERS, FULL]
    assert {spec.name for spec in CONTENDERS.values()} == set(METHODS)
    for one in results:
        assert one.loss <= before + 1e-6
        assert one.share == one.parameters / base.parameters
        assert one.fit == 4 * base.parameters // one.file_bytes
        assert one.peak_bytes > 4 * base.parameters
    *adapters, full = results
    assert all(one.peak_bytes < full.peak_bytes for one in adapters)
    assert full.parameters == base.parameters
    assert any("Quality first" in line or "No adapter learnt" in line for line in advice(results, before))


def test_time_is_trainings_alone(llama_base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on only while peaks are predicted, which can take longer than to train."""
    hours = 0.0

    def an_hour(*_: object, **__: object) -> int:
        nonlocal hours
        hours += 1
        return 1

    for name in ("compare.predict", "compare.predict_full", "full_tuning.predict_full"):
        monkeypatch.setattr(f"lora_core.{name}", an_hour)
    monkeypatch.setattr("lora_core.compare.time.perf_counter", lambda: hours)
    monkeypatch.setattr("lora_core.compare.CONTENDERS", {"LoRA": LoraSpec(rank=2)})

    results = list(compare(llama_base, learner(1, held_out=4, **EASY), lambda _: None, unexpected))

    assert hours == len(results) == 2
    assert [one.seconds for one in results] == [0, 0]


def compared(method: str, loss: float, file_bytes: int) -> Compared:
    """A result with little to it."""
    return Compared(method, 1e-3, loss, 0.5, 10, 0.1, 100, 1.0, file_bytes, 1000 // file_bytes)


def test_advice_takes_the_smallest_of_those_that_are_about_as_good() -> None:
    """Within 5 % of the best gain."""
    results = [
        compared("big", 1.0, 100),
        compared("small", 1.04, 10),
        compared("tiny", 1.9, 1),
        compared(FULL, 0.9, 1000),
    ]

    lines = advice(results, 2.0)

    assert lines[0].startswith("Quality first: big")
    assert lines[1].startswith("Space first: small")
    assert "91%" in lines[-1]
    assert advice([compared("big", 3.0, 100)], 2.0) == [
        "No adapter learnt anything from this data: add examples, or try other rates."
    ]


@pytest.mark.parametrize(
    ("settings", "held_out", "words"),
    [({}, 0, "held-out"), ({"patience": None}, 4, "patience is null"), ({"objective": "dpo"}, 4, "learns from pairs")],
)
def test_what_cannot_be_judged_is_refused_before_anything_is_trained(
    llama_base: BaseModel, settings: dict[str, Any], held_out: int, words: str
) -> None:
    """In words."""
    told: list[str] = []
    user = learner(1, held_out=held_out, **{"patience": 2, **settings})

    with pytest.raises(TrainingError, match=words):
        list(compare(llama_base, user, told.append, unexpected))

    assert told == []


def test_a_method_that_the_base_has_no_place_for_is_missed_alone(
    llama_base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So is full fine-tuning of a quantised base: the others are compared."""
    missed: dict[str, str] = {}
    contenders = {"LoRA": LoraSpec(rank=2), "nowhere": LoraSpec(rank=2, targets=("nope",))}
    monkeypatch.setattr("lora_core.compare.CONTENDERS", contenders)
    quantised = replace(llama_base, quantised="8bit")

    user = learner(1, held_out=4, **EASY)
    results = list(compare(quantised, user, lambda _: None, lambda name, why: missed.update({name: str(why)})))

    assert [one.method for one in results] == ["LoRA"]
    assert "no linear named 'nope'" in missed["nowhere"]
    assert "cannot be trained" in missed[FULL]


def test_where_nobody_can_be_trained_it_is_an_error(llama_base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no empty table."""
    monkeypatch.setattr("lora_core.compare.CONTENDERS", {"nowhere": LoraSpec(rank=2, targets=("nope",))})
    quantised, user = replace(llama_base, quantised="8bit"), learner(1, held_out=4, **EASY)

    with pytest.raises(TrainingError, match="no linear named 'nope'"):
        list(compare(quantised, user, lambda _: None, lambda *_: None))


def test_rates_are_the_methods_own() -> None:
    """All weights at once want smaller steps, virtual tokens larger ones."""
    recipe = learner(1).recipe

    assert max(rates(FULL, recipe)) < recipe.learning_rate < min(rates("prompt_tuning", recipe))


def test_the_textbooks_figures_come_from_real_shapes() -> None:
    """d = 768, r = 8; GPT-2 small with c_attn and c_proj."""
    matrix, model = one_matrix(), gpt2()

    assert (matrix.trained, matrix.of, f"{matrix.share:.2%}") == (12_288, 589_824, "2.08%")
    assert (model.trained, model.of) == (811_008, 124_439_808)
    assert model.file_bytes > 4 * model.trained
    assert "153" in remarks()[-1]
