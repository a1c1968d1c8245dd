"""What a plan of the cohort is told of a user on its way, without a base to train on."""

from collections.abc import Iterator

import pytest
import torch

from lora_core.curriculum import Student
from lora_core.data.rendering import Rendered, RenderedPair
from lora_core.learner import Learner
from lora_core.objectives import ObjectiveSpec
from tests.lora_core.conftest import T, recipe

HALF = Rendered((1,) * (T // 2 + 1), (True,) * (T // 2 + 1))  # of which no two fit into a row
PAIR = RenderedPair(Rendered((1,) * (T // 2), (True,) * (T // 2)), Rendered((2,) * (T // 2), (True,) * (T // 2)))


def rows_to_come(learner: Learner) -> Iterator[tuple[int, int]]:
    """Before each assignment: how many rows the student says it still reads, and how many it had read."""
    student, read = Student(learner, T, lambda: torch.zeros(1)), 0
    stream, heard, paired = student.study(), None, learner.recipe.objective.paired
    try:
        while True:
            assignment = next(stream) if heard is None else stream.send(heard)
            yield student.rows_left, read
            read += len(assignment.lessons)
            heard = [[1.0] * (len(one.row.lengths) // 2 if paired else 1) for one in assignment.lessons], 0.0
    except StopIteration:
        yield 0, read


@pytest.mark.parametrize("batch_rows", [None, 4])
@pytest.mark.parametrize("patience", [None, 99])
@pytest.mark.parametrize("max_steps", [None, 3])
@pytest.mark.parametrize("paired", [False, True])
def test_rows_left_are_those_that_are_read(
    batch_rows: int | None, patience: int | None, max_steps: int | None, paired: bool
) -> None:
    """Where rows are alike, to the row, however empty they are: who seems to be done is in nobody's way."""
    settings = recipe(batch_rows=batch_rows, patience=patience, max_steps=max_steps, epochs=3)
    settings = settings.model_copy(update={"objective": ObjectiveSpec(name="dpo")}) if paired else settings
    learner = Learner("user", settings, (PAIR if paired else HALF,) * 8, (PAIR if paired else HALF,) * 5)

    *moments, (_, total) = rows_to_come(learner)

    assert [left for left, _ in moments] == [total - read for _, read in moments]


def test_rows_left_of_any_fullness_come_to_what_they_are() -> None:
    """The estimate is off by a fifth at most, and not at all at the end."""
    lengths = [T // 8 * (1 + number % 7) for number in range(64)]
    data = tuple(Rendered((1,) * length, (True,) * length) for length in lengths)

    *moments, (_, total) = rows_to_come(Learner("user", recipe(batch_size=8, epochs=4), data))

    assert all(abs(left - (total - read)) <= total / 5 for left, read in moments)
    last, read = moments[-1]
    assert abs(last - (total - read)) <= 1
