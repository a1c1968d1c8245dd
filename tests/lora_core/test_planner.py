"""How many users train at once, and what becomes of them when memory runs out all the same."""

import weakref
from collections.abc import Sequence
from functools import cache

import pytest
import torch

from lora_core import planner
from lora_core.banks.lora import LoraBank, lora_bank
from lora_core.base_model import BaseModel
from lora_core.budget import Weights, fewer_bits
from lora_core.cohort import Cohort
from lora_core.errors import MemoryTooSmall
from lora_core.learner import Learner, Lesson, Trained
from lora_core.memory import predict
from lora_core.micro_step import Replay, read_rows
from lora_core.planner import Plan, plan, train_planned
from lora_core.referee import Answers
from lora_core.train import Compute, Pace, train
from tests.lora_core.conftest import T, learner, lora_of, recipe


@pytest.fixture(autouse=True)
def _predicted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prediction takes half a second, and a test's plans ask for the same ones."""
    monkeypatch.setattr(planner, "predict", cache(predict))


@pytest.fixture
def bank(base: BaseModel) -> LoraBank:
    """Of users of the usual recipe."""
    return lora_bank(base, [lora_of(recipe())])


@pytest.mark.slow
@pytest.mark.parametrize("base", ["llama", pytest.param("gpt2", marks=pytest.mark.long)], indirect=True)
def test_slots_are_as_many_as_fit(base: BaseModel, bank: LoraBank) -> None:
    """To the byte: with one byte less it is checkpointing, and below that half of them."""
    eight, eight_forgetful = (predict(base, bank, 8, T, True, forget) for forget in (False, True))

    assert plan(base, bank, eight, T, 16) == Plan(8, T, False, eight)
    assert plan(base, bank, eight - 1, T, 16) == Plan(8, T, True, eight_forgetful)
    assert plan(base, bank, eight_forgetful - 1, T, 16).slots == 4


def test_no_more_slots_are_planned_than_are_asked_for(base: BaseModel, bank: LoraBank) -> None:
    """However much memory there is."""
    assert plan(base, bank, 1 << 40, T, 3) == Plan(3, T, False, predict(base, bank, 3, T))


def test_where_not_even_one_slot_fits_the_numbers_are_told(base: BaseModel, bank: LoraBank) -> None:
    """What it takes, what there is, and what to change."""
    with pytest.raises(MemoryTooSmall) as refused:
        plan(base, bank, 1 << 16, T, 16)

    assert "there are 0.1; 4bit would still need 0." in str(refused.value)
    assert "lower row_tokens or rank, raise --memory or LORA_MEMORY" in str(refused.value)


def test_the_bits_that_would_fit_are_told(base: BaseModel, bank: LoraBank) -> None:
    """As many as possible; whether the base becomes another one is the reader's to decide."""
    needed = min(predict(base, bank, 1, T, True, forget) for forget in (False, True))
    in_8, in_4 = (size for _, size in fewer_bits(Weights.of(base), "", needed))

    for budget, bits in ((needed - 1, "8bit"), (in_8 - 1, "4bit")):
        with pytest.raises(MemoryTooSmall, match=f"in {bits} it would need about .*LORA_QUANTISE={bits}, another base"):
            plan(base, bank, budget, T, 16)
    with pytest.raises(MemoryTooSmall, match="4bit would still need"):
        plan(base, bank, in_4 - 1, T, 16)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["llama", pytest.param("gpt2", marks=pytest.mark.long)], indirect=True)
def test_rows_are_shortened_only_where_not_even_one_slot_fits(base: BaseModel, bank: LoraBank) -> None:
    """By halves, and never below the longest example."""
    least = min(predict(base, bank, 1, T, True, forget) for forget in (False, True))

    assert plan(base, bank, least, T, 16, shortest_row=20).row_tokens == T
    assert plan(base, bank, least - 1, T, 16, shortest_row=20).row_tokens == T // 2
    with pytest.raises(MemoryTooSmall):
        plan(base, bank, 1 << 16, T, 16, shortest_row=20)


@pytest.mark.slow
def test_peaks_grow_evenly_with_slots(base: BaseModel, bank: LoraBank) -> None:
    """So that halving finds the most: each further slot costs the same, but for the rounding of blocks."""
    peaks = [predict(base, bank, slots, T) for slots in (8, 16, 24)]

    assert (peaks[2] - peaks[1]) / (peaks[1] - peaks[0]) == pytest.approx(1, abs=0.001)


def full_above(slots: int, error: Exception, after: int = 3) -> Compute:
    """A device that has no room for more than some slots, which shows in a later micro-step and amid a backward."""
    calls: list[int] = []

    def compute(base: BaseModel, cohort: Cohort, lessons: Sequence[Lesson | None], row_tokens: int) -> Answers:
        calls.append(cohort.slots)
        losses = read_rows(base, cohort, lessons, row_tokens)
        if cohort.slots > slots and calls.count(cohort.slots) > after:
            cohort.gradient_KP += 1
            raise type(error)(*error.args)  # anew: an error holds on to whatever was there when it was raised
        return losses

    return compute


