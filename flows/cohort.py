"""The steps that take a cohort of jobs from the queue to published versions.  `adapt.py` and the command line run them.

Every step may run twice or die at any line: leases, fences and idempotent publishing make that harmless.
"""

import logging
import math
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta

import torch

from flows.candidates import (
    Candidate,
    finite,
    judge_candidates,
    make_candidate,
    train_candidates,
    training_bank,
)
from flows.costs import NANOSECONDS, Meter
from flows.factory import Factory, now
from flows.finished import computed_on, finished
from flows.fitting import budget_bytes, load_within_budget, plan_fitting, usual_plan
from flows.logs import event
from lora_core.base_model import BaseModel, check_device
from lora_core.data.snapshot import load_snapshot
from lora_core.errors import ArtifactRefused, BaseModelError, LoraError, MemoryTooSmall
from lora_core.intake import AdapterFiles, read_artifact
from lora_core.planner import Plan, with_fewer
from lora_core.recipe import make_recipe
from lora_core.row_store import RowFolder, RowMemory, RowStore
from lora_core.saves import Saves
from lora_core.train import Pace
from registry import jobs
from registry.errors import LeaseLost, NotFound, ObjectDiffers, ObjectMissing, RegistryError
from registry.jobs import ClaimedJob
from registry.models import Facts, Run
from registry.names import JobId, RunId
from registry.publishing import Published, publish
from registry.session import reading, transaction

MOST_RUNS = 16  # cohort runs asked for in one tick: more would only wait in line


class Cohort:
    """Jobs on one base in one process, and what they came to.

    A plain class: Prefect walks through dataclasses that it is passed, tensors and all.
    """

    base: BaseModel  # there once anybody's work is

    def __init__(self, plan: Plan) -> None:
        self.plan = plan  # a smaller one once memory ran out
        self.run_id = RunId(uuid.uuid4())
        self.started_at = now()
        self.meter = Meter()
        self.work: dict[JobId, tuple[ClaimedJob, Candidate]] = {}
        self.failed: dict[str, str] = {}  # label to reason
        self.put_off: dict[JobId, tuple[str, str]] = {}  # label and reason of who needs more memory than is here
        self.published: dict[str, Published] = {}  # by label

    @property
    def candidates(self) -> list[Candidate]:
        """The users still in it."""
        return [candidate for _, candidate in self.work.values()]


def claim(factory: Factory, only: Sequence[JobId] | None = None) -> list[ClaimedJob]:
    """Take waiting jobs that can share a cohort, as many as there are slots.

    Raises DeviceMissing before any is taken: a worker that cannot train must not fail other people's jobs.
    """
    settings = factory.settings
    check_device(settings.device or "cpu")
    lease = timedelta(seconds=settings.lease_seconds)
    with transaction(factory.engine) as session:
        return jobs.claim(session, settings.worker, lease, settings.slots, now(), only)


def prepare(factory: Factory, claimed: Sequence[ClaimedJob]) -> Cohort:
    """Load the base and every user's examples; a user with bad data drops out alone, with the reason."""
    first = claimed[0]
    cohort = Cohort(usual_plan(factory.settings, len(claimed), make_recipe(first.recipe), first.base_quantised))
    try:
        cohort.base = load_within_budget(factory.settings, first)
        if cohort.base.digest != first.base_digest:
            raise BaseModelError(first.base_name, "its files have changed since the job was made", "train again")
    except MemoryTooSmall as error:
        for job in claimed:
            _put_off(factory, cohort, job, error)
    except LoraError as error:
        for job in claimed:
            _drop(factory, cohort, job, str(error))
    else:
        cohort.meter.devices = len({parameter.device for parameter in cohort.base.model.parameters()})
        _admit(factory, cohort, claimed)
        if cohort.work:
            _fit_into_memory(factory, cohort)
        _open_run(factory, cohort)
    return cohort


def _admit(factory: Factory, cohort: Cohort, claimed: Sequence[ClaimedJob]) -> None:
    """Everybody whose examples can be used."""
    for job in claimed:
        try:
            cohort.work[job.id] = (job, _candidate(factory, cohort.base, job))
        except (LoraError, ObjectMissing, ObjectDiffers) as error:
            _drop(factory, cohort, job, str(error))


