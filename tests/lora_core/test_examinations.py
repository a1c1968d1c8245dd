"""Examinations need no backward pass: those that fill all slots are read in one forward pass of their own."""

from collections.abc import Sequence
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_core.banks.lora import lora_bank
from lora_core.base_model import BaseModel
from lora_core.cohort import Cohort
from lora_core.data.packing import pack
from lora_core.learner import Learner, Lesson
from lora_core.memory import LiveBytes
from lora_core.micro_step import read_rows
from lora_core.referee import Answers
from lora_core.seating import EXAMINED
from lora_core.train import train
from tests.lora_core.conftest import T, examples, learner, lora_of, recipe

K = 4


@pytest.fixture
def readings() -> list[tuple[int, int]]:
    """How many rows were learnt from, and how many only measured, in each micro-step of `noted`."""
    return []


def train_noted(base: BaseModel, learners: Sequence[Learner], readings: list[tuple[int, int]]) -> None:
    """Train them, and note what is read when."""

    def compute(base: BaseModel, cohort: Cohort, lessons: Sequence[Lesson | None], row_tokens: int) -> Answers:
        weights = [lesson.weight for lesson in lessons if lesson]
        readings.append((sum(map(bool, weights)), weights.count(0.0)))
        return read_rows(base, cohort, lessons, row_tokens)

    assert all(one.outcome == "finished" for one in train(base, learners, K, T, compute=compute))


def test_examinations_that_fill_all_slots_are_read_alone(
    llama_base: BaseModel, readings: list[tuple[int, int]]
) -> None:
    """Also in the slots of those who learn; what is left over is read beside them, and no more than there is."""
    learners = [learner(n, count=6 + 4 * n, held_out=30, epochs=3, patience=9, batch_size=2) for n in range(6)]

    train_noted(llama_base, learners, readings)

    alone = sum(measured for learnt, measured in readings if not learnt)
    beside = sum(measured for learnt, measured in readings if learnt)
    held_out = sum(len(pack(list(enumerate(one.held_out)), T)) for one in learners)
    assert alone + beside == 4 * held_out  # before the first epoch and after each
    assert alone > 4 * beside
    assert all(measured < K for learnt, measured in readings if learnt)


def test_who_learns_is_not_kept_waiting_by_a_long_examination(
    llama_base: BaseModel, readings: list[tuple[int, int]]
) -> None:
    """After three micro-steps without it there is one with it."""
    long = learner(0, count=2, held_out=200, epochs=1, patience=1)
    train_noted(llama_base, [long, *(learner(n, count=40, batch_size=1) for n in range(1, 4))], readings)

    assert readings[:8] == 2 * ([(0, K)] * EXAMINED + [(K - 1, 1)])


@given(st.lists(st.tuples(st.integers(0, K - 1), st.integers(0, K - 1)), max_size=6), st.booleans())
def test_borrowed_slots_are_given_back_as_they_were(moves: list[tuple[int, int]], half: bool) -> None:
    """Weights and scale, to the bit; what only its owner reads was never touched."""
    torch.manual_seed(len(moves))
    cohort = Cohort(K, 5, torch.device("cpu"), torch.bfloat16 if half else torch.float32)
    for slot in range(K):
        cohort.admit(slot, torch.randn(5), slot + 0.5)
    before = [tensor.clone() for tensor in (cohort.weights_KP, cohort.working_KP, cohort.scale_K11)]

    lanes = {lane: home for home, lane in moves if home != lane}
    lanes = {lane: home for lane, home in lanes.items() if home not in lanes}
    for lane, home in lanes.items():
        cohort.borrow(home, lane)

    assert all(torch.equal(cohort.working_KP[lane], before[1][home]) for lane, home in lanes.items())
    assert all(torch.equal(cohort.scale_K11[lane], before[2][home]) for lane, home in lanes.items())
    cohort.give_back()
    assert all(map(torch.equal, (cohort.weights_KP, cohort.working_KP, cohort.scale_K11), before))


def test_a_loss_is_the_same_beside_learners_and_without(base: BaseModel) -> None:
    """To the bit, although without them nothing is kept for a backward pass."""
    bank = lora_bank(base, [lora_of(recipe())])
    cohort = Cohort(K, bank.width, torch.device("cpu"), torch.float32)
    rows = [pack(list(enumerate(examples(number, 2))), T)[0] for number in range(K)]
    for slot in range(K):
        cohort.admit(slot, torch.randn(bank.width, generator=torch.Generator().manual_seed(slot)) / 20, 2.0)

    def read(learning: Sequence[bool]) -> tuple[Answers, int]:
        lessons = [Lesson(row, float(learns), 0.0, 0) for row, learns in zip(rows, learning, strict=True)]
        with bank.attached(base, cohort), LiveBytes(torch.device("cpu")) as live:
            return read_rows(base, cohort, lessons, T), live.peak

    measured, little = read([False] * K)
    assert not cohort.gradient_KP.any()
    for learning in product([False, True], repeat=K):
        answers, peak = read(learning)
        assert answers == measured
        assert not any(learning) or peak > 1.5 * little
        assert [bool(gradient_P.any()) for gradient_P in cohort.gradient_KP] == list(learning)
        cohort.gradient_KP.zero_()
