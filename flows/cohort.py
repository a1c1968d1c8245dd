"""The steps that take a cohort of jobs from the queue to published versions.  `tasks.py` and the command line run them.

Every step may run twice or die at any line: leases, fences and idempotent publishing make that harmless.
"""

import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial

from flows.candidates import Candidate, finite, judge_candidates, training_bank
from flows.costs import Meter
from flows.desk import Desk
from flows.entrance import Entrance, Newcomer
from flows.factory import Factory, now
from flows.fitting import budget_bytes, load_for, plan_fitting, seats_for_more, seats_of, usual_plan
from flows.guests import train_candidates
from flows.hands import Hands
from flows.joining import drop, join, newcomers, put_off, tell_claimed
from flows.keeping import row_store, saves
from flows.leaving import Leave
from flows.outgoing import Outgoing
from flows.runs import close_run, open_run
from flows.sending import publish_some
from flows.shelf import StoreShelf
from lora_core.banks.bank import Bank
from lora_core.base_model import BaseModel, check_device
from lora_core.errors import BaseChanged, BaseUnfit, LoraError
from lora_core.planner import Plan, with_fewer
from lora_core.recipe import make_recipe
from lora_core.saves import Saves
from lora_core.train import Pace
from registry import jobs
from registry.errors import RegistryError
from registry.jobs import ClaimedJob
from registry.names import JobId, RunId
from registry.publishing import Published
from registry.session import transaction

TOGETHER = 64  # users published in one transaction
Watch = Callable[[Pace], None]  # is told once a micro-step how far a cohort is


class Cohort:
    """Jobs on one base in one process, and what they came to.

    A plain class: Prefect walks through dataclasses that it is passed, tensors and all.
    """

    base: BaseModel  # there once anybody's work is; while it trains, its modules are the trainer's alone
    twin: BaseModel  # on which is judged meanwhile
    backstage: BaseModel  # for the threads that prepare and publish
    bank: Bank  # of everybody
    saves: Saves
    shelf: StoreShelf

    def __init__(self, plan: Plan, group: str, hands: Hands, leave: Leave) -> None:
        self.plan = plan  # a smaller one once memory ran out
        self.group, self.hands, self.leave = group, hands, leave
        self.run_id = RunId(uuid.uuid4())
        self.on_record = False  # whether the registry has a run of that name
        self.started_at = now()
        self.meter = Meter()
        self.work: dict[JobId, tuple[ClaimedJob, Candidate]] = {}
        self.trained_for: dict[str, ClaimedJob] = {}  # by learner
        self.failed: dict[str, str] = {}  # label to reason
        self.put_off: dict[JobId, tuple[str, str]] = {}  # label and reason of whom this worker is not fit for
        self.put_back: dict[JobId, str] = {}  # labels of the unfinished, when the worker was told to go
        self.versions: dict[JobId, Published] = {}

    @property
    def candidates(self) -> list[Candidate]:
        """The users still in it, and those who are published."""
        return [candidate for _, candidate in list(self.work.values())]

    @property
    def published(self) -> dict[str, Published]:
        """Versions by label."""
        jobs_there = [(id_, self.work[id_][0].reference.label) for id_ in self.versions]
        return {label: self.versions[id_] for id_, label in jobs_there}

    @property
    def unpublished(self) -> set[str]:
        """The labels of those who are on their way."""
        return {job.reference.label for id_, (job, _) in list(self.work.items()) if id_ not in self.versions}

    def enter(self, came: Sequence[Newcomer]) -> None:
        """Write down who has come."""
        for job, candidate in came:
            self.work[job.id] = (job, candidate)
            self.trained_for.update(dict.fromkeys(candidate.names, job))
            self.meter.forget(candidate.names)  # of an earlier job, whose cost is written down

    def lost(self) -> set[str]:
        """The labels of those whose job somebody else has by now."""
        return {self.work[id_][0].reference.label for id_ in self.hands.lost if id_ in self.work}


def claim(factory: Factory, only: Sequence[JobId] | None = None) -> list[ClaimedJob]:
    """Take waiting jobs that can share a cohort, as many as there are slots.

    Raises DeviceMissing and SettingRefused before any is taken: a worker that cannot train, or not sign what it trains,
    must not fail other people's jobs.
    """
    settings = factory.settings
    check_device(settings.device or "cpu")
    _ = factory.signer  # reads the key
    lease = timedelta(seconds=settings.lease_seconds)
    with transaction(factory.engine) as session:
        claimed = jobs.claim(session, settings.worker, lease, settings.slots, now(), only)
    tell_claimed(claimed)
    return claimed


def prepare(factory: Factory, claimed: Sequence[ClaimedJob], hands: Hands, leave: Leave, admits: bool) -> Cohort:
    """Load the base and every user's examples; a user with bad data drops out alone, with the reason.

    A cohort that admits has slots for newcomers.  Without a base, or memory for it, here, the jobs wait for another
    worker, or for this one's disk to be back.
    """
    first = claimed[0]
    plan = usual_plan(factory.settings, len(claimed), make_recipe(first.recipe), first.base_quantised)
    cohort = Cohort(plan, first.group, hands, leave)
    try:
        cohort.base = load_for(factory, first)
    except (BaseChanged, BaseUnfit) as error:
        for job in claimed:
            drop(factory, cohort, job, str(error))
    except LoraError as error:
        for job in claimed:
            put_off(factory, cohort, job, error)
    else:
        cohort.meter.devices = len({parameter.device for parameter in cohort.base.model.parameters()})
        _fill(factory, cohort, claimed, admits)
        open_run(factory, cohort)
    return cohort