def by_name(trained: Sequence[tuple[Trained, Plan]]) -> dict[str, tuple[Trained, Plan]]:
    """Results and their plans by name."""
    return {one.name: (one, planned) for one, planned in trained}


ERRORS = (
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
)


@pytest.mark.parametrize("error", ERRORS)
def test_nobody_is_lost_when_memory_runs_out(llama_base: BaseModel, error: Exception) -> None:
    """First layers forget, then slots are halved; everybody has the bytes that the plan it ended by gives."""
    learners = [learner(seed, count=seed + 20) for seed in range(1, 7)]
    bank = lora_bank(llama_base, [lora_of(recipe())])

    found = by_name([*train_planned(llama_base, learners, Plan(4, T), bank, compute=full_above(2, error))])

    assert {name: one.outcome for name, (one, _) in found.items()} == {one.name: "finished" for one in learners}
    expected = {one.name: one.row_P for one in train(llama_base, learners, 2, T, bank)}
    for name, (one, planned) in found.items():
        assert planned == Plan(2, T, True)
        assert torch.equal(one.row_P, expected[name])


def test_whoever_had_finished_stays(llama_base: BaseModel) -> None:
    """Only the others begin again, once each."""
    learners = [learner(1, count=2), learner(2, count=30), learner(3, count=30)]
    bank = lora_bank(llama_base, [lora_of(recipe())])
    full = full_above(1, torch.OutOfMemoryError("full"), after=8)

    found = [*train_planned(llama_base, learners, Plan(2, T), bank, compute=full)]

    assert [(one.name, planned.slots) for one, planned in found][0] == ("user1", 2)
    assert sorted((one.name, planned.slots) for one, planned in found[1:]) == [("user2", 1), ("user3", 1)]


def test_a_device_without_room_for_one_says_so(llama_base: BaseModel) -> None:
    """Rather than trying for ever; and the base is as it was."""
    bank = lora_bank(llama_base, [lora_of(recipe())])
    modules = dict(llama_base.model.named_modules())

    with pytest.raises(torch.OutOfMemoryError):
        [*train_planned(llama_base, [learner(1)], Plan(4, T), bank, compute=full_above(0, ERRORS[0], after=0))]

    assert dict(llama_base.model.named_modules()) == modules


def test_another_error_is_no_reason_to_try_again(llama_base: BaseModel) -> None:
    """It would only come again."""
    seen: list[Pace] = []
    bank = lora_bank(llama_base, [lora_of(recipe())])
    broken = full_above(0, RuntimeError("a broken kernel"), after=0)

    with pytest.raises(RuntimeError, match="a broken kernel"):
        [*train_planned(llama_base, [learner(1)], Plan(4, T), bank, watch=seen.append, compute=broken)]

    assert seen == []


def test_the_first_cohort_is_gone_before_the_next_is_made(llama_base: BaseModel) -> None:
    """Else the smaller one would have to fit beside it."""
    met: list[weakref.ref[Cohort]] = []
    alive: list[int] = []
    bank = lora_bank(llama_base, [lora_of(recipe())])
    full = full_above(1, ERRORS[0], after=0)

    def compute(base: BaseModel, cohort: Cohort, lessons: Sequence[Lesson | None], row_tokens: int) -> Answers:
        if not met or met[-1]() is not cohort:
            met.append(weakref.ref(cohort))
        alive.append(sum(one() is not None for one in met))
        return full(base, cohort, lessons, row_tokens)

    learners: list[Learner] = [learner(1), learner(2)]
    assert len([*train_planned(llama_base, learners, Plan(2, T), bank, compute=compute)]) == 2
    assert len(met) == 3
    assert set(alive) == {1}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: test_gpu.py")
def test_where_nothing_can_be_recorded_all_runs_as_it_is(llama_base: BaseModel) -> None:
    """The setting may be on for a worker whose base is on a CPU, or whose cohort learns from pairs."""
    learners = [learner(seed, held_out=2, patience=2, dropout=0.1) for seed in (1, 2, 3)]
    bank = lora_bank(llama_base, [lora_of(learners[0].recipe)])
    replay = Replay()

    plain = {one.name: one.row_P for one in train(llama_base, learners, 2, T, bank)}
    asked = {one.name: one.row_P for one in train(llama_base, learners, 2, T, bank, compute=replay)}
    ways = [one.row_P for one, _ in train_planned(llama_base, learners, Plan(2, T, recorded=True), bank)]

    assert replay._refused
    assert all(torch.equal(asked[name], row_P) for name, row_P in plain.items())
    assert len(ways) == 3
    assert all(any(torch.equal(one_P, row_P) for row_P in plain.values()) for one_P in ways)
