"""Scores are the plain model's, the gate follows the evidence, and many adapters answer in one batch."""

import random

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lora_core.banks.lora import lora_bank
from lora_core.base_model import BaseModel, freeze
from lora_core.evaluate import ExampleScore, Scores, Trial, evaluate
from lora_core.gate import judge
from lora_core.generate import generate, task_score
from lora_core.recipe import GateSpec
from tests.lora_core.conftest import T, examples, llama, lora_of, recipe
from tests.lora_core.test_peft_parity import random_row


def test_an_examples_score_is_what_the_model_alone_gives(base: BaseModel) -> None:
    """Packed with others, in any slot, in the order given."""
    data = examples(1, count=9)
    bank = lora_bank(base, [lora_of(recipe())])

    (scores,) = evaluate(base, bank, [Trial(None, 0, data)], 3, T)

    for one, score in zip(data, scores.examples, strict=True):
        with torch.inference_mode():
            logits = base.model(torch.tensor([one.tokens])).logits[0, :-1]
        wanted = torch.where(torch.tensor(one.trained), torch.tensor(one.tokens), -100)[1:]
        assert score.loss == pytest.approx(float(cross_entropy(logits, wanted, reduction="sum")), abs=1e-4)
        assert score.tokens == int((wanted != -100).sum())
        assert score.right == int((logits.argmax(-1) == wanted).sum())


def test_trials_are_judged_apart(base: BaseModel) -> None:
    """Each adapter on its own data; a zero row is the base exactly."""
    spec = lora_of(recipe())
    bank = lora_bank(base, [spec])
    row_P = random_row(bank, spec)
    data = [examples(seed, count=5) for seed in range(3)]

    mixed = evaluate(
        base, bank,
        [Trial(row_P, spec.scale, data[0]), Trial(None, 0, data[1]), Trial(torch.zeros(bank.width), 1, data[1]),
         Trial(row_P, spec.scale, data[2])],
        2, T,
    )  # fmt: skip

    assert mixed[1] == mixed[2]
    for number, at in ((0, 0), (2, 3)):
        assert mixed[at] == evaluate(base, bank, [Trial(row_P, spec.scale, data[number])], 2, T)[0]
    assert mixed[0].perplexity == pytest.approx(2.718281828 ** mixed[0].loss)


def scores(losses: list[float]) -> Scores:
    """Examples of ten tokens with these mean losses."""
    return Scores(tuple(ExampleScore(10 * loss, 10, 3) for loss in losses))


def test_the_gate_accepts_a_gain_that_chance_does_not_explain() -> None:
    """Twelve examples, each a little better."""
    verdict = judge(
        scores([1.0 + 0.01 * n for n in range(12)]), scores([1.1 + 0.01 * n for n in range(12)]), "base", GateSpec()
    )

    assert verdict.accepted
    assert verdict.gain == pytest.approx(0.1)
    assert "12 held-out examples" in verdict.reason


def test_the_gate_refuses_noise_losses_and_too_little_evidence() -> None:
    """Each with the figures that decided."""
    generator = random.Random(0)
    noise = [1 + generator.gauss(0, 0.3) for _ in range(30)]

    lucky = judge(scores([loss - 0.5 for loss in [1.0, 1.1]]), scores([1.0, 1.1]), "base", GateSpec())
    random_ = judge(scores(noise), scores([1 + generator.gauss(0.02, 0.3) for _ in noise]), "base", GateSpec())
    worse = judge(scores([1.2] * 10), scores([1.1] * 10), "version 3", GateSpec())
    same = judge(scores([1.1] * 10), scores([1.1] * 10), "base", GateSpec())
    small = judge(scores([1.0] * 10), scores([1.01] * 10), "base", GateSpec(min_gain=0.05))

    assert [one.accepted for one in (lucky, random_, worse, same, small)] == [False] * 5
    assert lucky.reason.endswith("2 held-out examples; it must be below 0.05, which takes 5: add examples")
    assert random_.reason.endswith("30 held-out examples; it must be below 0.05")
    assert "no better" in worse.reason
    assert "version 3" in worse.reason
    assert "min_gain is 0.05" in small.reason


def test_the_gates_false_alarms_are_as_rare_as_it_says() -> None:
    """Of candidates that are no better, about one in twenty gets through at 0.05, not more."""
    generator = random.Random(1)
    through = sum(
        judge(
            scores([1 + generator.gauss(0, 0.2) for _ in range(20)]),
            scores([1 + generator.gauss(0, 0.2) for _ in range(20)]),
            "base",
            GateSpec(),
        ).accepted
        for _ in range(400)
    )

    assert through / 400 < 0.08


@pytest.fixture
def talking(tokenizer: PreTrainedTokenizerFast) -> BaseModel:
    """A Llama with a vocabulary as large as the tokenizer's."""
    config = llama().config
    config.vocab_size = len(tokenizer)
    torch.manual_seed(3)
    return freeze(LlamaForCausalLM(config), tokenizer)


def test_adapters_in_one_batch_answer_as_each_alone(talking: BaseModel) -> None:
    """Prompts of different lengths, the bare base among them."""
    spec = lora_of(recipe())
    bank = lora_bank(talking, [spec])
    trials = [Trial(random_row(bank, spec, seed), spec.scale, ()) for seed in (1, 2)]
    requests = [(trials[0], [5, 9, 30, 7]), (trials[1], [5, 9]), (Trial(None, 0, ()), [40, 41, 42])]

    together = generate(talking, bank, requests, 3, max_new_tokens=8)

    assert together == [generate(talking, bank, [one], 1, max_new_tokens=8)[0] for one in requests]
    assert len(set(together)) == 3
    plain = talking.model.generate(torch.tensor([[40, 41, 42]]), max_new_tokens=8, do_sample=False)
    assert together[2] == talking.tokenizer.decode(plain[0, 3:], skip_special_tokens=True)


def test_answers_are_scored_by_match_and_by_likeness() -> None:
    """Blanks around an answer do not count."""
    score = task_score([" yes ", "no", "maybe so"], ["yes", "yes", "maybe no"])

    assert score.exact == pytest.approx(1 / 3)
    assert 20 < score.chrf < 90
    assert task_score([], []).exact == 0