def _fit_into_memory(factory: Factory, cohort: Cohort) -> None:
    """Plan as many slots as fit, where it is known how much memory there is; who does not fit is put off alone."""
    seats = sum(candidate.seats for candidate in cohort.candidates)
    cohort.plan = usual_plan(factory.settings, seats, cohort.candidates[0].recipe, cohort.base.quantised)
    budget = budget_bytes(factory.settings, cohort.base)
    if budget is None:
        return
    planned, left_out = plan_fitting(cohort.base, cohort.candidates, budget, cohort.plan.slots)
    if planned:
        cohort.plan = replace(planned, compiled=cohort.plan.compiled)
    for job, candidate in list(cohort.work.values()):
        if candidate.label in left_out:
            _put_off(factory, cohort, job, left_out[candidate.label])


def train(factory: Factory, cohort: Cohort, watch: Callable[[Pace], None] | None = None) -> None:
    """Train everybody packed; who was retired drops out, with the reason."""

    def seen(pace: Pace) -> None:
        cohort.meter.spend(pace.read)
        factory.pulse.keep(pace)
        if watch:
            watch(pace)

    if cohort.work:
        saves, states = _saves(factory, cohort), _states(factory, cohort)
        cohort.plan = train_candidates(cohort.base, cohort.candidates, cohort.plan, seen, saves, states)
    for job, candidate in list(cohort.work.values()):
        trained = candidate.trained
        if trained is None or trained.outcome == "retired" or not finite(trained.row_P):
            _drop(factory, cohort, job, trained.reason if trained else candidate.trouble)


def judge(factory: Factory, cohort: Cohort) -> None:
    """Score base, live version and candidate of every user, and pass the gate."""
    if cohort.work:
        base, users, plan = cohort.base, cohort.candidates, cohort.plan
        with_fewer(base, plan.slots, lambda slots: judge_candidates(base, users, slots, plan.row_tokens))
        cohort.meter.spend({candidate.label: candidate.judged_tokens for candidate in users})


def publish_all(factory: Factory, cohort: Cohort) -> None:
    """Publish every candidate, accepted or refused; one whose job went to another worker meanwhile is left to it.

    A store or database that fails for one does not hold up the others; the trouble is raised at the end.
    """
    trouble: RegistryError | None = None
    bank = training_bank(cohort.base, cohort.candidates) if cohort.work else None
    for job, candidate in list(cohort.work.values()):
        assert bank  # there is work
        try:
            result = finished(cohort.base, cohort.run_id, bank, job, candidate, cohort.meter)
            cohort.published[candidate.label] = version = publish(factory.engine, factory.store, job, result, now())
            event("version published", job, run=cohort.run_id, version=version.number, accepted=version.accepted,
                  reason=result.reason, tokens=result.tokens, device_seconds=result.device_seconds)  # fmt: skip
            for learner in candidate.learners:
                _saves(factory, cohort).drop(learner.name)
        except LeaseLost as error:
            cohort.failed[candidate.label] = str(error)
            del cohort.work[job.id]
            event("lease lost", job, logging.WARNING, run=cohort.run_id, reason=str(error))
        except RegistryError as error:
            trouble = error
            event("not published", job, logging.ERROR, run=cohort.run_id, reason=str(error))
    if trouble:
        raise trouble
    if cohort.work:
        _close_run(factory, cohort)


@contextmanager
def in_hand(factory: Factory, claimed: Sequence[ClaimedJob]) -> Iterator[None]:
    """Renew the jobs' leases from a thread while the block works; when it breaks, put back what is still held.

    An interruption and a fault of the database or the store cost no attempt; any other error does.
    """
    done = threading.Event()
    lease = timedelta(seconds=factory.settings.lease_seconds)

    def beat() -> None:
        while not done.wait(lease.total_seconds() / 3):
            # Whatever is wrong with the database now, the next beat comes before the lease is over.
            with suppress(Exception), transaction(factory.engine) as session:
                jobs.renew(session, claimed, lease, now())

    thread = threading.Thread(target=beat, name="leases", daemon=True)
    thread.start()
    try:
        yield
    except BaseException as error:
        blamed = isinstance(error, Exception) and not isinstance(error, RegistryError)
        _put_back(factory, claimed, f"{type(error).__name__}: {error}" if blamed else None)
        raise
    finally:
        done.set()
        thread.join()


def _put_back(factory: Factory, claimed: Sequence[ClaimedJob], error: str | None) -> None:
    for job in claimed:
        # Over already, or in other hands; and without a database the lease runs out by itself.
        with suppress(RegistryError):
            with transaction(factory.engine) as session:
                jobs.release(session, job, now(), error)
            event("job put back", job, logging.WARNING, reason=error)


