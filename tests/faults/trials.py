"""Trials: a worker process meets a fault at its Nth point, somebody goes on after it, and the invariants are checked.

The children are forked off a server that has everything imported, so that a trial takes a fraction of a second.
"""

import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from registry.errors import LeaseLost
from registry.jobs import ClaimedJob
from registry.names import Reference
from registry.store import open_store
from registry.uploads import UPLOAD_LEASE, sweep
from tests.conftest import set_up
from tests.faults.invariants import (
    check_no_intent_is_left,
    check_nothing_is_left,
    check_readers_see_whole_versions,
)
from tests.faults.points import Fault
from tests.faults.worker import Errand, Part, run

PARTS: tuple[Part, ...] = ("claim", "sweep", "whole")  # what another may do while a worker is stopped
_SPAWN = multiprocessing.get_context("forkserver")
_SPAWN.set_forkserver_preload(["tests.faults.worker", "tests.faults.points", "boto3", "psycopg", "pytest"])
_PATIENCE = 60  # seconds that a child may take
_START = datetime(2026, 3, 1, tzinfo=UTC)
_HOUR = timedelta(hours=1)


@dataclass
class Child:
    """A worker process and what it has told so far."""

    process: multiprocessing.process.BaseProcess
    wire: Connection
    told: dict[str, Any] = field(default_factory=dict)  # facts of any kind

    def listen(self, until: str | None = None) -> None:
        """Take in what it says, until it has said one thing or has ended."""
        while until is None or until not in self.told:
            assert self.wire.poll(_PATIENCE), f"a child hangs after {self.told}"
            try:
                kind, fact = self.wire.recv()
            except EOFError:
                break
            self.told[kind] = fact

    def end(self) -> int:
        """Its exit code, once it has ended."""
        self.listen()
        self.process.join(_PATIENCE)
        assert self.process.exitcode is not None
        return self.process.exitcode


@dataclass
class Site:
    """A registry and a store, and the trials made on them."""

    database: str
    store_url: str
    folder: Path  # for the users' files
    moment: datetime = _START
    trials: int = 0
    happened: Counter[str] = field(default_factory=Counter)
    points: Counter[str] = field(default_factory=Counter)  # where faults happened, by what a child told

    def __post_init__(self) -> None:
        self.engine, self.store = set_up(self.database), open_store(self.store_url)
        self.database = self.engine.url.render_as_string(hide_password=False)  # as the application does
        self.store.set_up()

    def errand(self, reference: str) -> Errand:
        """The next trial's: data that nobody has seen before, long after the last one."""
        self.trials, self.moment = self.trials + 1, self.moment + 8 * _HOUR
        data = self.folder / "data.jsonl"
        data.write_text("".join(json.dumps({"text": f"trial {self.trials} line {line}"}) + "\n" for line in range(9)))
        return Errand(self.database, self.store_url, reference, data, self.moment, f"weights {self.trials}")

    def go(self, errand: Errand) -> tuple[int, dict[str, Any]]:  # facts of any kind
        """Run a child to its end."""
        child = self.start(errand)
        return child.end(), child.told

    def start(self, errand: Errand) -> Child:
        """A child on its errand."""
        ours, theirs = _SPAWN.Pipe(duplex=False)
        process = _SPAWN.Process(target=run, args=(errand, theirs))
        process.start()
        theirs.close()
        return Child(process, ours)


def count_points(site: Site, reference: str) -> int:
    """How many points the whole way has when nothing happens."""
    errand = site.errand(reference)
    code, told = site.go(errand)
    assert (code, "error" in told) == (0, False), told
    finish(site, errand, told)
    return int(told["points"])


def kill_at(site: Site, reference: str, number: int, resume: bool) -> bool:
    """SIGKILL at the Nth point; then the job goes on, in the same hands or claimed anew; False if there is no Nth."""
    errand = site.errand(reference)
    code, told = site.go(replace(errand, fault=Fault(number, "kill")))
    if code == 0:
        finish(site, errand, told)
        return False
    assert code == -signal.SIGKILL, (code, told)
    check_readers_see_whole_versions(site.engine, site.store, Reference.parse(reference))
    claimed: ClaimedJob | None = told.get("claimed") if resume else None
    later = errand.moment if claimed else errand.moment + 2 * UPLOAD_LEASE
    second, after = site.go(replace(errand, moment=later, claimed=claimed))
    if isinstance(after.get("error"), LeaseLost):  # the dead one's own sweep had begun on what it left
        second, after = site.go(replace(errand, moment=later + _HOUR))
    assert (second, after.get("error")) == (0, None), (told, after)
    assert told.get("published", after["published"]) == after["published"], "a retry gave another version"
    finish(site, errand, told)
    site.happened["killed, resumed" if claimed else "killed, claimed again"] += 1
    return True


