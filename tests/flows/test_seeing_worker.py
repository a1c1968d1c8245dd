"""A worker that drains its queue is seen as well: who came, what it cost, what became of it."""

import logging
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import select

from flows.costs import NANOSECONDS
from flows.factory import Factory, add_data, now, pin_base, request_training
from flows.leaving import Leave
from flows.logs import LOG
from flows.pulse import Look, Pulse
from flows.reasons import grouped
from flows.settings import FactorySettings
from flows.work import run_cohort
from lora_core.recipe import load_recipe
from lora_core.train import Pace
from registry import overview, workers
from registry.models import AdapterVersion, Job, Run
from registry.names import JobId, Reference
from registry.session import reading, transaction
from tests.conftest import looking
from tests.flows.conftest import QUICK, LoraHere, write_user

PATIENCE = 20_000  # micro-steps that a test gives a worker


class Heard(logging.Handler):
    """Events by job, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[object, list[str]] = defaultdict(list)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep what happened to whose job."""
        self.of[getattr(record, "fields", {}).get("job")].append(record.getMessage())


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Heard]:
    """What is logged meanwhile."""
    handler = Heard()
    monkeypatch.setattr(LOG, "handlers", [handler])
    monkeypatch.setattr(LOG, "level", logging.INFO)
    LOG.manager._clear_cache()  # type: ignore[attr-defined]  # whether a level is on is remembered
    yield handler
    monkeypatch.undo()
    LOG.manager._clear_cache()  # type: ignore[attr-defined]


def ask(factory: Factory, user: str, count: int, habit: str, *settings: str) -> JobId:
    """Add data for a user and ask for training."""
    data = write_user(factory.settings.home_folder / "data.jsonl", habit, count)
    add_data(factory, Reference.parse(user), [str(data)])
    recipe = load_recipe(None, [*QUICK, *settings])
    with transaction(factory.engine) as session:
        return request_training(session, Reference.parse(user), pin_base(factory), recipe).job_id


def is_over(factory: Factory, job: JobId) -> bool:
    """Whether a job's version is there."""
    with reading(factory.engine) as session:
        return session.get_one(Job, job).state in ("published", "refused")


def test_who_comes_meanwhile_pays_for_its_own_and_is_told_of(base_folder: Path, tmp_path: Path, heard: Heard) -> None:
    """Alice trains long; bob comes twice and eve's data is bad; then the worker is told to go."""
    factory = Factory(FactorySettings(home=tmp_path, base=str(base_folder), slots=4, worker="gpu-1"))
    factory.set_up()
    alice = ask(factory, "acme/alice", 24, "hello fox", "epochs=1000", "patience=1000")
    leave, came, looks = Leave(60), list[JobId](), list[Look]()

    def watch(pace: Pace) -> None:
        looks.append(factory.pulse.look)
        assert pace.micro_steps < PATIENCE
        if pace.micro_steps == 5:
            came.append(ask(factory, "globex/bob", 24, "hello fox", "epochs=2"))
            came.append(ask(factory, "acme/eve", 1, "hello fox"))
        if len(came) == 2 and is_over(factory, came[0]):
            came.append(ask(factory, "globex/bob", 24, "hello lazy dog", "epochs=2"))
        if len(came) == 3 and is_over(factory, came[2]):
            leave.ask()
            leave.ask()

    cohort = run_cohort(factory, watch=watch, leave=leave)

    assert cohort
    first, eve, second = came
    with looking(factory.engine) as session:
        versions = session.scalars(select(AdapterVersion).order_by(AdapterVersion.number)).all()
        run = session.scalars(select(Run)).one()
        failures = overview.failures(session, run.started_at)
        spent = overview.device_seconds(session, run.started_at)
    assert [one.job_id for one in versions] == [first, second]
    alices = cohort.meter.nanoseconds(["acme/alice"])
    shares = sum(round((one.device_seconds or 0) * NANOSECONDS) for one in versions)
    assert min(one.device_seconds or 0 for one in versions) > 0
    assert abs(shares + alices + cohort.meter.common - cohort.meter.total) <= 2  # what seconds as floats round away
    assert spent == cohort.meter.total / NANOSECONDS
    assert (versions[1].tokens or 0) < 3 * (versions[0].tokens or 0)  # twice the data, and not the first job's again
    assert {key: run.facts[key] for key in ("published", "failed", "put_off", "put_back")} == {
        "published": 2, "failed": 1, "put_off": 0, "put_back": 1,
    }  # fmt: skip
    assert [reason.kind for reason in grouped(failures)] == ["data"]

    assert (looks[0].users, looks[-1].users) == (1, 4)
    assert max(one.training for one in looks) == 2
    assert factory.pulse.look.phase == "idle"
    assert heard.of[alice] == ["job claimed", "job put back"]
    assert heard.of[first] == heard.of[second] == ["job claimed", "version published"]
    assert heard.of[eve] == ["job claimed", "job failed"]
    assert heard.of[None] == ["cohort finished"]


def test_a_process_that_rests_as_long_as_it_was_told_to_has_not_stood_still() -> None:
    """A worker that looks once an hour, or a clock that ticks so, is not to be started again in between."""
    clock = [0.0]
    pulse = Pulse(lambda: clock[0])
    clock[0] = 10.0
    pulse.rest(3600)
    idle = []
    for clock[0] in (20.0, 3610.0, 3640.0):
        idle.append(pulse.idle_for())

    assert idle == [0, 0, 30]


def test_who_tunes_is_seen_at_work(
    lora_here: LoraHere, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else `lora status` would call it silent, and its jobs about to be somebody else's."""
    seen: list[str] = []

    def look(factory: Factory, *_: object) -> None:
        end = time.monotonic() + 10
        while not seen and time.monotonic() < end:
            with reading(factory.engine) as session:
                seen.extend(worker.name for worker in workers.present(session, now()))

    monkeypatch.setattr("flows.work.run_cohort", look)
    data = write_user(tmp_path / "data.jsonl", "hello fox")

    lora_here("tune", "acme/alice", "--data", str(data), "--base", str(base_folder), LORA_WORKER="tuner")

    assert seen == ["tuner"]
