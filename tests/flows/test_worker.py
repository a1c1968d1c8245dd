"""A worker that admits newcomers, is told to go, is killed or stands still: each user once, and the same bytes."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from flows import outgoing
from flows.entrance import Entrance, Newcomer
from flows.factory import Factory, add_data, now, pin_base, request_training
from flows.leaving import Leave, on_signals
from flows.reproduce import reproduce
from flows.settings import FactorySettings
from flows.work import run_cohort
from lora_core.recipe import load_recipe
from lora_core.train import Pace
from registry import jobs
from registry.errors import SettingRefused, StoreUnavailable
from registry.models import Job
from registry.names import JobId, Reference
from registry.session import reading, transaction
from tests.flows.conftest import LORA, QUICK, ROOT, Lora, quiet_environment, write_user

Ask = Callable[..., JobId]
LONG = {"epochs": 100, "patience": 100}
PATIENCE = 5000  # micro-steps that a test gives a worker


@pytest.fixture
def factory(base_folder: Path, tmp_path: Path, sqlite_tables: Path) -> Factory:
    """A factory whose registry and store other machines reach too."""
    shutil.copyfile(sqlite_tables, tmp_path / "registry.db")
    return on_machine("first", base_folder, tmp_path)


def on_machine(name: str, base_folder: Path, shared: Path) -> Factory:
    """The same registry and store, from a machine with a home of its own."""
    made = Factory(
        FactorySettings(
            home=shared / name, base=str(base_folder), slots=4, database_url=f"sqlite:///{shared / 'registry.db'}",
            store_url=(shared / "store").as_uri(), worker=name,
        )
    )  # fmt: skip
    made.set_up()
    return made


@pytest.fixture
def ask(factory: Factory, tmp_path: Path) -> Ask:
    """Add data for a user and ask for training."""
    pinned = pin_base(factory)

    def ask_for(user: str, count: int = 24, **settings: object) -> JobId:
        reference = Reference.parse(user)
        add_data(factory, reference, [str(write_user(tmp_path / "data.jsonl", "hello fox", count, seed=len(user)))])
        recipe = load_recipe(None, [*QUICK, *(f"{key}={value}" for key, value in settings.items())])
        with transaction(factory.engine) as session:
            return request_training(session, reference, pinned, recipe).job_id

    return ask_for


def job_now(factory: Factory, job: JobId) -> Job:
    """A job as it is now."""
    with reading(factory.engine) as session:
        return session.get_one(Job, job)


def progress_kept(shared: Path) -> list[Path]:
    """What lies in the store of unfinished trainings."""
    return [path for path in (shared / "store").rglob("*.safetensors") if "progress" in path.parts]


@pytest.mark.long
def test_newcomers_are_let_in_published_while_others_go_on_and_those_go_on_elsewhere(
    factory: Factory, ask: Ask, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One cohort: alice trains long, bob comes and is published, eve's data is bad; then the worker is told to go."""
    monkeypatch.setattr(outgoing, "PATIENCE_SECONDS", 0.5)  # or alice may be through before bob is judged
    alice = ask("acme/alice", **LONG)
    leave, came = Leave(60), list[JobId]()

    def watch(pace: Pace) -> None:
        assert pace.micro_steps < PATIENCE
        if pace.micro_steps == 5:
            came.extend([ask("globex/bob", epochs=2), ask("acme/eve", count=1)])
        if came and len(pace.training) < 2:
            time.sleep(0.02)  # a newcomer is looked for once a second
        if came and job_now(factory, came[0]).state == "published":
            assert "acme/alice" in pace.training
            leave.ask()
            leave.ask()

    cohort = run_cohort(factory, watch=watch, leave=leave)

    assert cohort
    assert [*cohort.published] == ["globex/bob"]
    assert [*cohort.failed] == ["acme/eve"]
    assert [*cohort.put_back.values()] == ["acme/alice"]
    assert (job_now(factory, alice).state, job_now(factory, alice).attempts) == ("queued", 0)
    assert reproduce(factory, "globex/bob").equal
    assert progress_kept(tmp_path)

    assert goes_on_on("second", base_folder, tmp_path) == ["acme/alice"]
    assert progress_kept(tmp_path) == []


