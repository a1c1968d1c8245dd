"""Trainings that die after so many micro-steps, and those that go on from what was saved."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from lora_core.banks.bank import Bank
from lora_core.base_model import BaseModel
from lora_core.learner import Learner, Trained
from lora_core.saves import Saves
from lora_core.train import train


class Killed(Exception):
    """The process ended here."""


def doomed(folder: Path, steps: int) -> Saves:
    """Saves made after every micro-step; the one after so many kills.  Raises Killed."""
    left = steps

    def die() -> bool:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        return True

    return Saves(folder, "shape", die)


def resumed(folder: Path) -> Saves:
    """What was saved, for whoever goes on; nothing more is saved."""
    return Saves(folder, "shape", lambda: False)


def killed_and_resumed(
    base: BaseModel, cohort: Sequence[Learner], slots: int, bank: Bank, folder: Path, steps: int, row_tokens: int
) -> dict[str, Trained]:
    """A cohort that dies after so many micro-steps, and goes on in another order; results by name."""
    done: dict[str, Trained] = {}
    with suppress(Killed):
        for one in train(base, cohort, slots, row_tokens, bank, saves=doomed(folder, steps)):
            done[one.name] = one
    rest = [one for one in reversed(cohort) if one.name not in done]
    again = train(base, rest, slots, row_tokens, bank, saves=resumed(folder))
    return done | {one.name: one for one in again}
