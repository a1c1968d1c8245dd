"""Successive halving of one user's trials (Jamieson & Talwalkar, "Non-stochastic best arm identification", 2016).

Every trial is a learner with a plain recipe of its own.  At each rung those with the lowest held-out loss go on from
where they are, at the first rung those of several rates; the others stop.  What a trial learns depends on nobody;
whether it goes on, on its rivals alone.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from lora_core.errors import RecipeError, TrainingError
from lora_core.learner import Learner, Trained
from lora_core.methods import AnyMethod, LoraSpec
from lora_core.recipe import Recipe, make_recipe
from lora_core.referee import Answers
from lora_core.search import SearchSpec


@dataclass(frozen=True)
class Report:
    """How far a trial came and how good it was: rungs it reached, and its loss at the last of them or at its end."""

    learner: Learner
    trained: Trained
    size: int  # bytes of its weights
    rung: int
    loss: float  # infinite where it has none
    won: bool = False

    @property
    def ended(self) -> bool:
        """Whether it was trained to its own end, and can win."""
        return self.trained.outcome in ("finished", "stopped early") and math.isfinite(self.loss)


class Halving:
    """The trials of one user's recipe with a search, and the referee between them."""

    def __init__(self, learner: Learner, size: Callable[[AnyMethod], int]) -> None:
        """`size` is how many bytes a trial's weights take.  Raises RecipeError, TrainingError."""
        assert learner.recipe.search  # asked for only where there is something to search
        if not learner.held_out:
            raise TrainingError(learner.name, "has no held-out examples to choose a trial by", "add examples")
        self.name, self.spec = learner.name, learner.recipe.search
        self.trials = {name: replace(learner, name=name, recipe=recipe, referee=self)
                       for name, recipe in _named(learner.name, learner.recipe, self.spec)}  # fmt: skip
        self._sizes = {name: size(trial.recipe.method) for name, trial in self.trials.items()}
        firsts: dict[str, str] = {}  # of those that differ in the rate alone: they start from the same row
        self._readers = {name: firsts.setdefault(trial.recipe.model_dump_json(exclude={"learning_rate"}), name)
                         for name, trial in self.trials.items()}  # fmt: skip
        self._begun: set[str] = set()  # by the present plan
        self._shared: dict[tuple[str, int], Answers] = {}
        self._told: list[dict[str, float]] = [{} for _ in self.spec.rungs]
        self._ended: dict[str, float] = {}
        self._verdicts: list[frozenset[str]] = []

    @property
    def digest(self) -> str:
        """The search as it was asked for: which rivals there are, when they are compared, and by which rule."""
        return f"rates apart {self.spec.model_dump_json()}"

    def rungs(self, planned: int) -> Sequence[int]:
        """The steps, of so many, after which trials are compared."""
        return [max(1, round(share * planned)) for share in self.spec.rungs]

    def begin(self, name: str) -> None:
        """A trial begins: what it told before is not known any more.

        Where it has begun before, memory ran out, and all who are not at their end begin again by a plan that may round
        otherwise: what was read for rivals by the one before is read anew.  Verdicts stand.
        """
        if name in self._begun:
            self._begun.clear()
            self._shared.clear()
        self._begun.add(name)
        for losses in (*self._told, self._ended):
            losses.pop(name, None)

    def reader(self, name: str, of_base: bool) -> str:
        """The first trial for all where the base reads; else the first of those with the same start row."""
        same = (one for one, first in self._readers.items() if of_base or first == self._readers[name])
        return next(one for one in same if one in self._begun)

    def share(self, name: str, number: int, answers: Answers) -> None:
        """What a reader heard."""
        self._shared[name, number] = answers

    def shared(self, name: str, number: int) -> Answers | None:
        """The same again; None while it is not known."""
        return self._shared.get((name, number))

    def tell(self, name: str, rung: int, loss: float) -> None:
        """How good a trial is at a rung."""
        self._told[rung][name] = loss

    def tell_end(self, name: str, loss: float | None) -> None:
        """A trial has come to an end."""
        self._ended[name] = math.inf if loss is None else loss

    def goes_on(self, name: str, rung: int) -> bool | None:
        """Whether a trial goes on; None until all who came to this rung, or ended on the way, are known."""
        while len(self._verdicts) <= rung:
            if (verdict := self._verdict(len(self._verdicts))) is None:
                return None
            self._verdicts.append(verdict)  # and it stands
        return name in self._verdicts[rung]

    def _verdict(self, rung: int) -> frozenset[str] | None:
        """Who goes on after a rung: the lowest losses, of several rates at first.

        Among equals the fewest bytes, then the order of the grid.
        """
        rivals = [name for name in self.trials if rung == 0 or name in self._verdicts[rung - 1]]
        losses = self._ended | self._told[rung]
        if not all(name in losses for name in rivals):
            return None
        order = sorted((name for name in rivals if math.isfinite(losses[name])), key=lambda n: self._rank(n, losses))
        return frozenset((order if rung else self._varied(order))[: self.spec.places(len(rivals))])

    def _varied(self, order: Sequence[str]) -> list[str]:
        """The best of as many rates as go on to the end, then all others.

        After few steps a rate looks better or worse than it will be (Wu et al., "Understanding short-horizon bias",
        2018), and its ranks look alike: by loss alone all who go on may have one rate, and it the wrong one.
        """
        best: dict[float, str] = {}
        for name in order:
            best.setdefault(self.trials[name].recipe.learning_rate, name)
        first = [*best.values()][: self.spec.last]
        return [*first, *(name for name in order if name not in first)]

    def _rank(self, name: str, losses: Mapping[str, float]) -> tuple[float, int]:
        return losses[name], self._sizes[name]

    def reports(self, trained: Mapping[str, Trained]) -> list[Report]:
        """What became of every trial, in the order of the grid, the winner marked.  Raises TrainingError.

        The winner has the fewest bytes of those whose loss is within the tolerance of the best.
        """
        found = [self._report(trial, trained[name]) for name, trial in self.trials.items()]
        ended = [report for report in found if report.ended]
        if not ended:
            reasons = sorted({report.trained.reason for report in found if report.trained.outcome == "retired"})
            raise TrainingError(self.name, f"every trial of the search failed ({'; '.join(reasons)})",
                                "lower search.learning_rate")  # fmt: skip
        limit = min(report.loss for report in ended) * (1 + self.spec.tolerance)
        winner = min((one for one in ended if one.loss <= limit), key=lambda one: (one.size, one.loss))
        return [replace(report, won=report is winner) for report in found]

    def _report(self, trial: Learner, trained: Trained) -> Report:
        reached = [rung for rung, told in enumerate(self._told) if trial.name in told]
        loss = self._ended[trial.name]
        if trained.outcome == "dropped":
            loss = self._told[reached[-1]][trial.name]
        return Report(trial, trained, self._sizes[trial.name], len(reached), loss)