def _candidate(factory: Factory, base: BaseModel, job: ClaimedJob) -> Candidate:
    snapshot = load_snapshot(factory.store.get(job.dataset_key), job.dataset_digest)
    candidate = make_candidate(job.reference.label, make_recipe(job.recipe), snapshot, base)
    candidate.live, candidate.live_number = _live(factory, base, job)
    return candidate


def _live(factory: Factory, base: BaseModel, job: ClaimedJob) -> tuple[AdapterFiles | None, int | None]:
    """The version that `latest` points to, as a rival; None where there is none for this base."""
    try:
        found = factory.client.resolve(job.reference)
        files = read_artifact(factory.client.fetch(found), base)
        return files, found.number
    except (NotFound, ArtifactRefused):
        return None, None


def _drop(factory: Factory, cohort: Cohort, job: ClaimedJob, reason: str) -> None:
    """One user leaves the cohort; the others go on."""
    cohort.failed[job.reference.label] = reason
    cohort.work.pop(job.id, None)
    event("job failed", job, logging.WARNING, run=cohort.run_id, reason=reason)
    with suppress(LeaseLost), transaction(factory.engine) as session:  # a new holder will find out for itself
        jobs.fail(session, job, reason, now())


def _put_off(factory: Factory, cohort: Cohort, job: ClaimedJob, trouble: MemoryTooSmall) -> None:
    """One user leaves the cohort and waits for a worker that has more memory; it costs no attempt."""
    cohort.put_off[job.id] = (job.reference.label, str(trouble))
    cohort.work.pop(job.id, None)
    event("job put off", job, run=cohort.run_id, reason=str(trouble))
    until = now() + timedelta(seconds=factory.settings.lease_seconds)
    with suppress(LeaseLost), transaction(factory.engine) as session:
        jobs.put_off(session, job, str(trouble), until, now())


def _saves(factory: Factory, cohort: Cohort) -> Saves:
    """Where this machine keeps the progress of trainings, for whoever claims their jobs after a kill."""
    shape = f"{cohort.base.digest} {computed_on(cohort.base)} {torch.__version__} {cohort.plan.compiled}"
    last = time.monotonic()

    def due() -> bool:
        nonlocal last
        if time.monotonic() - last < factory.settings.save_seconds:
            return False
        last = time.monotonic()
        return True

    return Saves(factory.settings.home_folder / "saves", shape, due)


def _states(factory: Factory, cohort: Cohort) -> RowStore | None:
    """Where states under the first adapted layer are kept, if any row of the cohort comes again over a few layers."""
    memory, disk = factory.settings.states, factory.settings.states_disk
    learners = [learner for candidate in cohort.candidates for learner in candidate.learners]
    if not (memory or disk) or not all(learner.recipe.method.layers for learner in learners):
        return None
    kind = "compiled" if cohort.plan.compiled else "eager"  # which rounds otherwise
    folder = RowFolder(factory.settings.home_folder / "states" / kind, disk) if disk else None
    return RowStore(RowMemory(memory), time.monotonic, folder)


def _open_run(factory: Factory, cohort: Cohort) -> None:
    with transaction(factory.engine) as session:
        session.add(
            Run(
                id=cohort.run_id, worker=factory.settings.worker, device=computed_on(cohort.base)["device"],
                slots=cohort.plan.slots, row_tokens=cohort.plan.row_tokens, started_at=cohort.started_at,
                finished_at=None, facts={},
            )
        )  # fmt: skip


def _close_run(factory: Factory, cohort: Cohort) -> None:
    facts: Facts = {"published": len(cohort.published), "failed": len(cohort.failed), "put_off": len(cohort.put_off),
             "device_seconds": cohort.meter.total / NANOSECONDS}  # fmt: skip
    with transaction(factory.engine) as session:
        run = session.get_one(Run, cohort.run_id)
        run.finished_at, run.facts = now(), facts
    event("cohort finished", run=cohort.run_id, **facts)


def runs_wanted(factory: Factory) -> int:
    """How many cohort runs the waiting jobs need, at most a few at a time."""
    with reading(factory.engine) as session:
        groups = jobs.waiting(session, now())
    return min(MOST_RUNS, sum(math.ceil(count / factory.settings.slots) for count in groups.values()))
