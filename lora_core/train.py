"""Train a cohort: K slots, each at its own place in its own user's curriculum, one forward and backward pass for all.

No user waits for another's epoch: one may be stepping while its neighbour is half-way and a third has just sat down.
K slots, T tokens a slot, P numbers a user.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from lora_core.allocators import tighten
from lora_core.banks.bank import Bank
from lora_core.banks.table import make_bank
from lora_core.base_model import BaseModel
from lora_core.cohort import Cohort
from lora_core.door import SHUT, Door
from lora_core.height import Lowest, least_height
from lora_core.learner import Learner, Lesson, Trained
from lora_core.micro_step import read_rows
from lora_core.referee import Answers
from lora_core.room import Room
from lora_core.saves import Saves

Compute = Callable[[BaseModel, Cohort, Sequence[Lesson | None], int], Answers]


@dataclass(frozen=True)
class Pace:
    """How far a cohort is, told once a micro-step: what a progress bar shows."""

    micro_steps: int
    training: tuple[str, ...]
    waiting: int
    finished: int
    tokens: int  # of examples, read so far
    room: int  # tokens there was room for so far
    rows: int  # read so far
    rows_left: int  # about how many are still to be read, if nobody stops early
    read: Mapping[str, int]  # in this micro-step: tokens by learner


def train(
    base: BaseModel,
    learners: Iterable[Learner],
    slots: int,
    row_tokens: int,
    bank: Bank | None = None,
    watch: Callable[[Pace], None] | None = None,
    door: Door = SHUT,
    compute: Compute | None = None,
    saves: Saves | None = None,
) -> Iterator[Trained]:
    """Train every learner, `slots` at a time, and yield each as it finishes.

    `door` is asked after every micro-step who comes and who goes; with `saves`, learners go on from where a process
    before this one was killed or stopped.  A micro-step computes up to the highest slot that is read in, or all where
    rounding depends on it.  At a fixed (slots, row_tokens, bank) a learner's row has the same bytes whoever the others
    are, whichever slots it had, and whether or not it was taken aside, or saved and resumed.  A learner whose numbers
    stop being finite is retired alone, with its last good row.  Raises ValueError for two of one name at once.
    """
    tighten(base.model.device)
    learners, compute = list(learners), compute or read_rows
    bank = bank or make_bank(base, [learner.recipe.method for learner in learners])
    cohort = Cohort(slots, bank.width, base.model.device, base.model.dtype)
    shaped = saves and saves.shaped(slots, row_tokens, bank, bank.width)
    room = Room(cohort, bank, row_tokens, shaped, least_height(base, slots))
    room.enter(learners)
    micro_steps = finished = tokens = rows = computed = 0

    with Lowest(base, bank, cohort) as lowest:
        while not door.closing and (room.busy or room.enter(door.arrivals(slots))):
            room.seat()
            lessons = room.deal()
            read = room.readers(lessons)
            height = room.height(slot for slot, lesson in enumerate(lessons) if lesson)

            answers = compute(base, lowest.slots(height), lessons[:height], row_tokens)

            done = [*room.take_in(answers), *room.dismiss(door.dismissed())]
            micro_steps, finished, tokens = micro_steps + 1, finished + len(done), tokens + sum(read.values())
            rows, computed = rows + sum(lesson is not None for lesson in lessons), computed + height
            if watch:  # before anybody leaves: who counts what a step cost has counted it by then
                counts = (room.waiting, finished, tokens, computed * row_tokens, rows, room.rows_left)
                watch(Pace(micro_steps, room.names, *counts, read))
            yield from done
            if saves and saves.due():
                room.save()
            if room.busy:
                room.enter(door.arrivals(room.places))
        if room.busy:
            room.save(last=True)
