"""The steps of a cohort when something breaks on the way: everybody else goes on, and nothing is lost."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from httpx import ConnectError
from pydantic import ByteSize

from flows import candidates, fitting, sending
from flows import cohort as steps
from flows.due import runs_wanted
from flows.errors import OrchestratorAway
from flows.factory import Factory, Pinned, add_data, now, pin_base, request_training
from flows.finished import finished
from flows.fitting import usual_plan
from flows.records import recorded_methods
from flows.reproduce import reproduce
from flows.settings import FactorySettings
from flows.work import run_cohort
from lora_core import train
from lora_core.banks.bank import Bank
from lora_core.base_model import BaseModel
from lora_core.cohort import Cohort as Slots
from lora_core.errors import BaseUnfit
from lora_core.evaluate import Scores, evaluate_all
from lora_core.intake import read_artifact
from lora_core.micro_step import read_rows
from lora_core.planner import Plan
from lora_core.recipe import load_recipe
from lora_core.referee import Answers
from registry import jobs, queries, queue
from registry.errors import DatabaseUnavailable, LeaseLost, SignatureRefused, StoreUnavailable
from registry.jobs import ClaimedJob
from registry.models import Job, Run
from registry.names import JobId, Reference, RunId
from registry.orders import Enqueued
from registry.publishing import Finished
from registry.session import reading, transaction
from tests.flows.conftest import QUICK, write_user
from tests.registry.test_signing import write_pair

Ask = Callable[..., Enqueued]
LITTLE = 350_000  # bytes: enough for one slot of rows of 32 tokens, not of 64


@pytest.fixture
def factory(base_folder: Path, home: Path) -> Factory:
    """A factory in a home of its own."""
    made = Factory(FactorySettings(base=str(base_folder), slots=4))
    made.set_up()
    return made


@pytest.fixture
def ask(factory: Factory, tmp_path: Path) -> Ask:
    """Add data for a user and ask for training."""
    pinned = pin_base(factory)

    def ask_for(user: str, habit: str = "hello fox", base: Pinned = pinned, **settings: object) -> Enqueued:
        reference = Reference.parse(user)
        add_data(factory, reference, [str(write_user(tmp_path / "data.jsonl", habit, seed=len(user)))])
        recipe = load_recipe(None, [*QUICK, *(f"{key}={value}" for key, value in settings.items())])
        with transaction(factory.engine) as session:
            return request_training(session, reference, base, recipe)

    return ask_for


def state(factory: Factory, job: JobId) -> Job:
    """A job as it is now."""
    with reading(factory.engine) as session:
        return session.get_one(Job, job)


def break_store(monkeypatch: pytest.MonkeyPatch, factory: Factory, method: str, when: str) -> None:
    """The store fails for keys that hold a word."""
    works: Callable[..., object] = getattr(factory.store, method)

    def failing(key: str, *data: bytes) -> object:
        if when in key:
            raise StoreUnavailable("s3://x", "timeout", "try again")
        return works(key, *data)

    monkeypatch.setattr(factory.store, method, failing)


def test_two_jobs_of_one_user_make_two_versions_each_of_its_own_recipe(factory: Factory, ask: Ask) -> None:
    """They never meet in a cohort, where one name would stand for both."""
    ask("acme/alice", max_steps=9)
    ask("acme/alice", "hello dog", max_steps=1)

    while run_cohort(factory):
        pass

    with reading(factory.engine) as session:
        tenant = queries.tenant_id(session, "acme")
        found = queries.versions(session, tenant, queries.holder(session, tenant, "alice", "default").adapter.id)
    assert [version.recipe["max_steps"] for version in found] == [1, 9]


def test_a_worker_with_a_key_signs_and_takes_no_unsigned_version_for_a_rival(
    base_folder: Path, factory: Factory, ask: Ask, tmp_path: Path
) -> None:
    """Users from before the key go on; what is on record of a version is what its files say."""
    private, public = write_pair(tmp_path / "keys")
    keys = {"signing_key": private, "verify_key": str(public)}
    strict = Factory(FactorySettings(base=str(base_folder), slots=4, **keys))  # type: ignore[arg-type]  # of two types
    ask("acme/alice", max_steps=2)
    run_cohort(factory)
    ask("acme/alice", "hello dog", max_steps=2)

    cohort = run_cohort(strict)

    assert cohort
    assert [candidate.live for candidate in cohort.candidates] == [None]
    with pytest.raises(SignatureRefused, match="not signed"):
        strict.client.pull("acme/alice:1")
    folder, recorded = strict.client.pull("acme/alice:2"), recorded_methods(cohort.candidates[0].recipe.model_dump())
    assert read_artifact(folder, cohort.base, recorded).spec.scale == recorded[0].scale


def test_a_store_that_is_away_fails_nobody(factory: Factory, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its jobs wait again, and no attempt is counted: draining a queue into a dead store would end every job."""
    job = ask("acme/alice").job_id
    with monkeypatch.context() as patched:
        break_store(patched, factory, "get", "datasets")
        with pytest.raises(StoreUnavailable):
            run_cohort(factory)

    assert (state(factory, job).state, state(factory, job).attempts) == ("queued", 0)
    run_cohort(factory)
    assert state(factory, job).state == "published"


