"""`lora work` in this process: what it tells, and what it does besides training."""

import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from flows.cli import working
from flows.factory import Factory, now, pin_base
from flows.leaving import Leave
from flows.logs import LOG, set_up_logs
from flows.settings import FactorySettings
from registry import queries, schedules
from registry.errors import StoreUnavailable
from registry.names import Reference
from registry.session import transaction
from registry.timing import Timing
from tests.flows.conftest import LoraHere


@pytest.fixture(autouse=True)
def _no_logs_afterwards() -> Iterator[None]:
    """Other tests begin without logs."""
    kept = LOG.handlers, LOG.level, LOG.propagate
    yield
    LOG.handlers, LOG.level, LOG.propagate = kept


@pytest.fixture
def factory(home: Path) -> Factory:
    """A factory in LORA_HOME."""
    made = Factory(FactorySettings(home=home))
    made.set_up()
    return made


def test_who_cannot_be_queued_is_told_as_an_event_without_a_name(
    lora_here: LoraHere, factory: Factory, base_folder: Path
) -> None:
    """A schedule of somebody who has no data: one JSON line, by the opaque id."""
    with transaction(factory.engine) as session:
        whose, before = Reference.parse("acme/eve-smith"), now() - timedelta(hours=2)
        holder = queries.ensure_adapter(session, whose, before)
        base = pin_base(factory, str(base_folder)).name
        schedules.put(session, holder.tenant_id, holder, Timing.every("1h"), base, {}, before)
        opaque = holder.user.opaque

    said = lora_here("work", "--once", "--json")

    lines = [json.loads(line) for line in said.err.splitlines()]
    (told,) = [line for line in lines if line["event"] == "not queued"]
    assert {key: told[key] for key in ("level", "tenant", "user", "adapter")} == {
        "level": "warning", "tenant": "acme", "user": opaque, "adapter": "default",
    }  # fmt: skip
    assert "no dataset" in told["reason"]
    assert "eve-smith" not in said.err


def test_a_worker_without_a_terminal_says_what_it_did_and_no_more(lora_here: LoraHere, factory: Factory) -> None:
    """Its bar would leave an empty line in the log at every look."""
    assert lora_here("work", "--once").out == "nobody waits\n"


class Shift:
    """Stands in for training: cohorts of one user each, and what a worker does between them."""

    def __init__(self, users: list[str], leave: Leave | None = None) -> None:
        self.users, self.leave = users, leave
        self.done: list[str] = []

    def run_cohort(self, *_: object, **__: object) -> str | None:
        """The next user's cohort; None after the last, when the worker is told to go if it would go on for ever."""
        if not self.users:
            if self.leave:
                self.leave.ask()
            return None
        self.done.append(user := self.users.pop(0))
        return user

    def rows(self, cohort: str) -> list[dict[str, str]]:
        """The user's row."""
        return [{"user": cohort, "result": "accepted", "version": "1", "why": ""}]

    def keep_up(self, _: Factory) -> list[str]:
        """One of its jobs fails."""
        self.done.append("keep up")
        return ["collecting of tenant 7: timeout"]

    def take_over(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """From now on."""
        monkeypatch.setattr("flows.work.run_cohort", self.run_cohort)
        monkeypatch.setattr("flows.report.rows", self.rows)
        monkeypatch.setattr("flows.upkeep.keep_up", self.keep_up)


@pytest.mark.parametrize(("pause", "upkeeps"), [(60.0, 1), (0.0, 3)])
def test_a_busy_worker_shows_each_cohort_and_keeps_up_between_them(
    factory: Factory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    pause: float,
    upkeeps: int,
) -> None:
    """Though somebody always waits; upkeep that fails hides nobody."""
    shift = Shift(["acme/ada", "acme/bob", "acme/eve"], leave := Leave(30))
    shift.take_over(monkeypatch)
    monkeypatch.setattr(working, "UPKEEP_SECONDS", pause)
    set_up_logs(factory.settings)

    working.work_on(factory, leave, 0.1, as_json=True)

    said = capsys.readouterr()
    assert shift.done[:3] == ["acme/ada", "keep up", "acme/bob"]
    assert shift.done.count("keep up") == upkeeps
    assert said.out.count('"result": "accepted"') == said.out.count("[\n") == 3
    told = [json.loads(line)["reason"] for line in said.err.splitlines()]
    assert told == ["collecting of tenant 7: timeout"] * upkeeps


def test_a_worker_that_works_once_shows_all_cohorts_then_keeps_up(
    lora_here: LoraHere, factory: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one list; upkeep that fails is told, and changes neither the list nor the exit code."""
    shift = Shift(["acme/ada", "acme/bob"])
    shift.take_over(monkeypatch)

    said = lora_here("work", "--once", "--json")

    assert shift.done == ["acme/ada", "acme/bob", "keep up"]
    assert (said.code, [row["user"] for row in json.loads(said.out)]) == (0, ["acme/ada", "acme/bob"])
    assert [json.loads(line)["event"] for line in said.err.splitlines()] == ["not kept up"]


def test_trouble_between_two_cohorts_hides_nobody(
    lora_here: LoraHere, factory: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the store away after the first, what became of it is shown; the exit code says that not all is done."""
    shift = Shift(["acme/ada"])
    shift.take_over(monkeypatch)

    def away(*_: object, **__: object) -> str | None:
        if not shift.users:
            raise StoreUnavailable("s3://x", "timeout", "try again")
        return shift.run_cohort()

    monkeypatch.setattr("flows.work.run_cohort", away)

    said = lora_here("work", "--once", "--json")

    assert (said.code, [row["user"] for row in json.loads(said.out)]) == (1, ["acme/ada"])
    assert "error: " in said.err