def _fill(factory: Factory, cohort: Cohort, claimed: Sequence[ClaimedJob], admits: bool) -> None:
    cohort.twin, cohort.backstage = cohort.base.twin(), cohort.base.twin()
    cohort.enter(join(factory, cohort, claimed))
    if cohort.work:
        _fit_into_memory(factory, cohort, admits)
    if cohort.work:
        cohort.bank = training_bank(cohort.backstage, cohort.candidates)


def _fit_into_memory(factory: Factory, cohort: Cohort, admits: bool) -> None:
    """Plan as many slots as fit, where it is known how much memory there is; who does not fit is put off alone."""
    recipe = cohort.candidates[0].recipe
    seats = seats_of(factory.settings, cohort.base, cohort.candidates)
    if admits:
        seats = seats_for_more(factory.settings, cohort.base, seats, recipe)
    cohort.plan = usual_plan(factory.settings, seats, recipe, cohort.base.quantised)
    budget = budget_bytes(factory.settings, cohort.base)
    if budget is None:
        return
    planned, left_out = plan_fitting(cohort.base, cohort.candidates, budget, cohort.plan.slots)
    if planned:
        cohort.plan = replace(planned, compiled=cohort.plan.compiled, recorded=cohort.plan.recorded)
    for job, candidate in list(cohort.work.values()):
        if candidate.label in left_out:
            put_off(factory, cohort, job, left_out[candidate.label])


def train(factory: Factory, cohort: Cohort, watch: Watch | None, look: Callable[[], object] | None) -> None:
    """Train everybody packed, and who comes meanwhile; judge and publish who is done while others go on.

    Newcomers are let in where there is a `look`, which is called before each look for them.  Who was retired drops
    out, with the reason.  When the worker is told to go, the unfinished are put back.
    """
    if not cohort.work:
        return

    def seen(pace: Pace) -> None:
        cohort.meter.spend(pace.read)
        factory.pulse.keep(pace)
        if watch:
            watch(pace)

    with (
        closing(StoreShelf(factory, cohort.trained_for.__getitem__)) as shelf,
        _at_desk(factory, cohort, look) as desk,
    ):
        cohort.shelf, cohort.saves = shelf, saves(factory, cohort, shelf)
        people, states = cohort.candidates, row_store(factory, cohort)
        for candidate in train_candidates(cohort.base, people, cohort.plan, seen, cohort.saves, states, desk):
            cohort.plan = candidate.plan or cohort.plan
            desk.left()
            job, trained = cohort.trained_for[candidate.label], candidate.trained
            if trained is None or trained.outcome == "retired" or not finite(trained.row_P):
                drop(factory, cohort, job, trained.reason if trained else candidate.trouble)
            else:
                desk.done(job, candidate)
    for job, candidate in list(cohort.work.values()):
        if candidate.trained is None:
            _leave_behind(cohort, job)


@contextmanager
def _at_desk(factory: Factory, cohort: Cohort, look: Callable[[], object] | None) -> Iterator[Desk]:
    """A desk for as long as the cohort trains; whoever is on the way to it at the end is put back."""
    plan, recipe = cohort.plan, cohort.candidates[0].recipe
    entrance = None
    if look and plan.row_tokens == recipe.row_tokens:  # else rows are as short as the examples of those here allow
        fetch = partial(newcomers, factory, cohort, look)
        entrance = Entrance(fetch, cohort.leave, plan.slots, factory.settings.admit_seconds)
    outgoing = Outgoing(partial(_judge, factory, cohort), partial(publish_some, factory, cohort), plan.slots)
    try:
        yield Desk(outgoing, entrance, cohort.leave, cohort.enter, cohort.lost, len(cohort.work))
    finally:
        for job, _ in entrance.close() if entrance else ():
            cohort.hands.put_back(job)
        outgoing.close()


def _leave_behind(cohort: Cohort, job: ClaimedJob) -> None:
    """One user is unfinished and this worker must go: the next goes on from what was saved."""
    del cohort.work[job.id]
    cohort.put_back[job.id] = job.reference.label
    cohort.hands.put_back(job)


def judge(factory: Factory, cohort: Cohort) -> None:
    """Score base, live version and candidate of every user who was not judged while others trained; pass the gate."""
    waiting = [candidate for candidate in cohort.candidates if candidate.verdict is None]
    if waiting:
        _judge(factory, cohort, waiting)


def _judge(factory: Factory, cohort: Cohort, users: Sequence[Candidate]) -> None:
    """Judging is paid for by those who are judged, whoever else waits for the device meanwhile.

    Whose loss is no number drops out, with the reason.
    """
    twin, plan = cohort.twin, cohort.plan
    with_fewer(twin, plan.slots, lambda slots: judge_candidates(twin, users, slots, plan.row_tokens))
    cohort.meter.spend({candidate.label: candidate.judged_tokens for candidate in users})
    factory.pulse.move()
    for candidate in users:
        if candidate.senseless:
            drop(factory, cohort, cohort.trained_for[candidate.label], candidate.senseless)


def publish_all(factory: Factory, cohort: Cohort) -> None:
    """Publish every candidate who is not yet, accepted or refused.

    A store or database that fails for one does not hold up the others; the trouble is raised at the end.
    """
    left = [(job, candidate) for job, candidate in cohort.work.values() if job.id not in cohort.versions]
    trouble: RegistryError | None = None
    for start in range(0, len(left), TOGETHER):
        try:
            publish_some(factory, cohort, left[start : start + TOGETHER])
        except RegistryError as error:
            trouble = error
    if cohort.on_record:
        close_run(factory, cohort)
    if trouble:
        raise trouble
