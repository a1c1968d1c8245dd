"""Who may stop a learner half-way: what a curriculum and its judge say to each other, and rivals to one another."""

from collections.abc import Sequence
from typing import Protocol

from lora_core.errors import LoraError

Answers = list[list[float]]  # each lesson's summed loss, or of each of its pairs the gain over the base


class Referee(Protocol):
    """Decides by held-out loss, after some of a learner's steps, whether it goes on.

    What it says may depend on what it was told alone, never on when or in which order.
    """

    @property
    def digest(self) -> str:
        """Names everything that decides what it says besides what it is told."""

    def rungs(self, planned: int) -> Sequence[int]:
        """The steps, of so many, after which it is told and asked."""

    def begin(self, name: str) -> None:
        """A learner begins, or begins again where memory ran out: what it said before is not what it will say."""

    def tell(self, name: str, rung: int, loss: float) -> None:
        """How good a learner is at a rung."""

    def reader(self, name: str, of_base: bool) -> str:
        """Who reads, before the first step, for a learner: itself, or a rival whose row, or base, is the same then."""

    def share(self, name: str, number: int, answers: Answers) -> None:
        """What a reader heard, to the so-manieth thing it read for its rivals."""

    def shared(self, name: str, number: int) -> Answers | None:
        """The same again; None while it is not known."""

    def tell_end(self, name: str, loss: float | None) -> None:
        """A learner has come to an end: how good its result is; None where it has none."""

    def goes_on(self, name: str, rung: int) -> bool | None:
        """Whether a learner goes on after a rung; None while that is not known."""


class Dropped(LoraError):
    """A learner's referee stopped it: after which step."""

    def __init__(self, step: int) -> None:
        super().__init__(step)

    def __str__(self) -> str:
        return "others were better after step {}".format(*self.args)