def test_a_user_who_cannot_be_stored_does_not_hold_up_the_others(
    factory: Factory, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest is published, the trouble is told, and that user's job waits again."""
    alice, bob = ask("acme/alice").job_id, ask("globex/bob", "hello dog").job_id
    with monkeypatch.context() as patched:
        break_store(patched, factory, "put_new", "/acme/")
        with pytest.raises(StoreUnavailable):
            run_cohort(factory)

    assert (state(factory, alice).state, state(factory, bob).state) == ("queued", "published")


def test_whose_loss_is_no_number_fails_alone_and_its_run_is_on_record(factory: Factory, ask: Ask) -> None:
    """Weights may be numbers and yet give none: there is nothing to judge, and JSON has no word for it."""
    absurd = {"learning_rate": 1e30, "alpha": 64, "patience": "null", "max_steps": 1, "warmup": 0}
    alice, eve = ask("acme/alice").job_id, ask("globex/eve", **absurd).job_id

    cohort = run_cohort(factory)

    assert (state(factory, alice).state, state(factory, eve).state) == ("published", "failed")
    assert "the candidate's loss on held-out examples is not finite (nan); lower learning_rate" in str(
        state(factory, eve).error
    )
    again = ask("globex/eve", "hello dog", **absurd).job_id
    run_cohort(factory)
    assert state(factory, again).state == "failed"
    with reading(factory.engine) as session:
        runs = session.query(Run).all()
        assert cohort
        assert cohort.run_id in {run.id for run in runs}
        assert all(run.finished_at and run.facts["device_seconds"] > 0 for run in runs)


def test_whatever_ails_one_user_at_the_end_is_that_users_alone(
    factory: Factory, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It costs an attempt, and what is written down is a line."""
    alice, bob = ask("acme/alice").job_id, ask("globex/bob", "hello dog").job_id
    works = finished

    def failing(base: BaseModel, run: RunId, bank: Bank, job: ClaimedJob, *rest: Any) -> Finished:
        if job.id == bob:
            raise ValueError("x" * 9999 + "\nof somebody else")
        return works(base, run, bank, job, *rest)

    monkeypatch.setattr(sending, "finished", failing)
    run_cohort(factory)

    assert (state(factory, alice).state, state(factory, bob).state) == ("published", "queued")
    assert state(factory, bob).errors == 1
    assert str(state(factory, bob).error) == "ValueError: " + "x" * 300


def test_a_database_that_is_away_while_somebody_drops_out_ends_nobodys_training(
    factory: Factory, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job's lease runs out by itself, and whoever takes it next finds the same."""
    alice, eve = ask("acme/alice").job_id, ask("globex/eve", learning_rate=1e38, clip=1e30, warmup=0).job_id

    def away(*_: object) -> None:
        raise DatabaseUnavailable("sqlite", "disk I/O error", "look at the disk")

    with monkeypatch.context() as patched:
        patched.setattr(jobs, "fail", away)
        run_cohort(factory)

    assert (state(factory, alice).state, state(factory, eve).state) == ("published", "running")


def test_a_live_version_whose_bytes_are_gone_is_no_rival(factory: Factory, ask: Ask) -> None:
    """Training again is the cure."""
    ask("acme/alice")
    run_cohort(factory)
    with reading(factory.engine) as session:
        tenant = queries.tenant_id(session, "acme")
        (version,) = queries.versions(session, tenant, queries.holder(session, tenant, "alice", "default").adapter.id)
    factory.store.clear(version.prefix)

    again = ask("acme/alice", "hello dog").job_id
    run_cohort(factory)

    assert state(factory, again).state == "published"


def test_a_home_that_takes_no_live_version_costs_nobody_an_attempt(factory: Factory, ask: Ask) -> None:
    """Who has one waits, for another worker or for room here: unrivalled, a worse version would go live."""
    ask("acme/alice")
    run_cohort(factory)
    factory.settings.cache.touch()
    again, new = ask("acme/alice", "hello dog").job_id, ask("acme/bob").job_id

    run_cohort(factory)

    assert (state(factory, again).state, state(factory, again).attempts) == ("queued", 0)
    assert "cannot be used (Not a directory); make room there" in str(state(factory, again).error)
    assert state(factory, new).state == "published"


def test_an_interrupted_worker_puts_its_jobs_back(factory: Factory, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes next need not wait for the lease."""
    job = ask("acme/alice").job_id
    monkeypatch.setattr(steps, "train_candidates", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))

    with pytest.raises(KeyboardInterrupt):
        run_cohort(factory)

    assert (state(factory, job).state, state(factory, job).attempts) == ("queued", 0)


def test_prefects_trouble_costs_nobody_an_attempt(factory: Factory, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its server may be away for longer than its client is patient; the jobs wait for the next run."""
    from flows import tasks

    job = ask("acme/alice").job_id
    unreachable = Mock(with_options=lambda **_: Mock(side_effect=ConnectError("refused")))
    monkeypatch.setitem(tasks.TASKS, steps.train, unreachable)

    def as_task(step: Callable[..., Any], *arguments: Any) -> Any:  # whatever the step takes and gives
        return tasks.as_task(step, *arguments) if step is steps.train else step(*arguments)

    with pytest.raises(OrchestratorAway, match="train: Prefect's server could not be told"):
        run_cohort(factory, do=as_task)

    assert (state(factory, job).state, state(factory, job).attempts) == ("queued", 0)


def test_a_cohort_that_breaks_its_worker_is_tried_three_times(
    factory: Factory, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then it has failed, and the last error is the reason."""
    job = ask("acme/alice").job_id
    monkeypatch.setattr(steps, "train_candidates", lambda *_: (_ for _ in ()).throw(MemoryError("no room")))

    for _ in range(jobs.MAX_ERRORS):
        with pytest.raises(MemoryError):
            run_cohort(factory, [job])
        assert run_cohort(factory) is None  # it is left alone for a while, unless it is asked for

    assert state(factory, job).state == "failed"
    assert "no room" in str(state(factory, job).error)


def test_who_asks_for_a_base_that_is_gone_waits_alone(factory: Factory, ask: Ask) -> None:
    """The cohort after it is trained; a disk may be back, or another worker have it, so no attempt is counted."""
    lost = ask("acme/alice", base=Pinned("/nowhere/base", "main", "f" * 64, 1)).job_id
    found = ask("globex/bob", "hello dog").job_id

    while cohort := run_cohort(factory):
        assert cohort.put_off or cohort.published

    assert (state(factory, lost).state, state(factory, found).state) == ("queued", "published")
    assert state(factory, lost).attempts == 0
    assert "no such folder" in str(state(factory, lost).error)


def test_who_asks_for_what_the_base_does_not_have_fails_alone(factory: Factory, ask: Ask) -> None:
    """At once, and in words; whoever would share a cohort with them is trained."""
    alice = ask("acme/alice", rank_pattern={"q_proj": 2}).job_id
    eve = ask("globex/eve", rank_pattern={"nope": 2}).job_id

    run_cohort(factory)

    assert (state(factory, alice).state, state(factory, alice).attempts) == ("published", 1)
    assert state(factory, eve).state == "failed"
    assert "has no linear at 'nope'; choose from" in str(state(factory, eve).error)


def test_who_asks_for_a_base_that_nobody_can_share_fails(
    factory: Factory, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No other machine can do it either."""
    job = ask("acme/alice").job_id

    def unfit(*_: object, **__: object) -> BaseModel:
        raise BaseUnfit("org/base", "its experts multiply all users' tokens together", "choose a dense base")

    monkeypatch.setattr(fitting, "load_base", unfit)
    run_cohort(factory)

    assert state(factory, job).state == "failed"
    assert "choose a dense base" in str(state(factory, job).error)


def test_a_base_that_lies_elsewhere_here_is_the_same_base(base_folder: Path, ask: Ask) -> None:
    """A job tells where its base was when somebody asked; this worker has it in a place of its own."""
    worker = Factory(FactorySettings(base=str(base_folder), slots=4))
    asked = replace(pin_base(worker), name="/home/somebody/base")
    job = ask("acme/alice", base=asked).job_id

    run_cohort(worker)

    assert state(worker, job).state == "published"
    assert reproduce(worker, "acme/alice:1").equal


def test_a_lost_lease_is_told_once_and_publishes_nothing(
    factory: Factory, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker has taken the job while this one computed."""
    job = ask("acme/alice").job_id

    def slow(base: object, candidates: object, slots: int, *_: object) -> None:
        later = now() + timedelta(seconds=2 * factory.settings.lease_seconds)
        with transaction(factory.engine) as session:
            jobs.claim(session, "fast", timedelta(hours=1), 1, later)
        raise LeaseLost(str(job), 1)

    monkeypatch.setattr(steps, "judge_candidates", slow)
    with pytest.raises(LeaseLost):
        run_cohort(factory)

    assert (state(factory, job).state, state(factory, job).worker, state(factory, job).fence) == ("running", "fast", 2)


def test_runs_are_wanted_for_every_group_and_for_dead_workers_jobs(factory: Factory, ask: Ask) -> None:
    """What a claim could take is what is counted."""
    assert runs_wanted(factory) == 0
    ask("acme/alice")
    ask("acme/bob", rank=2)
    assert runs_wanted(factory) == 2
    ask("acme/cleo", rank=2, dropout=0.1)  # masks are everybody's in a cohort
    assert runs_wanted(factory) == 3

    with transaction(factory.engine) as session:
        long_ago = now() - timedelta(days=1)
        assert len(jobs.claim(session, "dead", timedelta(minutes=5), 4, long_ago)) == 1

    assert runs_wanted(factory) == 3


@pytest.mark.long
def test_a_cohort_is_planned_to_fit_into_memory(base_folder: Path, ask: Ask) -> None:
    """Fewer slots than users: some wait for a slot, everybody is published, and the version says how it was made."""
    for user in ("acme/alice", "acme/bob", "acme/eve", "acme/joe"):
        ask(user)
    small = Factory(FactorySettings(base=str(base_folder), slots=4, memory=ByteSize(900_000)))

    cohort = run_cohort(small)

    assert cohort
    assert len(cohort.published) == 4
    assert cohort.plan.slots < 4
    assert 0 < cohort.plan.predicted_bytes <= 900_000


@pytest.mark.parametrize(("memory", "who"), [(1000, "the base alone"), (250_000, "one user at 30 tokens a row")])
def test_memory_too_small_for_anybody_is_told_with_the_numbers(
    base_folder: Path, ask: Ask, factory: Factory, memory: int, who: str
) -> None:
    """The job waits for a worker that has more: this one leaves it alone for a while, and no attempt is counted."""
    job = ask("acme/alice").job_id
    small = Factory(FactorySettings(base=str(base_folder), memory=ByteSize(memory)))

    for _ in range(jobs.MAX_ERRORS + 1):
        cohort = run_cohort(small, [job])
        assert cohort
        ((label, reason),) = cohort.put_off.values()
        assert label == "acme/alice"
        assert who in reason
        assert f"there are {memory / 2**20:,.1f}; " in reason
        assert "raise --memory or LORA_MEMORY, or take a larger device" in reason

    found = state(factory, job)
    assert (found.state, found.attempts, found.error) == ("queued", 0, reason)
    assert run_cohort(small) is None
    cohort = run_cohort(factory, [job])
    assert cohort
    assert [*cohort.published] == ["acme/alice"]


@pytest.mark.long
def test_who_is_too_large_for_the_budget_is_put_off_alone(
    base_folder: Path, factory: Factory, ask: Ask, tmp_path: Path
) -> None:
    """Long examples need long rows; the others need not."""
    short = ask("acme/alice", row_tokens=128, max_length=128)
    pinned, eve = pin_base(factory), Reference.parse("acme/eve")
    add_data(factory, eve, [str(write_user(tmp_path / "long.jsonl", "hello fox " * 20))])
    with transaction(factory.engine) as session:
        settings = load_recipe(None, [*QUICK, "row_tokens=128", "max_length=128"])
        long = request_training(session, eve, pinned, settings)

    cohort = run_cohort(Factory(FactorySettings(base=str(base_folder), memory=ByteSize(LITTLE))))

    assert cohort
    assert ([*cohort.published], [*cohort.put_off]) == (["acme/alice"], [long.job_id])
    assert (state(factory, short.job_id).state, state(factory, long.job_id).state) == ("published", "queued")


def test_nobody_is_lost_when_memory_runs_out_in_training_and_in_judging(
    factory: Factory, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cohort goes on with fewer slots."""
    for user in ("acme/alice", "acme/bob"):
        ask(user)
    works = read_rows

    def full(base: BaseModel, cohort: Slots, *rest: Any) -> Answers:  # the rest is the engine's
        if cohort.slots > 1:
            raise torch.OutOfMemoryError("full")
        return works(base, cohort, *rest)

    def full_when_judging(base: BaseModel, asked: Any, slots: int, *rest: Any) -> list[Scores]:  # too
        if slots > 1:
            raise torch.OutOfMemoryError("full")
        return evaluate_all(base, asked, slots, *rest)

    monkeypatch.setattr(train, "read_rows", full)
    monkeypatch.setattr(candidates, "evaluate_all", full_when_judging)
    cohort = run_cohort(factory)

    assert cohort
    assert len(cohort.published) == 2
    assert (cohort.plan.slots, cohort.plan.checkpointed) == (1, True)


def test_a_job_is_trained_on_the_base_that_it_was_made_for_however_the_worker_is_set(
    factory: Factory, ask: Ask
) -> None:
    """A quantised base is another base: a cohort, a row and a manifest of its own."""
    whole = ask("acme/alice").job_id
    few_bits = pin_base(Factory(factory.settings.model_copy(update={"quantise": "4bit"})))
    packed = ask("acme/alice", base=few_bits).job_id
    assert packed != whole

    while cohort := run_cohort(factory):
        assert not cohort.failed

    manifests = []
    for number in (1, 2):
        folder = factory.client.pull(Reference.parse(f"acme/alice:{number}"))
        manifests.append(json.loads((folder / "manifest.json").read_text())["base"])
    assert [manifest["quantised"] for manifest in manifests] == ["", "4bit"]
    assert manifests[1]["digest"] == few_bits.digest != manifests[0]["digest"]


def test_adapters_on_upper_layers_are_the_same_with_lower_states_kept(base_folder: Path, ask: Ask) -> None:
    """Users of the same data, three ways, the same losses: what is kept changes nothing but time."""
    found = []
    for user, memory, disk in (("acme/ann", 0, 0), ("acme/bob", 1 << 20, 0), ("acme/cat", 0, 1 << 24)):
        ask(user, layers=1, batch_rows=2)
        settings = FactorySettings(base=str(base_folder), slots=4, states=ByteSize(memory), states_disk=ByteSize(disk))
        cohort = run_cohort(Factory(settings))
        assert cohort
        ((_, candidate),) = cohort.work.values()
        assert candidate.trained
        found.append(candidate.trained.losses)

    assert found[0] == found[1] == found[2]
    assert list((settings.home_folder / "states" / "eager").glob("*/*"))


def test_a_quantised_base_trains_as_it_is_where_others_are_compiled() -> None:
    """It cannot be compiled, and a worker's setting must not fail its jobs."""
    settings = FactorySettings(compile=True, slots=16)
    plans = [usual_plan(settings, 3, load_recipe(None, QUICK), quantised) for quantised in ("", "8bit")]

    assert plans == [Plan(4, 64, compiled=True), Plan(4, 64)]


def test_a_cancelled_users_slot_is_given_up_while_the_others_train_on(factory: Factory, ask: Ask) -> None:
    """The worker hears of it when it renews its leases; it trains no step more for nobody."""
    hasty = Factory(factory.settings.model_copy(update={"lease_seconds": 1}))
    alice, bob = ask("acme/alice", epochs=40, patience="null"), ask("acme/bob")
    steps_done: list[int] = []

    def watch(pace: train.Pace) -> None:
        steps_done.append(pace.micro_steps)
        if len(steps_done) == 1:
            with transaction(factory.engine) as session:
                tenant = queries.tenant_id(session, "acme")
                queue.cancel(session, tenant, queries.holder(session, tenant, "alice", "default"), "by hand", now())
            time.sleep(1)  # three renewals of leases

    cohort = run_cohort(hasty, None, watch)

    assert cohort
    assert "its job was cancelled" in cohort.failed["acme/alice"]
    assert set(cohort.published) == {"acme/bob"}
    assert (state(factory, alice.job_id).state, state(factory, bob.job_id).state) == ("cancelled", "published")
