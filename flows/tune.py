"""A search that is looked at: what its trials came to, and the same without publishing anything."""

from collections.abc import Callable, Mapping, Sequence

from flows.candidates import Candidate, make_candidate
from flows.factory import Factory, Pinned
from flows.fitting import planned
from flows.guests import train_candidates
from lora_core.base_model import check_device, load_base
from lora_core.data.snapshot import Snapshot, load_snapshot
from lora_core.errors import TrainingError
from lora_core.recipe import Recipe
from lora_core.train import Pace
from registry import queries
from registry.names import Reference
from registry.session import reading


def rehearse(
    factory: Factory,
    label: str,
    base: Pinned,
    recipe: Recipe,
    snapshot: Snapshot,
    watch: Callable[[Pace], None] | None = None,
) -> Candidate:
    """Search as a cohort would; nothing is written to registry or store.  Raises TrainingError if all trials fail."""
    check_device(factory.settings.device or "cpu")
    loaded = load_base(base.name, base.revision, factory.settings.device or None, quantise=base.quantised)
    candidate = make_candidate(label, recipe, snapshot, loaded)
    for _ in train_candidates(loaded, [candidate], planned(factory.settings, loaded, candidate), watch):
        pass
    if candidate.trained is None:
        raise TrainingError(label, candidate.trouble, "or look at the data")
    return candidate


def newest_snapshot(factory: Factory, reference: Reference) -> Snapshot:
    """The examples that a training now would read.  Raises NotFound."""
    with reading(factory.engine) as session:
        tenant = queries.tenant_id(session, reference.tenant)
        holder = queries.holder(session, tenant, reference.user, reference.adapter)
        dataset = queries.newest_dataset(session, tenant, holder)
    return load_snapshot(factory.store.get(dataset.key), dataset.digest)


def table_rows(trials: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
    """Trials as a person reads them, the best first: those that came further before the others."""
    order = sorted(trials, key=lambda one: (-_number(one["steps"]), one["loss"] is None, _number(one["loss"])))
    return [
        {
            "rank": one["rank"],
            "rate": one["learning_rate"],
            "layers": "all" if one["layers"] is None else one["layers"],
            "rung": one["rung"],
            "outcome": one["outcome"],
            "steps": one["steps"],
            "held-out loss": one["loss"],
            "bytes": one["bytes"],
            "": "winner" if one["won"] else "",
        }
        for one in order
    ]


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
