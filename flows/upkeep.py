"""Upkeep: retention and forgetting over all tenants, and what a machine keeps of users who are gone."""

from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from flows.factory import Factory, now
from lora_core.errors import LoraError
from lora_core.recipe import make_recipe
from registry import collection, eviction, forgetting, retention
from registry.errors import RegistryError
from registry.forgetting import Receipt, Wish
from registry.models import Facts

AGAIN, EVER = timedelta(days=1), datetime.min.replace(tzinfo=UTC) + timedelta(days=1)
COLLECT_EVERY = timedelta(hours=1)  # at each tick all policies would be looked at for nothing


def forget(factory: Factory, wish: Wish) -> Receipt:
    """Forget a user, or go on with it, in the registry, the store and on this machine.

    Raises NotFound, UnderHold, NotYetForgotten and RegistryInUse.
    """
    return forgetting.forget(factory.engine, factory.store, wish, lambda served: clean_home(factory, served), now())


def keep_up(factory: Factory) -> list[str]:
    """Go on with every forgetting, and collect where it is time to; returns what could not be done, and why."""
    troubles = []
    for tenant, intent in forgetting.unfinished(factory.engine):
        try:
            forgetting.finish(
                factory.engine, factory.store, tenant, intent, lambda served: clean_home(factory, served), now()
            )
        except RegistryError as error:
            troubles.append(f"forgetting {intent}: {error}")
    for tenant in retention.due(factory.engine, now() - COLLECT_EVERY):
        try:
            collection.collect(factory.engine, factory.store, tenant, now())
        except RegistryError as error:
            troubles.append(f"collecting of tenant {tenant}: {error}")
    return troubles


def clean_home(factory: Factory, served_names: Sequence[str] = ()) -> Facts:
    """Remove from this machine's home what is of nobody any more; how much it was, by kind.

    Pulled versions, saves of trainings that no open job goes on with, and, since whose they are cannot be told, all
    states under the first adapted layer when anybody was forgotten since the last time.
    """
    home, cache = factory.settings.home_folder, factory.settings.cache
    pulled = eviction.evict(cache, served_names) + len(eviction.evict_gone(factory.engine, cache))
    found = {"pulled copies": pulled, "saves": _drop_saves(factory, home / "saves"), "states": _drop_states(factory)}
    return {f"{kind} on this machine": {"count": count} for kind, count in found.items() if count}


def _drop_saves(factory: Factory, folder: Path) -> int:
    """Remove the saves that belong to no open job."""
    if not folder.is_dir():
        return 0
    from lora_core.halving import learner_names  # imported late: needs torch
    from lora_core.saves import file_stem

    open_jobs = eviction.open_jobs(factory.engine)
    names = {owner.label for owner, _ in open_jobs}
    for owner, recipe in open_jobs:
        with suppress(LoraError):  # a recipe that nobody can read is trained by nobody
            names |= set(learner_names(owner.label, make_recipe(recipe)))
    stems, count = {file_stem(name) for name in names}, 0
    for file in folder.iterdir():
        if file.name.partition(".")[0] not in stems:
            file.unlink(missing_ok=True)
            count += 1
    return count


def _drop_states(factory: Factory) -> int:
    """Remove the kept states of all users if anybody was forgotten since they last went.

    They go once more a day later: a worker that was training somebody just then may have kept some since.
    """
    home = factory.settings.home_folder
    folder, stamp, moment = home / "states", home / "states-cleared", now()
    if not folder.is_dir():
        return 0
    last = datetime.fromisoformat(stamp.read_text()) if stamp.is_file() else EVER
    since = [(last, moment), (last - AGAIN, moment - AGAIN)]
    if not any(forgetting.anybody(factory.engine, *between) for between in since):
        return 0
    from lora_core.row_store import RowFolder  # imported late: needs torch

    files = [file for file in folder.glob("*/*/*") if file.is_file()]
    for kind in folder.iterdir():
        RowFolder(kind, budget=0).clear()
    stamp.write_text(moment.isoformat())
    return len(files)
