"""Pairs trained packed, the row of zeros as the reference: what a plain DPO loop trains, whoever the neighbours are."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import logsigmoid

from lora_core.banks.bank import Bank
from lora_core.banks.lora import LoraBank, lora_bank
from lora_core.banks.table import make_bank
from lora_core.base_model import BaseModel, freeze
from lora_core.data.packing import empty_row, epoch_batches, pack
from lora_core.data.rendering import RenderedPair
from lora_core.evaluate import Trial, evaluate
from lora_core.gate import judge
from lora_core.halving import Halving
from lora_core.learner import Learner, Trained
from lora_core.lower_layers import LowerLayers
from lora_core.objectives import ObjectiveSpec
from lora_core.optim import rate_at
from lora_core.pair_scores import PairScores, as_judged
from lora_core.preference import Pairs, lesson_losses
from lora_core.recipe import GateSpec, Recipe, make_recipe
from lora_core.row_store import RowMemory, RowStore
from lora_core.saves import Saves
from lora_core.train import train
from tests.lora_core.conftest import ARCHITECTURES, T, learner, lora_of, pairs, recipe
from tests.lora_core.doors import OneByOne
from tests.lora_core.killing import Killed, doomed, resumed
from tests.lora_core.test_peft_parity import load_row, padded, peft_model

STEPS = 60


def chooser(seed: int, count: int = 16, held_out: int = 0, **settings: object) -> Learner:
    """A user who brings pairs."""
    settings = {"objective": "dpo", "learning_rate": 3e-3, **settings}
    return Learner(f"chooser{seed}", recipe(seed=seed, **settings), pairs(seed, count), pairs(seed + 1000, held_out))


def run(base: BaseModel, learners: Sequence[Learner], slots: int, bank: Bank, **more: object) -> dict[str, Trained]:
    """Train them packed; results by name."""
    return {one.name: one for one in train(base, learners, slots, T, bank, **more)}  # type: ignore[arg-type]  # as given


def log_odds(model: PeftModel, batch: Sequence[RenderedPair]) -> Tensor:
    """log p(chosen) - log p(rejected) of each pair, as a plain loop computes it: one answer a row, padded."""
    tokens, mask, labels = padded([document for pair in batch for document in pair.documents])
    logits = model(input_ids=tokens, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    targets = labels[:, 1:]
    found = logits.gather(-1, targets.clamp_min(0)[..., None])[..., 0]
    answers = torch.where(targets == -100, 0.0, found).sum(1)
    return answers[::2] - answers[1::2]


def dpo_loop(model: PeftModel, data: Sequence[RenderedPair], settings: Recipe) -> list[float]:
    """Plain DPO: PEFT, the reference with its adapter disabled, PyTorch's autograd, AdamW and clipping."""
    beta, smoothing = settings.objective.beta, settings.objective.label_smoothing
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1.0, weight_decay=settings.weight_decay)
    losses: list[float] = []
    for epoch in range(STEPS * settings.batch_size // len(data)):
        for numbers in epoch_batches(len(data), settings.batch_size, settings.seed, epoch):
            batch = [data[number] for number in numbers]
            with torch.no_grad(), model.disable_adapter():
                reference = log_odds(model, batch)
            logits = beta * (log_odds(model, batch) - reference)
            loss = (-(1 - smoothing) * logsigmoid(logits) - smoothing * logsigmoid(-logits)).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
            optimiser.param_groups[0]["lr"] = rate_at(settings, len(losses) + 1, STEPS)
            optimiser.step()
            optimiser.zero_grad()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("smoothing", [0, 0.1])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_60_steps_lose_what_a_plain_dpo_loop_loses(architecture: str, smoothing: float) -> None:
    """Same start, same data order: every loss within 1e-5, beside one who chooses and one who answers."""
    settings = recipe(
        objective="dpo", beta=0.2, label_smoothing=smoothing, dropout=0, epochs=15, learning_rate=3e-3,
        schedule="cosine", warmup=0.1, weight_decay=0.01,
    )  # fmt: skip
    data = pairs(3)
    base, other = freeze(ARCHITECTURES[architecture](), None), ARCHITECTURES[architecture]().eval()
    bank = lora_bank(base, [settings.method])
    theirs = peft_model(other, settings.method).eval()
    load_row(theirs, bank.to_tensors(bank.start_row(settings.method, settings.seed), settings.method))

    expected = dpo_loop(theirs, data, settings)
    trained = run(base, [chooser(7), learner(8), Learner("me", settings, data)], 3, bank)["me"]

    ours = [loss for _, loss in trained.losses]
    assert len(ours) == STEPS
    assert ours[0] == pytest.approx(math.log(2), abs=1e-6)
    assert ours[-1] < 0.65
    assert max(abs(a - b) for a, b in zip(ours, expected, strict=True)) < 1e-5


def same(one: Trained, other: Trained) -> bool:
    """To the bit, losses too."""
    facts = [(t.losses, t.held_out, t.outcome, t.best_step) for t in (one, other)]
    return torch.equal(one.row_P, other.row_P) and facts[0] == facts[1]


@pytest.mark.parametrize("settings", [{}, {"batch_rows": 2}, {"patience": 2, "label_smoothing": 0.2}])
def test_a_chooser_is_the_same_alone_and_among_choosers_and_answerers(
    base: BaseModel, settings: dict[str, object]
) -> None:
    """Neighbours have more pairs a row, other betas, or no pairs at all; and they are as they are alone."""
    plain, answers = chooser(1, held_out=5), learner(2, held_out=4, patience=2)
    me = replace(plain, recipe=recipe(seed=1, objective="dpo", learning_rate=3e-3, **settings))
    others = [chooser(seed, count=5 * seed, beta=0.5, held_out=3) for seed in (3, 4)]
    bank = LoraBank(base.sites, 4)

    alone, apart = run(base, [me], 4, bank)[me.name], run(base, [answers], 4, bank)[answers.name]
    packed = run(base, [*others, answers, me], 4, bank)
    turned = run(base, [me, answers, *others], 4, bank)

    for found in (packed, turned):
        assert same(alone, found[me.name])
        assert same(apart, found[answers.name])
    assert alone.losses[-1][1] < alone.losses[0][1]


def test_a_neighbour_with_nan_is_retired_alone(base: BaseModel) -> None:
    """Its row spreads to nobody, though the base could still read its pairs."""
    bank = LoraBank(base.sites, 4)
    me, bad = chooser(1), replace(chooser(66), start=torch.full((bank.width,), torch.nan))

    alone, packed = run(base, [me], 3, bank)[me.name], run(base, [bad, me], 3, bank)

    assert same(alone, packed[me.name])
    assert packed[bad.name].outcome == "retired"
    assert "not finite after step 0" in packed[bad.name].reason


@pytest.mark.parametrize("steps", [1, 2, 4, 9])
def test_killed_while_the_base_reads_or_later_it_goes_on_to_the_same_bytes(
    llama_base: BaseModel, tmp_path: Path, steps: int
) -> None:
    """What the base said of the pairs is part of what was heard."""
    cohort, bank = [chooser(seed, held_out=4, patience=3) for seed in (1, 2, 3)], LoraBank(llama_base.sites, 4)
    whole = run(llama_base, cohort, 2, bank)
    with pytest.raises(Killed):
        run(llama_base, cohort, 2, bank, saves=doomed(tmp_path, steps))
    after = run(llama_base, cohort[::-1], 2, bank, saves=resumed(tmp_path))

    assert all(same(whole[one.name], after[one.name]) for one in cohort)


def test_a_save_of_a_time_before_answers_were_lists_is_none(llama_base: BaseModel, tmp_path: Path) -> None:
    """Whoever it was of begins again, and holds up nobody."""
    one, bank = learner(1), LoraBank(llama_base.sites, 4)
    saves = Saves(tmp_path, "shape", lambda: True)
    whole = run(llama_base, [one], 1, bank, saves=saves)[one.name]
    assert saves.shaped(1, T, bank, bank.width).load(one)
    (path,) = tmp_path.glob("*.safetensors")
    with safe_open(path, framework="pt") as file:
        metadata, rows = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no dict
    facts = json.loads(metadata["facts"])
    old = {"scale": facts["scale"], "heard": [[[1.0], 0.0]], "losses": []}
    save_file(rows, path, {**metadata, "facts": json.dumps(old)})

    assert saves.shaped(1, T, bank, bank.width).load(one) is None
    assert same(whole, run(llama_base, [one], 1, bank, saves=saves)[one.name])


def test_one_taken_aside_while_the_base_reads_in_its_slot_is_the_same(llama_base: BaseModel) -> None:
    """Its own rows are not the zeros that were there."""
    bank = LoraBank(llama_base.sites, 4)
    long, hasty = chooser(1, count=60, epochs=1), replace(learner(2, count=2), priority=1)

    packed = run(llama_base, [long], 1, bank, door=OneByOne([hasty], after=1))

    assert same(run(llama_base, [long], 1, bank)[long.name], packed[long.name])


def test_one_who_goes_on_from_a_row_is_still_measured_against_the_base(llama_base: BaseModel) -> None:
    """So the first loss is not log 2: the reference is the row of zeros, not the row it started from."""
    bank, first = LoraBank(llama_base.sites, 4), chooser(1, learning_rate=1e-2, epochs=8)
    start_P = run(llama_base, [first], 1, bank)[first.name].row_P

    again = run(llama_base, [replace(first, start=start_P)], 1, bank)[first.name]

    assert again.losses[0][1] < 0.9 * math.log(2)


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning", "bottleneck"])
def test_choosers_by_other_methods_are_the_same_alone_and_packed(llama_base: BaseModel, method: str) -> None:
    """A cleared slot is the base for every method; one answers beside them, and more come than there are slots."""
    settings = {"row_tokens": T, "max_length": T, "learning_rate": 2e-2, "epochs": 8, "patience": 3, "method": method}
    choosing, answering = make_recipe({**settings, "objective": "dpo"}), make_recipe(settings)
    users = [Learner(f"user{seed}", choosing, pairs(seed, 16), pairs(seed + 50, 4)) for seed in (1, 2, 3)]
    users.append(Learner("answerer", answering, learner(4).train))
    bank = make_bank(llama_base, [choosing.method])

    packed = run(llama_base, users, 3, bank)

    assert all(same(run(llama_base, [one], 3, bank)[one.name], packed[one.name]) for one in users)
    assert all(packed[one.name].losses[-1][1] < packed[one.name].losses[0][1] for one in users[:3])


@pytest.mark.parametrize("patience", [None, 3])
def test_a_trial_of_a_choosers_search_is_the_plain_chooser(llama_base: BaseModel, patience: int | None) -> None:
    """Though the base reads held-out pairs for it that are nobody's without a search: dropout goes on the same."""
    axes = {"rank": [2, 4], "learning_rate": [1e-3, 1e-2], "finalists": 2}
    search = Halving(chooser(1, held_out=5, epochs=4, patience=patience, search=axes), lambda _: 1)
    bank = LoraBank(llama_base.sites, 4)

    reports = search.reports(run(llama_base, list(search.trials.values()), 3, bank))

    for report in reports:
        plain = run(llama_base, [replace(report.learner, referee=None)], 3, bank)[report.learner.name]
        assert report.trained.losses == plain.losses[: report.trained.steps]
        assert same(report.trained, plain) is report.ended
    assert sum(report.ended for report in reports) == 2


def test_kept_lower_states_change_no_byte(llama_base: BaseModel) -> None:
    """The base and the learner read the same rows."""
    users = [chooser(seed, held_out=4, layers=[1], batch_rows=1, patience=2) for seed in (1, 2)]
    bank = lora_bank(llama_base, [lora_of(one.recipe) for one in users])
    lower = LowerLayers(llama_base, bank, RowStore(RowMemory(1 << 24), lambda: 0.0))

    kept = run(llama_base, users, 2, bank, compute=lower.read_rows)

    assert all(same(run(llama_base, users, 2, bank)[one.name], kept[one.name]) for one in users)


def test_an_answer_does_not_depend_on_how_many_pairs_the_others_have() -> None:
    """Losses, answers and gradients of a slot, to the bit; an idle slot has none."""
    objective = ObjectiveSpec(name="dpo")
    rows = [pack(list(enumerate(pairs(seed, count))), T)[0] for seed, count in ((1, 1), (2, 9))]
    described = [Pairs(row, objective, (0.25,) * (len(row.examples) // 2)) for row in rows]
    few_KT, many_KT = torch.rand(2, 1, T) * 5
    outcomes = []

    for group in ([few_KT], [few_KT, many_KT], [few_KT, torch.full((1, T), torch.nan)]):
        loss_KT = torch.cat(group).requires_grad_()
        losses_K, answers_KN = lesson_losses(loss_KT, described[: len(group)])
        losses_K.sum().backward()
        assert loss_KT.grad is not None
        outcomes.append((losses_K[0].item(), answers_KN[0, :1].tolist(), loss_KT.grad[0].tolist()))
    assert outcomes[0] == outcomes[1] == outcomes[2]

    idle_K, _ = lesson_losses(torch.zeros(2, T), [described[0], None])
    assert idle_K[1] == 0
    assert empty_row(T).lengths == ()


def test_held_out_pairs_are_judged_against_the_base(base: BaseModel) -> None:
    """Its loss is log 2 and it prefers nothing; what was learnt is accepted, on every pair for itself."""
    me = chooser(5, count=40, epochs=8, learning_rate=1e-2)
    bank, held_out = lora_bank(base, [lora_of(me.recipe)]), pairs(77, 20)
    row_P = run(base, [me], 2, bank)[me.name].row_P
    trials = [Trial(None, 0, held_out), Trial(row_P, me.recipe.method.scale, held_out)]

    plain, own = as_judged(evaluate(base, bank, trials, 3, T), me.recipe.objective)

    assert isinstance(own, PairScores)
    assert plain.loss == pytest.approx(math.log(2))
    assert (plain.accuracy, own.tokens) == (0, 20)
    assert own.summary()["preference_accuracy"] > 0.9
    assert own.summary()["reward_margin"] > 0 == plain.summary()["reward_margin"]
    assert own.summary()["chosen_likelier"] > plain.summary()["chosen_likelier"]
    verdict = judge(own, plain, "the base", GateSpec())
    assert verdict.accepted
    assert "nats a pair over the base" in verdict.reason


def test_documents_are_judged_as_they_are_where_no_pair_is_learnt() -> None:
    """The other objective changes nothing."""
    assert as_judged([], ObjectiveSpec()) == []
