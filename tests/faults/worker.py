"""A worker process that goes the whole way from a user's data to a published version, and what befalls it there."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, TypeVar

from sqlalchemy import Engine, event

from flows import factory as flows_factory
from flows.factory import Factory, Pinned, add_data, request_training
from flows.settings import FactorySettings
from lora_core.recipe import Recipe
from registry import aliases, jobs, queries
from registry.errors import LeaseLost, NotFound, RegistryError
from registry.jobs import ClaimedJob
from registry.names import Reference
from registry.orders import Enqueued
from registry.publishing import Finished, declare, publish, upload
from registry.session import transaction
from registry.uploads import UPLOAD_LEASE, sweep
from tests.faults.points import Fault, Points, watch_database, watch_store

LEASE = timedelta(minutes=5)
IMPATIENT = {"sqlite": "PRAGMA busy_timeout = 100", "postgresql": "SET lock_timeout = '100ms'"}
BASE = Pinned("tiny", "main", "b" * 64, 7)
Part = Literal["whole", "claim", "sweep"]
Result = TypeVar("Result")


def _environment() -> dict[str, str]:
    """What the S3 server wants to know; a forked child has the environment of the server that it came from."""
    return {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "LORA_"))}


@dataclass(frozen=True)
class Errand:
    """Whose data goes the whole way, when, and what befalls the process that does it."""

    database: str
    store: str
    reference: str
    data: Path
    moment: datetime
    content: str = "weights"  # what the training came to
    fault: Fault | None = None
    claimed: ClaimedJob | None = None  # a job still in hand from before
    part: Part = "whole"  # up to its claim; or nothing but the sweep
    impatient: bool = False  # does not wait for locks that a stopped process holds
    environment: Mapping[str, str] = field(default_factory=_environment)


class Worker:
    """One process on its errand; tells its parent what it has reached."""

    def __init__(self, errand: Errand, tell: Callable[[str, Any], None]) -> None:  # facts of any kind
        self.errand, self.tell, self.moment = errand, tell, errand.moment
        self.points = Points(errand.fault, lambda name: tell("fault", name))
        self.reference = Reference.parse(errand.reference)
        settings = FactorySettings(database_url=errand.database, store_url=errand.store)
        self.factory = Factory(settings)
        if errand.impatient:
            _wait_for_no_lock(self.factory.engine)
        watch_database(self.factory.engine, self.points)
        self.factory.store = watch_store(self.factory.store, self.points)
        flows_factory.now = lambda: self.moment

    def go(self) -> None:
        """Ingest, ask for training, claim, publish, promote, sweep; each step once more if it fails."""
        if self.errand.part != "sweep":
            self.bring()
        if self.errand.part == "claim":
            return
        late = self.moment + 2 * UPLOAD_LEASE
        self.tell("swept", self.step("sweep", lambda: sweep(self.factory.engine, self.factory.store, late)))
        self.tell("points", self.points.passed)

    def bring(self) -> None:
        """From data to the promoted version."""
        self.step("ingest", lambda: add_data(self.factory, self.reference, [str(self.errand.data)]))
        asked = self.step("ask", self.ask)
        number = asked.number
        if job := self.errand.claimed or self.step("claim", lambda: self.claim(asked)):
            self.tell("claimed", job)
            if self.errand.part == "claim":
                return
            number = self.publish(job)
        if number is None:
            raise NotFound("free job", str(asked.job_id), "somebody has it")
        self.tell("published", number)
        self.step("promote", lambda: self.promote(number))

    def step(self, stage: str, act: Callable[[], Result]) -> Result:
        """One step, tried again after an error of the registry; anything else is a fault of the product."""
        self.points.stage = stage
        try:
            return act()
        except LeaseLost:
            raise
        except RegistryError:
            return act()

    def ask(self) -> Enqueued:
        """The job of the newest data."""
        with transaction(self.factory.engine) as session:
            return request_training(session, self.reference, BASE, Recipe())

    def claim(self, asked: Enqueued) -> ClaimedJob | None:
        """The job in hand; a claim whose answer was lost is made again once its lease is over."""
        with transaction(self.factory.engine) as session:
            found = jobs.claim(session, "worker", LEASE, 1, self.moment, [asked.job_id])
        self.moment += 2 * LEASE
        if found or asked.unchanged:
            return found[0] if found else None
        with transaction(self.factory.engine) as session:
            found = jobs.claim(session, "worker", LEASE, 1, self.moment, [asked.job_id])
        return found[0] if found else None

    def publish(self, job: ClaimedJob) -> int:
        """Publish what was trained, beside an attempt with other content that never came to its commit; twice."""
        engine, store, done = self.factory.engine, self.factory.store, finished(self.errand.content)
        self.step("abandon", lambda: upload(store, declare(engine, job, "0" * 64, self.moment), {"half.bin": b"half"}))
        first = self.step("publish", lambda: publish(engine, store, job, done, self.moment))
        again = self.step("repeat", lambda: publish(engine, store, job, done, self.moment))
        assert first == again, "a retry gave another version"
        return first.number

    def promote(self, number: int) -> None:
        """`production` moves to the version."""
        wanted = Reference(self.reference.tenant, self.reference.user, number=number)
        with transaction(self.factory.engine) as session:
            tenant = queries.tenant_id(session, wanted.tenant)
            aliases.promote(session, tenant, wanted, "production", actor="worker", reason="new", now=self.moment)


def run(errand: Errand, wire: Connection) -> None:
    """The whole life of a child process."""
    os.environ.update(errand.environment)
    worker = Worker(errand, lambda kind, fact: wire.send((kind, fact)))
    try:
        worker.go()
    except RegistryError as error:
        wire.send(("error", error))


def finished(content: str) -> Finished:
    """What a training came to, of a few bytes."""
    data = content.encode() * 64
    facts = {"weights.bin": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}}
    files = {"weights.bin": data, "manifest.json": json.dumps({"files": facts}).encode()}
    return Finished(files, True, "better", 40, {"base": {"loss": 2.0}, "candidate": {"loss": 1.0}}, None, "0.1")


def _wait_for_no_lock(engine: Engine) -> None:
    """Give up soon where a stopped process holds a lock."""

    @event.listens_for(engine, "connect")
    def shorten(connection: Any, _: object) -> None:  # the driver's connection
        connection.cursor().execute(IMPATIENT[engine.dialect.name])
        connection.commit()