def test_whom_the_store_would_not_take_is_published_while_others_train_on(
    factory: Factory, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that was away for a moment holds nobody up until the cohort's end, which may be an hour off."""
    monkeypatch.setattr(outgoing, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(outgoing, "AWAY_SECONDS", 0.05)
    alice, bob, carol = ask("acme/alice", **LONG), ask("globex/bob", epochs=1), ask("acme/carol", epochs=1)
    put, refused, leave = factory.store.put_new, list[str](), Leave(60)

    def away(key: str, data: bytes) -> object:
        if "/t/globex/" in f"/{key}" and len(refused) < 3:
            refused.append(key)
            raise StoreUnavailable("s3://x", "timeout", "try again")
        return put(key, data)

    def watch(pace: Pace) -> None:
        assert pace.micro_steps < PATIENCE
        time.sleep(0.02 if len(pace.training) < 3 else 0)
        if job_now(factory, bob).state == job_now(factory, carol).state == "published":
            assert "acme/alice" in pace.training
            leave.ask()
            leave.ask()

    monkeypatch.setattr(factory.store, "put_new", away)
    cohort = run_cohort(factory, watch=watch, leave=leave)

    assert cohort
    assert len(refused) == 3
    assert {user: version.number for user, version in cohort.published.items()} == {"globex/bob": 1, "acme/carol": 1}
    assert [*cohort.put_back.values()] == ["acme/alice"]
    assert job_now(factory, alice).state == "queued"


def test_a_worker_that_meets_its_own_lost_job_begins_it_again_once_it_has_noticed(
    base_folder: Path, tmp_path: Path, factory: Factory, ask: Ask
) -> None:
    """It stood still, or the database was away, for longer than a lease: the queue gives it what it is at already."""
    job = ask("acme/alice", epochs=30, patience=30)
    settings = factory.settings.model_copy(update={"lease_seconds": 6, "save_seconds": 0.1})
    again = False

    def watch(pace: Pace) -> None:
        nonlocal again
        assert pace.micro_steps < PATIENCE
        if pace.micro_steps == 5:
            with transaction(factory.engine) as session:
                session.get_one(Job, job).lease_until = now() - timedelta(seconds=1)
                (taken,) = jobs.claim(session, "other", timedelta(hours=1), 1, now(), [job])
                jobs.release(session, taken, now())
        if not again and pace.micro_steps > 5:
            found = job_now(factory, job)
            again = found.state == "running" and found.fence > 2
            time.sleep(0.05)  # so that it is not done before it has noticed

    cohort = run_cohort(Factory(settings), watch=watch)

    assert cohort
    assert again
    assert cohort.failed == {}
    assert cohort.published["acme/alice"].number == 1
    assert job_now(factory, job).state == "published"
    assert reproduce(factory, "acme/alice").equal


def goes_on_on(name: str, base_folder: Path, shared: Path) -> list[str]:
    """Who is published by a cohort on another machine, from what was saved and to the bytes that it takes alone."""
    machine, had = on_machine(name, base_folder, shared), list[bool]()
    cohort = run_cohort(machine, watch=lambda _: had.append(any((shared / name / "saves").glob("*.safetensors"))))
    assert cohort
    assert had[0]
    assert all(reproduce(machine, label).equal for label in cohort.published)
    return [*cohort.published]


def start_working(home: Path, shared: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    """`lora work` in a process of its own, on a machine of its own, with leases of two seconds."""
    urls = {
        "LORA_DATABASE_URL": f"sqlite:///{shared / 'registry.db'}", "LORA_STORE_URL": (shared / "store").as_uri(),
        "LORA_LEASE_SECONDS": "2", "LORA_SAVE_SECONDS": "0.2", "LORA_SLOTS": "4",
    }  # fmt: skip
    return subprocess.Popen(
        [*LORA, "work", "--every", "0.1", "--json", *words], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=quiet_environment(home) | urls | environment,
    )  # fmt: skip


def wait_for(process: subprocess.Popen[str], happened: Callable[[], object]) -> None:
    """Until something has happened, or the process is over."""
    for _ in range(3000):
        if happened() or process.poll() is not None:
            break
        time.sleep(0.02)
    assert process.poll() is None


def saved(home: Path) -> list[Path]:
    """What a machine has saved."""
    return list((home / "home" / "saves").glob("*.safetensors"))


def test_a_worker_told_to_go_saves_puts_back_and_exits_with_0(
    factory: Factory, ask: Ask, base_folder: Path, tmp_path: Path
) -> None:
    """SIGTERM, as from Kubernetes or a spot machine; whoever comes next is another machine, and the bytes are equal."""
    job = ask("acme/alice", **LONG)
    home = tmp_path / "leaving"
    worker = start_working(home, tmp_path, "--grace", "0s")
    wait_for(worker, lambda: saved(home))

    worker.send_signal(signal.SIGTERM)
    out, told = worker.communicate(timeout=120)

    assert worker.returncode == 0, told
    assert "SIGTERM: nothing more is taken" in told
    assert [row["result"] for row in json.loads(out)] == ["put back"]
    assert (job_now(factory, job).state, job_now(factory, job).attempts) == ("queued", 0)
    assert goes_on_on("second", base_folder, tmp_path) == ["acme/alice"]


@pytest.mark.long
def test_a_killed_workers_training_goes_on_on_another_machine(
    factory: Factory, ask: Ask, base_folder: Path, tmp_path: Path
) -> None:
    """SIGKILL; with saves in the store the next worker needs nothing of the dead one's disk."""
    ask("acme/alice", **LONG)
    home = tmp_path / "doomed"
    worker = start_working(home, tmp_path, LORA_SAVE_TO="store")
    wait_for(worker, lambda: progress_kept(tmp_path))
    worker.kill()
    worker.communicate()
    time.sleep(2.5)

    assert goes_on_on("second", base_folder, tmp_path) == ["acme/alice"]
    assert progress_kept(tmp_path) == []


@pytest.mark.long
def test_a_worker_that_stood_still_past_its_lease_makes_no_second_version(
    factory: Factory, ask: Ask, base_folder: Path, tmp_path: Path, lora: Lora
) -> None:
    """SIGSTOP; another trains the job to its end; on waking the first finds out, lets it be, and works on."""
    ask("acme/alice", **LONG)
    home = tmp_path / "slow"
    slow = start_working(home, tmp_path)
    wait_for(slow, lambda: saved(home))
    slow.send_signal(signal.SIGSTOP)
    time.sleep(2.5)

    cohort = run_cohort(on_machine("fast", base_folder, tmp_path))
    slow.send_signal(signal.SIGCONT)
    bob = ask("globex/bob")
    wait_for(slow, lambda: job_now(factory, bob).state == "published")
    slow.send_signal(signal.SIGTERM)
    out, told = slow.communicate(timeout=120)

    assert cohort
    assert cohort.published["acme/alice"].number == 1
    assert slow.returncode == 0, told
    assert '"acme/alice"' in out
    listed = factory.client.resolve(Reference.parse("acme/alice"))
    assert listed.number == 1
    with pytest.raises(Exception, match="acme/alice:2"):
        factory.client.resolve(Reference.parse("acme/alice:2"))


def test_leaving_trains_for_half_of_the_grace_and_not_at_all_when_asked_twice() -> None:
    """The other half is for saving, judging and publishing."""
    time_now = 100.0
    leave = Leave(30, clock=lambda: time_now)
    assert not leave.due

    leave.ask()
    before = (leave.asked, leave.due)
    time_now += 15
    after = leave.due
    hurried = Leave(30, clock=lambda: time_now)
    hurried.ask()
    hurried.ask()

    assert (before, after, hurried.due) == ((True, False), True, True)


def test_a_note_asks_a_worker_to_leave_as_a_signal_does(tmp_path: Path) -> None:
    """For the processes of a work pool's worker, to which nobody sends one."""
    leave = Leave(30, note=tmp_path / "leave")
    assert not leave.asked

    (tmp_path / "leave").touch()

    assert leave.asked


def test_signals_are_heard_and_given_back() -> None:
    """What was there before hears the next one."""
    before, words = signal.getsignal(signal.SIGTERM), list[str]()
    leave = Leave(30)

    with on_signals(leave, words.append):
        os.kill(os.getpid(), signal.SIGTERM)
        asked = leave.asked
        os.kill(os.getpid(), signal.SIGTERM)

    assert asked
    assert leave.due
    assert ["again" in word.partition(":")[0] for word in words] == [False, True]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_store_that_is_away_lets_nobody_in_and_breaks_nobody() -> None:
    """Those who train go on; what is a fault of ours is raised."""

    def away(_: int) -> list[Newcomer]:
        raise StoreUnavailable("s3://x", "timeout", "try again")

    def broken(_: int) -> list[Newcomer]:
        raise ZeroDivisionError

    for fetch in (away, broken):
        entrance = Entrance(fetch, Leave(30), 4, 60)
        entrance.look(1, empty=False)
        if fetch is away:
            assert entrance.collect(wait=True) == ()
            entrance.look(4, empty=False)
            assert not entrance.expecting
        else:
            with pytest.raises(ZeroDivisionError):
                entrance.collect(wait=True)
        assert entrance.close() == ()


@pytest.mark.parametrize("grace", ["soon", "-1", "30 s 2", "1e999", "nan", "900h", "0x10", "³s", "10s\n20s"])
def test_a_grace_that_is_no_time_is_refused(grace: str) -> None:
    """By the name that it was given under."""
    with pytest.raises(SettingRefused, match="--grace"):
        FactorySettings.read(grace=grace)


def test_a_grace_is_read_in_seconds_minutes_and_hours() -> None:
    """As a person writes it."""
    found = [FactorySettings.read(grace=text).grace for text in ("30", "30s", "2m", "1h", "0.5s")]

    assert found == [30, 30, 120, 3600, 0.5]
