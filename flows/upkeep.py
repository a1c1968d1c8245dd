"""Upkeep: the sweep, retention and forgetting over all tenants, and what a machine keeps of users who are gone."""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from uuid import UUID

from flows.factory import Factory, now
from lora_core.errors import LoraError
from lora_core.recipe import make_recipe
from registry import collection, eviction, forgetting, retention, uploads
from registry.errors import RegistryError
from registry.forgetting import Receipt, Wish
from registry.models import Facts
from registry.names import TenantId

AGAIN, EVER = timedelta(days=1), datetime.min.replace(tzinfo=UTC) + timedelta(days=1)
EVERY = timedelta(hours=1)  # between two collections; at each tick they would find nothing


def forget(factory: Factory, wish: Wish) -> Receipt:
    """Forget a user, or go on with it, in the registry, the store and on this machine.

    Raises NotFound, UnderHold, NotYetForgotten, NamesakeLeft and RegistryInUse.
    """
    return forgetting.forget(factory.engine, factory.store, wish, partial(clean_home, factory), now())


def keep_up(factory: Factory) -> list[str]:
    """Sweep, and go on with every forgetting; once an hour collect and tidy this machine.

    Returns what failed, and why.  Raises DatabaseUnavailable, before anything is done.
    """
    jobs: list[tuple[str, Callable[[], object]]] = [("sweeping", partial(_sweep, factory))]
    for tenant, intent in forgetting.unfinished(factory.engine):
        jobs.append((f"forgetting {intent}", partial(_finish, factory, tenant, intent)))
    for tenant in retention.due(factory.engine, now() - EVERY):
        collect = partial(collection.collect, factory.engine, factory.store, tenant, now())
        jobs.append((f"collecting of tenant {tenant}", collect))
    jobs.append(("tidying", partial(_tidy, factory)))
    troubles = []
    for what, do in jobs:  # the trouble of one does not hold up the others
        try:
            do()
        except (RegistryError, OSError) as error:  # a home that is full, or not to be written to, too
            troubles.append(f"{what}: {error}")
    return troubles


def _sweep(factory: Factory) -> None:
    """Clear what uploads left that never became versions."""
    uploads.sweep(factory.engine, factory.store, now())


def _finish(factory: Factory, tenant: TenantId, intent: UUID) -> None:
    clean = partial(clean_home, factory)
    forgetting.finish(factory.engine, factory.store, tenant, intent, clean, now())


def _tidy(factory: Factory) -> None:
    """Tidy this machine's home, if it is time."""
    if _is_time(factory.settings.home_folder / "tidied"):
        clean_home(factory)


def _is_time(stamp: Path) -> bool:
    """Whether the hour is over that a file stands for; then a new one begins."""
    if stamp.is_file() and 0 <= time.time() - stamp.stat().st_mtime < EVERY.total_seconds():
        return False  # a moment to come is that of a clock that was ahead
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.touch()
    return True


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
    last = _last_cleared(stamp, moment)
    since = [(last, moment), (last - AGAIN, moment - AGAIN)]
    if not any(forgetting.anybody(factory.engine, *between) for between in since):
        return 0
    from lora_core.row_store import RowFolder  # imported late: needs torch

    files = [file for file in folder.glob("*/*/*") if file.is_file()]
    for kind in folder.iterdir():
        RowFolder(kind, budget=0).clear()
    beside = stamp.with_suffix(f".{os.getpid()}")
    beside.write_text(moment.isoformat())
    beside.replace(stamp)  # whole, or as it was: a full disk tears nothing
    return len(files)


def _last_cleared(stamp: Path, moment: datetime) -> datetime:
    """When the states last went: ever, where nobody can tell, for too often does no harm.

    What is left of a torn moment may be one without a zone; one to come is that of a clock that was ahead.
    """
    try:
        last = datetime.fromisoformat(stamp.read_text())
    except (OSError, ValueError):
        return EVER
    return last if last.tzinfo and last <= moment else EVER
