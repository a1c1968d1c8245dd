"""A cohort's candidates in training, and those who come meanwhile: learners are the engine's, candidates are ours."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Protocol

from flows.candidates import Candidate, training_bank
from lora_core.base_model import BaseModel
from lora_core.door import Door
from lora_core.errors import TrainingError
from lora_core.learner import Learner, Trained
from lora_core.lower_layers import LowerLayers
from lora_core.planner import Plan, train_planned
from lora_core.row_store import RowStore
from lora_core.saves import Saves
from lora_core.train import Pace


class Guests(Protocol):
    """Who comes to a cohort while it trains: `lora_core.door.Door` for candidates."""

    def arrivals(self, places: int) -> Sequence[Candidate]:
        """Who comes in now, so that they can be trained beside the others: of equal base, row length and bank."""
        ...

    def dismissed(self) -> Collection[str]:
        """The labels of those whose result nobody wants any more."""
        ...

    @property
    def closing(self) -> bool:
        """Whether to stop now, with everybody's progress saved."""
        ...


def train_candidates(
    base: BaseModel,
    candidates: Sequence[Candidate],
    planned: Plan,
    watch: Callable[[Pace], None] | None = None,
    saves: Saves | None = None,
    states: RowStore | None = None,
    guests: Guests | None = None,
) -> Iterator[Candidate]:
    """Train a cohort packed, and yield each candidate once it is done, with the plan it was trained by.

    Its recipes share base, row length and bank, so neighbours change nobody's bytes.
    """
    bank = training_bank(base, candidates)
    compute = LowerLayers(base, bank, states).read_rows if states else None
    inside = _Inside(candidates, guests)
    for trained, used in train_planned(base, inside.learners, planned, bank, watch, compute, saves, inside):
        if candidate := inside.done(trained, used):
            yield candidate


class _Inside(Door):
    """Whose learners are in training, and what has become of those that are done."""

    def __init__(self, candidates: Sequence[Candidate], guests: Guests | None) -> None:
        self.guests = guests
        self._of: dict[str, Candidate] = {}  # by learner
        self._found: dict[str, dict[str, tuple[Trained, Plan]]] = {}  # by candidate, then learner
        self.learners = self._seated(candidates)

    def arrivals(self, places: int) -> Sequence[Learner]:
        """The learners of the candidates who come."""
        return self._seated(self.guests.arrivals(places)) if self.guests else ()

    def dismissed(self) -> Collection[str]:
        """All learners of the candidates who are sent away."""
        unwanted = self.guests.dismissed() if self.guests else ()
        return {name for name, candidate in self._of.items() if candidate.label in unwanted} if unwanted else ()

    @property
    def closing(self) -> bool:
        """As the guests' door is."""
        return self.guests is not None and self.guests.closing

    def done(self, trained: Trained, used: Plan) -> Candidate | None:
        """Take a learner's result in; its candidate, if that was the last."""
        candidate = self._of.pop(trained.name)
        found = self._found.setdefault(candidate.label, {})
        found[trained.name] = trained, used
        if len(found) < len(candidate.learners):
            return None
        _take(candidate, self._found.pop(candidate.label))
        return candidate

    def _seated(self, candidates: Sequence[Candidate]) -> list[Learner]:
        learners = [(learner, candidate) for candidate in candidates for learner in candidate.learners]
        self._of.update({learner.name: candidate for learner, candidate in learners})
        return [learner for learner, _ in learners]


def _take(candidate: Candidate, found: Mapping[str, tuple[Trained, Plan]]) -> None:
    """What became of a candidate; of a search its winner, under the winner's own recipe."""
    name = candidate.label
    if any(trained.outcome == "dismissed" for trained, _ in found.values()):
        candidate.trouble = "its job was cancelled, or is in other hands by now"
        return
    if candidate.search:
        try:
            candidate.trials = candidate.search.reports({trial: trained for trial, (trained, _) in found.items()})
        except TrainingError as error:
            candidate.trouble = str(error)
            return
        winner = next(report.learner for report in candidate.trials if report.won)
        candidate.recipe, name = winner.recipe, winner.name
    candidate.trained, candidate.plan = found[name]