def trials(recipe: Recipe) -> list[Recipe]:
    """The plain recipes that a recipe with a search stands for; without one, itself.  Raises RecipeError."""
    return [one for _, one in _named("", recipe, recipe.search)] if recipe.search else [recipe]


def around(recipe: Recipe) -> Recipe:
    """A recipe that searches around its own rate, and rank where it has one, where it does not say what to search."""
    if recipe.search:
        return recipe
    rate, ranks = recipe.learning_rate, tuple[int, ...]()
    if isinstance(recipe.method, LoraSpec):
        rank = recipe.method.rank
        ranks = tuple(sorted({max(1, rank // 2), rank, min(recipe.method.most_rank, 2 * rank)}))
    found = SearchSpec(rank=ranks, learning_rate=(rate / 4, rate / 2, rate, 2 * rate))
    return recipe.model_copy(update={"search": found})


def learner_names(name: str, recipe: Recipe) -> list[str]:
    """What the learners of a user are called whose job has this recipe: the user, or the trials of their search."""
    return [trial for trial, _ in _named(name, recipe, recipe.search)] if recipe.search else [name]


def _named(name: str, recipe: Recipe, spec: SearchSpec) -> list[tuple[str, Recipe]]:
    """Every point of the grid as a plain recipe, with a name that says what it is."""
    axes = {axis: values for axis, values in spec.axes.items() if values}
    found = []
    for point in product(*axes.values()):
        chosen = dict(zip(axes, point, strict=True))
        words = ", ".join(f"{axis} {value}" for axis, value in chosen.items())
        found.append((f"{name} ({words})", _plain(recipe, chosen)))
    return found


def _plain(recipe: Recipe, chosen: Mapping[str, object]) -> Recipe:
    """The recipe with one point's values and no search."""
    settings: dict[str, Any] = recipe.model_dump(mode="json", exclude={"search"})  # JSON, as its fields say
    for axis, value in chosen.items():
        place = settings if axis in Recipe.model_fields else settings["method"]
        if axis not in place:
            raise RecipeError("search", (f"{axis} is not a key of method {recipe.method.name}; leave it out",))
        place[axis] = value
    return make_recipe(settings, "search")
