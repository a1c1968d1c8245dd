"""Examinations need no backward pass: they gather, and are read in forward passes of their own, in all slots."""

from collections.abc import Sequence
from dataclasses import replace

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
from lora_core.seating import EXAMINED, GATHERED
from lora_core.train import train
from tests.lora_core.conftest import T, examples, learner, lora_of, recipe

K = 4


def readings(base: BaseModel, learners: Sequence[Learner]) -> list[tuple[int, int]]:
    """Train them; how many rows were learnt from, and how many only measured, in each micro-step."""
    found: list[tuple[int, int]] = []

    def compute(base: BaseModel, cohort: Cohort, lessons: Sequence[Lesson | None], row_tokens: int) -> Answers:
        weights = [lesson.weight for lesson in lessons if lesson]
        found.append((sum(map(bool, weights)), weights.count(0.0)))
        return read_rows(base, cohort, lessons, row_tokens)

    assert all(one.outcome == "finished" for one in train(base, learners, K, T, compute=compute))
    return found


def test_examinations_gather_until_they_fill_all_slots(llama_base: BaseModel) -> None:
    """They are read in the slots of those who learn, too, and never beside them."""
    learners = [learner(n, count=6 + 4 * n, held_out=12, epochs=3, patience=9, batch_size=4) for n in range(6)]

    read = readings(llama_base, learners)

    held_out = sum(len(pack(list(enumerate(one.held_out)), T)) for one in learners)
    measured = [rows for learnt, rows in read if not learnt]
    assert all(not learnt or not measured for learnt, measured in read)
    assert sum(measured) == 4 * held_out  # before the first epoch and after each
    assert len(measured) < 1.2 * sum(measured) / K


def test_who_learns_is_not_kept_waiting_by_a_long_examination(llama_base: BaseModel) -> None:
    """After eight micro-steps without it there is one with it."""
    long = learner(0, count=2, held_out=300, epochs=1, patience=1)
    read = readings(llama_base, [long, *(learner(n, count=40, batch_size=1) for n in range(1, 4))])

    turns = 2 * ([(0, K)] * EXAMINED + [(K - 1, 0)])
    assert read[: len(turns)] == turns


def test_one_examination_does_not_wait_for_ever(llama_base: BaseModel) -> None:
    """Its slot stands empty meanwhile; where others can read in it, it waits a little longer."""
    for batch_size in (1, 40):
        short = learner(0, count=2, held_out=2, epochs=1, patience=1)
        others = (learner(n, count=160, batch_size=batch_size) for n in range(1, 4))
        read = readings(llama_base, [short, *others])

        first = next(number for number, (_, measured) in enumerate(read) if measured)
        assert first == (GATHERED if batch_size > 1 else 1)
        assert all(learnt == (K if batch_size > 1 else K - 1) for learnt, _ in read[:first])


def test_a_slot_that_waits_with_broken_weights_poisons_nobody_who_reads_in_it(llama_base: BaseModel) -> None:
    """While nobody does, its gradient becomes NaN; then a learner of several rows a step reads there."""
    bank = lora_bank(llama_base, [lora_of(recipe())])
    bad = replace(learner(0, count=2, held_out=1, epochs=1, patience=1), start=torch.full((bank.width,), torch.nan))
    good = [learner(1, count=14, batch_size=8, epochs=6), *(learner(n, count=40, batch_size=1) for n in range(2, 8))]
    expected = {one.name: one.row_P for one in train(llama_base, good, 8, T, bank)}

    trained = {one.name: one for one in train(llama_base, [bad, *good], 8, T, bank)}

    assert trained[bad.name].outcome == "retired"
    for name, row_P in expected.items():
        assert trained[name].outcome == "finished"
        assert torch.equal(trained[name].row_P, row_P)


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


def test_an_examination_leaves_nothing_behind(base: BaseModel) -> None:
    """No gradient, and no memory for a backward pass."""
    bank = lora_bank(base, [lora_of(recipe())])
    cohort = Cohort(K, bank.width, torch.device("cpu"), torch.float32)
    rows = [pack(list(enumerate(examples(number, 2))), T)[0] for number in range(K)]
    for slot in range(K):
        cohort.admit(slot, torch.full((bank.width,), 0.01), 2.0)

    def peak(weight: float) -> int:
        with bank.attached(base, cohort), LiveBytes(torch.device("cpu")) as live:
            read_rows(base, cohort, [Lesson(row, weight, 0.0, 0) for row in rows], T)
        most: int = live.peak
        return most

    examined = peak(0.0)
    assert not cohort.gradient_KP.any()
    assert peak(1.0) > 2 * examined
    assert cohort.gradient_KP.any(dim=1).all()
