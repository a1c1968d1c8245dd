"""Crash-proof publish, in full: `python benchmarks/crash_publish.py`.

Takes a user's data the whole way to a published version, in a process of its own, and raises N until nothing happens:
SIGKILL at the Nth point, on {SQLite, PostgreSQL} x {folder, S3 server}, for a new user's first version and for the
next one of a user who has many; then the Nth call failed or its answer lost; then SIGSTOP at the Nth point while a
rival sweeps, takes the job and publishes.  What is checked after each is in `tests/faults/invariants.py`.  The first
violation ends the run.  Ceph RGW must be installed for a real S3 server (infra/install-test-servers).
"""

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import TypedDict

from benchmarks.command_line import end_when_told, from_one
from registry.names import Reference
from tests.faults.invariants import check_nothing_is_left, check_readers_see_whole_versions
from tests.faults.trials import PARTS, Site, count_points, every, fail_at, kill_at, stop_at
from tests.servers import new_database, running_postgres, running_s3

RESULTS = Path(__file__).parent / "results" / "crash_publish.json"
DATABASES = ("sqlite", "postgresql")
PLAN = (  # how, of what, on which stores
    ("kill", "next version", ("folder", "s3")),
    ("kill", "first version", ("folder",)),
    ("error", "next version", ("folder", "s3")),
    ("stop", "next version", ("folder",)),
)


class Piece(TypedDict):
    """One loop over N, and what came of it."""

    database: str
    store: str
    how: str
    of: str
    stride: int  # 1: at every point
    faults: int
    seconds: float
    outcomes: dict[str, int]
    points: dict[str, int]  # where, and how often


def trial_of(site: Site, how: str, of: str, chance: random.Random) -> Callable[[int], bool]:
    """The trial at N."""

    def trial(number: int) -> bool:
        user = f"acme/u{uuid.UUID(int=chance.getrandbits(128)).hex}" if of == "first version" else "acme/alice"
        if how == "kill":
            return kill_at(site, user, number, resume=chance.random() < 0.5)
        return fail_at(site, user, number) if how == "error" else stop_at(site, user, number, chance.choice(PARTS))

    return trial


def measure(site: Site, database: str, store: str, how: str, of: str, seed: int, stride: int) -> Piece:
    """One loop over N on a site of its own; at its end, every version of the site is read."""
    count_points(site, "acme/alice")
    start = time.perf_counter()
    faults = every(trial_of(site, how, of, random.Random(seed)), stride)
    seconds = time.perf_counter() - start
    check_nothing_is_left(site.engine, site.store)
    check_readers_see_whole_versions(site.engine, site.store, Reference.parse("acme/alice"), newest=faults + 2)
    return {
        "database": database, "store": store, "how": how, "of": of, "stride": stride, "faults": faults,
        "seconds": round(seconds, 1), "outcomes": dict(site.happened), "points": dict(site.points),
    }  # fmt: skip


@contextmanager
def servers() -> Iterator[tuple[str, Path]]:
    """PostgreSQL's URL, and a folder for everything else; boto3's environment knows the S3 server."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)  # PostgreSQL may run as another user
        for part in ("postgres", "s3", "sites"):
            (folder / part).mkdir()
        with running_postgres(folder / "postgres") as postgres, running_s3(folder / "s3") as s3:
            os.environ.update(s3.environment())
            yield postgres, folder / "sites"


def new_site(postgres: str, folder: Path, database: str, store: str) -> Site:
    """An empty registry and an empty store."""
    own = folder / uuid.uuid4().hex
    own.mkdir()
    url = new_database(postgres) if database == "postgresql" else f"sqlite:///{own / 'registry.db'}"
    return Site(url, f"s3://crash-{own.name[:16]}" if store == "s3" else str(own / "store"), own)


def save(path: Path, seed: int, pieces: list[Piece]) -> None:
    """Everything that was measured so far."""
    machine = {
        "date": datetime.now(UTC).date().isoformat(), "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
    }  # fmt: skip
    path.write_text(json.dumps({"machine": machine, "seed": seed, "results": pieces}, indent=1) + "\n")


def main() -> None:
    """Run the plan and keep what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--how", nargs="+", choices=("kill", "error", "stop"), default=["kill", "error", "stop"])
    parser.add_argument("--stride", type=from_one, default=1, help="at every point, or only at every Nth")
    parser.add_argument("--save", type=Path, default=RESULTS)
    options = parser.parse_args()
    end_when_told()
    pieces: list[Piece] = []
    with servers() as (postgres, folder):
        for how, of, stores in PLAN:
            for database, store in product(DATABASES, stores):
                if how in options.how:
                    site = new_site(postgres, folder, database, store)
                    pieces.append(measure(site, database, store, how, of, options.seed, options.stride))
                    save(options.save, options.seed, pieces)
                    say(pieces[-1])


def say(piece: Piece) -> None:
    """One line of the report."""
    where = f"{piece['database']:>10} {piece['store']:>6} {piece['how']:>5} {piece['of']}"
    sys.stdout.write(f"{where} {piece['faults']:5} faults {piece['seconds']:7} s  {piece['outcomes']}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