def fail_at(site: Site, reference: str, number: int) -> bool:
    """The Nth call fails, or its answer is lost, and the worker tries again; False if there is no Nth."""
    errand = site.errand(reference)
    code, told = site.go(replace(errand, fault=Fault(number, "error")))
    assert code == 0, (code, told)
    if "error" in told:
        code, after = site.go(replace(errand, moment=errand.moment + _HOUR))
        assert (code, after.get("error")) == (0, None), (told, after)
    finish(site, errand, told)
    site.happened["failed"] += "fault" in told
    return "fault" in told


def stop_at(site: Site, reference: str, number: int, meanwhile: Part) -> bool:
    """SIGSTOP at the Nth point past all leases; another worker does its part; then the stopped one goes on.

    The other takes the job and publishes, or takes it and no more, or sweeps.  False if there is no Nth.
    """
    errand = site.errand(reference)
    child = site.start(replace(errand, fault=Fault(number, "stop")))
    child.listen(until="fault")
    if "fault" in child.told:
        wait_until_stopped(child.process.pid)
    late = replace(errand, moment=errand.moment + 2 * UPLOAD_LEASE, impatient=True, part=meanwhile)
    try:
        code, other = site.go(replace(late, content=f"rival's {errand.content}"))
        assert code == 0, (child.told, other)
    finally:
        if "fault" in child.told:
            os.kill(child.process.pid or 0, signal.SIGCONT)
    assert child.end() == 0, child.told
    _check_one_of_two(site, child.told, other)
    code, after = site.go(replace(errand, moment=errand.moment + 2 * _HOUR))
    assert (code, after.get("error")) == (0, None), (child.told, other, after)
    finish(site, errand, child.told)
    return "fault" in child.told


def every(trial: Callable[[int], bool], stride: int = 1) -> int:
    """Raise N until nothing happens; how many faults there were."""
    number = 1
    while trial(number):
        number += stride
    return (number - 1) // stride


def sample(seed: int, points: int, count: int) -> Iterator[int]:
    """One of each of so many equal stretches of the points; the same for the same seed."""
    chance = random.Random(seed)
    for part in range(count):
        yield chance.randint(1 + part * points // count, max(1, (part + 1) * points // count))


def _check_one_of_two(site: Site, stopped: dict[str, Any], other: dict[str, Any]) -> None:  # facts of any kind
    """Once the other has taken the job, the stopped one cannot publish it any more; nobody fails but by being told."""
    error = other.get("error")
    # Who was stopped before its own claim and finds the job over tells the version that the other made.
    assert not ("claimed" in other and {"claimed", "published"} <= stopped.keys()), "published a job that it had lost"
    did = next((did for did in ("published", "claimed") if did in other), "swept")
    met = "nobody, who was locked out" if error else f"another who {did}"
    site.happened[f"stopped, met {met}, then {'told' if 'error' in stopped else 'done'}"] += 1


def finish(site: Site, errand: Errand, told: dict[str, Any]) -> None:  # facts of any kind
    """One sweep leaves no orphan, a second one no intent; and readers see whole versions without gaps."""
    reference = Reference.parse(errand.reference)
    sweep(site.engine, site.store, errand.moment + 4 * _HOUR)
    check_nothing_is_left(site.engine, site.store, reference)
    sweep(site.engine, site.store, errand.moment + 6 * _HOUR)
    check_no_intent_is_left(site.engine)
    check_readers_see_whole_versions(site.engine, site.store, reference)
    if "fault" in told:
        site.points[told["fault"]] += 1


def wait_until_stopped(pid: int | None) -> None:
    """Wait until a process stands still."""
    until = time.monotonic() + _PATIENCE
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < until
        time.sleep(0.002)
