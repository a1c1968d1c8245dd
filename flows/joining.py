"""Who joins a cohort: claimed jobs become candidates; one with bad data, or too large, drops out alone."""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

from flows.candidates import Candidate, make_candidate
from flows.entrance import Newcomer
from flows.errors import HomeAway
from flows.factory import Factory, now
from flows.hands import brief
from flows.logs import event
from flows.records import recorded_methods
from lora_core.base_model import BaseModel
from lora_core.data.snapshot import load_snapshot
from lora_core.errors import ArtifactRefused, LoraError
from lora_core.intake import AdapterFiles, read_artifact
from lora_core.recipe import make_recipe
from registry import jobs, queries
from registry.errors import (
    LeaseLost,
    ManifestRefused,
    NotFound,
    ObjectDiffers,
    ObjectMissing,
    RegistryError,
    SignatureRefused,
)
from registry.jobs import ClaimedJob
from registry.resolved import Resolved
from registry.resolving import resolve_page
from registry.session import reading, transaction

if TYPE_CHECKING:
    from flows.cohort import Cohort


def join(factory: Factory, cohort: "Cohort", claimed: Sequence[ClaimedJob]) -> list[Newcomer]:
    """Everybody whose examples can be used here; with this machine's home away, who has a live version is put off."""
    found = []
    rivals = resolve_page(factory.engine, [job.reference for job in claimed])
    for job in claimed:
        try:
            found.append((job, _candidate(factory, cohort.backstage, job, rivals[job.reference])))
        except (LoraError, ObjectMissing, ObjectDiffers) as error:
            drop(factory, cohort, job, str(error))
        except HomeAway as trouble:
            put_off(factory, cohort, job, trouble)
    return found


def newcomers(factory: Factory, cohort: "Cohort", look: Callable[[], object], places: int) -> list[Newcomer]:
    """Claim and prepare at most so many who can be trained beside the others; `look` is called first.

    Raises RegistryError, with whoever was claimed put back.
    """
    look()
    if _outgrown(factory, cohort):
        return []
    settings = factory.settings
    lease, here = timedelta(seconds=settings.lease_seconds), cohort.unpublished
    with transaction(factory.engine) as session:
        found = jobs.claim(session, settings.worker, lease, places, now(), group=cohort.group)
        for job in found:
            if job.reference.label in here:  # under a lease that is over, which nobody has noticed yet
                jobs.release(session, job, now())
    claimed = [job for job in found if job.reference.label not in here]
    tell_claimed(claimed)
    cohort.hands.take(claimed)
    factory.pulse.join(len(claimed))
    try:
        return join(factory, cohort, claimed)
    except Exception as error:
        for job in claimed:
            cohort.hands.put_back(job, None if isinstance(error, RegistryError) else brief(error))
        raise


def tell_claimed(claimed: Sequence[ClaimedJob]) -> None:
    """Log whose jobs this worker has now."""
    for job in claimed:
        event("job claimed", job, fence=job.fence)


def _outgrown(factory: Factory, cohort: "Cohort") -> bool:
    """Whether so many wait that a wider cohort should follow this one instead of its going on."""
    slots = cohort.plan.slots
    if slots >= factory.settings.slots:
        return False
    with reading(factory.engine) as session:
        return jobs.waiting(session, now()).get(cohort.group, 0) >= 2 * slots


def drop(factory: Factory, cohort: "Cohort", job: ClaimedJob, reason: str) -> None:
    """One user leaves the cohort; the others go on."""
    cohort.failed[job.reference.label] = reason
    cohort.work.pop(job.id, None)
    cohort.hands.let_go(job)
    try:
        with transaction(factory.engine) as session:
            jobs.fail(session, job, reason, now())
    except LeaseLost as error:  # a new holder will find out for itself
        event("lease lost", job, logging.WARNING, run=cohort.run_id, reason=str(error))
    except RegistryError as error:  # and so will the next one, once the lease has run out
        event("job not failed", job, logging.WARNING, run=cohort.run_id, reason=f"{reason}; {error}")
    else:
        event("job failed", job, logging.WARNING, run=cohort.run_id, reason=reason)


def put_off(factory: Factory, cohort: "Cohort", job: ClaimedJob, trouble: Exception) -> None:
    """One user leaves the cohort and waits for a worker that is fit for it; it costs no attempt."""
    cohort.put_off[job.id] = (job.reference.label, str(trouble))
    cohort.work.pop(job.id, None)
    cohort.hands.let_go(job)
    until = now() + timedelta(seconds=factory.settings.lease_seconds)
    with suppress(RegistryError):  # then the lease runs out by itself
        with transaction(factory.engine) as session:
            jobs.put_off(session, job, str(trouble), until, now())
        event("job put off", job, run=cohort.run_id, reason=str(trouble))


def _candidate(factory: Factory, base: BaseModel, job: ClaimedJob, rival: Resolved | NotFound) -> Candidate:
    snapshot = load_snapshot(factory.store.get(job.dataset_key), job.dataset_digest)
    candidate = make_candidate(job.reference.label, make_recipe(job.recipe), snapshot, base)
    if isinstance(rival, Resolved):
        candidate.live, candidate.live_number = _live(factory, base, rival)
    return candidate


def _live(factory: Factory, base: BaseModel, found: Resolved) -> tuple[AdapterFiles | None, int | None]:
    """The version that `latest` points to, as a rival; None where it is not to be trusted for this base.

    Raises HomeAway: without its rival nobody is judged.
    """
    try:
        exactly = replace(found.reference, number=found.number)
        with reading(factory.engine) as session:
            tenant = queries.tenant_id(session, exactly.tenant)
            recorded = recorded_methods(queries.version(session, tenant, exactly).recipe)
        return read_artifact(factory.client.fetch(found), base, recorded), found.number
    except (NotFound, ArtifactRefused, SignatureRefused, ManifestRefused, ObjectMissing, ObjectDiffers):
        return None, None
    except OSError as error:
        settings = factory.settings
        raise HomeAway(str(settings.home_folder), settings.worker, error.strerror or str(error)) from error
