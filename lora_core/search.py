"""What a search tries and when it halves: the part of a recipe that asks for several trials of one user.

Which trials that makes and who goes on is in `halving.py`.
"""

from collections.abc import Sequence
from functools import reduce
from itertools import pairwise
from math import ceil, prod
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_TRIALS = 256

Layers = tuple[Annotated[int, Field(ge=0)], ...] | None  # None: every layer


class SearchSpec(BaseModel):
    """A grid around a recipe, and successive halving over it (Jamieson & Talwalkar, 2016; Hyperband's inner loop)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rank: tuple[Annotated[int, Field(ge=1, le=512)], ...] = ()  # an empty axis is the recipe's own value
    learning_rate: tuple[Annotated[float, Field(gt=0)], ...] = ()
    layers: tuple[Layers, ...] = ()
    rungs: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.125, 0.375)  # shares of a trial's steps
    keep: Annotated[float, Field(gt=0, lt=1)] = 1 / 3  # share of the trials that goes on after a rung
    finalists: Annotated[int, Field(ge=1, le=MOST_TRIALS)] | None = None  # at least so many go on; None: see `least`
    tolerance: Annotated[float, Field(ge=0, le=1)] = 0.002  # a loss so near the best, in its share, is as good

    @model_validator(mode="after")
    def _is_a_grid(self) -> "SearchSpec":
        if not any(self.axes.values()):
            raise ValueError(f"there is nothing to search; give values of {', '.join(self.axes)}")
        for name, axis in self.axes.items():
            if len(set(axis)) < len(axis):
                raise ValueError(f"{name} names a value twice; keep one of each")
        if () in self.layers:
            raise ValueError("layers has an empty range; use null for every layer")
        if self.points > MOST_TRIALS:
            raise ValueError(f"it makes {self.points} trials and may make {MOST_TRIALS}; take values away")
        if any(late <= early for early, late in pairwise(self.rungs)):
            raise ValueError(f"rungs {self.rungs} do not rise; sort them")
        return self

    @property
    def axes(self) -> dict[str, Sequence[object]]:
        """What may vary, by name."""
        return {"rank": self.rank, "learning_rate": self.learning_rate, "layers": self.layers}

    @property
    def points(self) -> int:
        """How many points the grid has."""
        return prod(len(axis) or 1 for axis in self.axes.values())

    @property
    def last(self) -> int:
        """How many of them go on after the last rung."""
        return reduce(lambda trials, _: self.places(trials), self.rungs, self.points)

    @property
    def least(self) -> int:
        """How many go on at least, if it is not said: three, and a quarter of the grid.

        With the rungs and the share as they are by default, that is 37 % of the steps of a grid of twelve or more.
        """
        return self.finalists or max(3, ceil(self.points / 4))

    def places(self, trials: int) -> int:
        """How many of so many trials go on after a rung."""
        return min(trials, max(self.least, ceil(round(trials * self.keep, 9))))  # 30 * 0.1 is a little above 3
