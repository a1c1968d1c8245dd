"""Whose adapter serves whose data: each user's held-out examples under each user's pulled adapter."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from flows.candidates import make_candidate
from flows.errors import Unready
from flows.factory import Factory
from flows.fitting import load_recorded
from flows.records import recorded_methods
from lora_core.base_model import BaseModel
from lora_core.data.rendering import AnyRendered
from lora_core.data.snapshot import load_snapshot
from lora_core.evaluate import Asked, evaluate_all
from lora_core.intake import AdapterFiles, read_artifact
from lora_core.pair_scores import as_judged
from lora_core.recipe import Recipe, make_recipe
from registry import queries
from registry.names import Reference
from registry.session import reading


@dataclass(frozen=True)
class Pulled:
    """One user's adapter from the store, and the examples that were held out when it was trained."""

    label: str
    files: AdapterFiles
    held_out: tuple[AnyRendered, ...]
    recipe: Recipe


@dataclass(frozen=True)
class Matrix:
    """Mean held-out loss a token (or pair) in nats: the base's, and of each user's data (row) under each adapter."""

    labels: tuple[str, ...]
    base: tuple[float, ...]
    losses: tuple[tuple[float, ...], ...]

    def rows(self) -> list[dict[str, object]]:
        """One row a user: base, own adapter, mean of the others' adapters."""
        return [
            {"user": label, "base": self.base[index], "own": own, "others": self._others(index)}
            for index, (label, own) in enumerate(zip(self.labels, self.diagonal, strict=True))
        ]

    def mean(self) -> dict[str, object]:
        """The mean over users, as one more row."""
        others = [self._others(index) for index in range(len(self.labels))]
        return {"user": "mean", "base": fmean(self.base), "own": fmean(self.diagonal), "others": fmean(others)}

    @property
    def diagonal(self) -> tuple[float, ...]:
        """Each user's own."""
        return tuple(row[index] for index, row in enumerate(self.losses))

    def _others(self, index: int) -> float:
        return fmean(loss for column, loss in enumerate(self.losses[index]) if column != index)


def cross(factory: Factory, references: Sequence[str]) -> Matrix:
    """Judge the latest adapters of these users on each other's held-out data.  Raises Unready for unlike bases."""
    if len(set(references)) < 2:
        raise Unready("a matrix needs at least two users", "name more of them")
    base, users = pull_all(factory, references)
    asked = [
        Asked(files.spec, tensors, user.held_out)
        for user in users
        for files, tensors in [(user.files, None), *((other.files, other.files.tensors) for other in users)]
    ]
    row_tokens = max(user.recipe.row_tokens for user in users)
    scores = evaluate_all(base, asked, factory.settings.slots, row_tokens)
    width = len(users) + 1
    by_user = [scores[start : start + width] for start in range(0, len(scores), width)]
    judged = [as_judged(own, user.recipe.objective) for own, user in zip(by_user, users, strict=True)]
    table = [[one.loss for one in own] for own in judged]
    labels = tuple(user.label for user in users)
    return Matrix(labels, tuple(row[0] for row in table), tuple(tuple(row[1:]) for row in table))


def pull_all(factory: Factory, references: Sequence[str]) -> tuple[BaseModel, list[Pulled]]:
    """The one base of these users, loaded, and each one's adapter and held-out examples."""
    base: BaseModel | None = None
    users = []
    for text in references:
        reference = Reference.parse(text)
        with reading(factory.engine) as session:
            tenant = queries.tenant_id(session, reference.tenant)
            version = queries.version(session, tenant, reference)
            dataset, made_on, _ = queries.lineage(session, tenant, version)
            exactly = f"{reference.label}:{version.number}"  # an alias may move meanwhile
        base = base or load_recorded(factory.settings, made_on)
        if base.digest != made_on.digest:
            raise Unready(f"{text} was trained on another base than the rest", "compare users of one base")
        files = read_artifact(factory.client.pull_living(exactly), base, recorded_methods(version.recipe))
        recipe = make_recipe(version.recipe)
        snapshot = load_snapshot(factory.store.get(dataset.key), dataset.digest)
        held_out = make_candidate(reference.label, recipe, snapshot, base).learner.held_out
        users.append(Pulled(reference.label, files, held_out, recipe))
    assert base  # there was at least one reference
    return base, users
