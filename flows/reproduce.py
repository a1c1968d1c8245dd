"""Train a published version again, alone, from what its manifest records, and compare the bytes."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flows.candidates import make_candidate
from flows.errors import Unready
from flows.factory import Factory
from flows.finished import code_versions, computed_on
from flows.fitting import load_recorded
from lora_core.artifact import MANIFEST, WEIGHTS, safetensors_bytes
from lora_core.banks.table import make_bank
from lora_core.base_model import BaseModel
from lora_core.data.snapshot import load_snapshot
from lora_core.halving import trials
from lora_core.planner import Plan, train_planned
from lora_core.recipe import Recipe, make_recipe
from lora_core.search import SearchSpec
from registry import queries
from registry.names import Reference
from registry.session import reading


@dataclass(frozen=True)
class Reproduction:
    """SHA-256 of a version's weights as published and as trained again, and what differed around it: then, now."""

    reference: str
    published: str
    again: str
    differs: Mapping[str, tuple[str, str]]

    @property
    def equal(self) -> bool:
        """Whether every byte came out the same."""
        return self.published == self.again


def reproduce(factory: Factory, text: str) -> Reproduction:
    """Train the version that a reference means once more, at its slots, row length and bank.

    Raises Unready when the base or its files are not those it was trained on.
    """
    reference = Reference.parse(text)
    with reading(factory.engine) as session:
        tenant = queries.tenant_id(session, reference.tenant)
        version = queries.version(session, tenant, reference)
        dataset, made_on, _ = queries.lineage(session, tenant, version)
        exactly = f"{reference.label}:{version.number}"  # an alias may move meanwhile
    manifest = json.loads((factory.client.pull_living(exactly) / MANIFEST).read_text(encoding="utf-8"))
    base = load_recorded(factory.settings, made_on)
    if base.digest != made_on.digest:
        raise Unready(f"the files of {made_on.name} have changed since {text} was trained", "bring them back")

    recipe = make_recipe(manifest["recipe"])  # of a search the winner's; the registry keeps what was asked for
    snapshot = load_snapshot(factory.store.get(dataset.key), dataset.digest)
    learner = make_candidate(reference.label, recipe, snapshot, base).learner
    shape = manifest["cohort"]
    bank = make_bank(base, [one.method for one in _tried(recipe, manifest)], shape["rank"])
    planned = Plan(shape["slots"], shape["row_tokens"], compiled=shape.get("compiled", False))
    ((trained, _),) = train_planned(base, [learner], planned, bank)

    again = hashlib.sha256(safetensors_bytes(bank.to_tensors(trained.row_P, recipe.method))).hexdigest()
    published = manifest["files"][WEIGHTS]["sha256"]
    return Reproduction(exactly, published, again, _differences(manifest, base))


def _tried(recipe: Recipe, manifest: Mapping[str, Any]) -> list[Recipe]:  # JSON
    """The recipes that shared the bank: a search's trials."""
    if "search" not in manifest:
        return [recipe]
    return trials(recipe.model_copy(update={"search": SearchSpec.model_validate(manifest["search"]["spec"])}))


def _differences(manifest: Mapping[str, Mapping[str, str]], base: BaseModel) -> dict[str, tuple[str, str]]:
    """Which versions and which device are not what they were."""
    then = {**manifest["versions"], **manifest["device"]}
    now = {**code_versions(), **computed_on(base)}
    return {name: (then[name], now.get(name, "none")) for name in sorted(then) if then[name] != now.get(name)}
