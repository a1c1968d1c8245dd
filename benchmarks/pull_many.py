"""Many adapters pulled at once, against a loop with boto3, from an S3 server 20 ms away.

A real S3 server (Ceph RGW where it is installed) behind a relay that holds every request back; 2,000 versions of four
files each, published the usual way, in a registry on PostgreSQL.  Three sides take turns, each into an empty folder:

  loop       boto3's `download_file`, one file after another, with its defaults, SHA-256 checked afterwards
  get loop   the same with `get_object`, which saves the HEAD that `download_file` sends before each file
  pull       `Client.pull_all`, from the name of the tenant to verified folders, registry included

The loops are told keys and digests; the pull asks the registry for them.  Then, with the store unplugged: how long a
pull takes of a version that is there.  And 200 pulls of one version at once: how many GETs.

    python benchmarks/pull_many.py --adapters 2000 --rounds 3
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random

import boto3
from sqlalchemy.engine import Engine

from benchmarks.command_line import end_when_told, from_one
from benchmarks.far_server import FarServer, far_server
from benchmarks.measuring import RESULTS, processor, ratios, save, say, spread
from registry import jobs, orders, queries
from registry.client import Client, Resolved
from registry.fleet import Where
from registry.names import LATEST, Reference
from registry.publishing import Finished, publish
from registry.resolving import resolve_all
from registry.schema import migrate
from registry.session import open_database, transaction
from registry.store import open_store
from tests.registry.crowd import release, start_crowd
from tests.servers import APPLICATION, S3Server, new_database, running_postgres, running_s3

BUCKET = "adapters"
NOW = datetime(2026, 3, 1, tzinfo=UTC)
Samples = dict[str, list[float]]


def files(user: int, kilobytes: int) -> dict[str, bytes]:
    """What a small adapter comes to: four files, like a real one's but for their content."""
    random = Random(user)
    content = {
        "README.md": b"# An adapter\n" * 60,
        "adapter_config.json": json.dumps({"r": 8, "target_modules": ["q_proj"], "user": user}).encode(),
        "adapter_model.safetensors": random.randbytes(1024 * kilobytes),
    }
    facts = {name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)} for name, data in content.items()}
    return content | {"manifest.json": json.dumps({"files": facts}).encode()}


def seed(engine: Engine, adapters: int, kilobytes: int) -> None:
    """One published version for each user of acme."""
    store = open_store(f"s3://{BUCKET}")
    store.set_up()
    with transaction(engine) as session:
        base = queries.ensure_base(session, name="tiny", revision="main", digest="b" * 64, parameters=7, now=NOW)
        for user in range(adapters):
            owner = queries.ensure_adapter(session, Reference("acme", f"user{user:05}"), NOW)
            digest = hashlib.sha256(str(user).encode()).hexdigest()
            dataset = queries.ensure_dataset(
                session, owner.tenant_id, owner, digest=digest, key=f"t/d/{digest}", examples=1, size=1, now=NOW
            )
            orders.enqueue(session, owner.tenant_id, owner, orders.Order(dataset, base, {}, "r" * 64, "g"), NOW)
    scores = {"base": {"loss": 2.0}, "candidate": {"loss": 1.0}}
    while True:
        with transaction(engine) as session:
            claimed = jobs.claim(session, "seed", timedelta(hours=1), 64, NOW)
        if not claimed:
            return
        for job in claimed:
            content = files(int(job.reference.user.removeprefix("user")), kilobytes)
            publish(engine, store, job, Finished(content, True, "", 1, scores, None, "0.1"), NOW)


def download_loop(versions: list[Resolved], folder: Path) -> None:
    """boto3 as its documentation shows it."""
    client = boto3.client("s3")
    for version in versions:
        at = folder / version.served_name
        at.mkdir()
        for name, facts in version.files.items():
            client.download_file(BUCKET, f"{version.prefix}/{name}", str(at / name))
            check(hashlib.sha256((at / name).read_bytes()).hexdigest(), str(facts["sha256"]))


def get_loop(versions: list[Resolved], folder: Path) -> None:
    """One request a file."""
    client = boto3.client("s3")
    for version in versions:
        at = folder / version.served_name
        at.mkdir()
        for name, facts in version.files.items():
            data = client.get_object(Bucket=BUCKET, Key=f"{version.prefix}/{name}")["Body"].read()
            (at / name).write_bytes(data)
            check(hashlib.sha256(data).hexdigest(), str(facts["sha256"]))


def pull(url: str, versions: list[Resolved], folder: Path) -> None:
    """A new client, from the tenant's name on."""
    engine = open_database(url)
    outcomes = list(Client(engine, open_store(f"s3://{BUCKET}"), folder).pull_all("acme"))
    engine.dispose()
    bad = [one for one in outcomes if one.error]
    if bad or len(outcomes) != len(versions):
        raise SystemExit(f"{len(outcomes)} of {len(versions)} pulled, {len(bad)} failed: {bad[:1]}")


def check(found: str, expected: str) -> None:
    """That bytes are what they should be."""
    if found != expected:
        raise SystemExit(f"{found} is not {expected}")


def compare(url: str, versions: list[Resolved], rounds: int) -> Samples:
    """Seconds of each side, in turns; a tenth of the versions warms all of them up."""
    sides: dict[str, Callable[[list[Resolved], Path], None]] = {
        "loop": download_loop,
        "pull": lambda wanted, folder: pull(url, versions, folder),
        "get loop": get_loop,
    }
    samples: Samples = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                side(versions if number else versions[: len(versions) // 10], Path(folder))
                seconds = time.perf_counter() - start
            if number:
                samples[name].append(seconds)
                say(f"round {number} {name:<8} {seconds:6.1f} s  {len(versions) / seconds:6.1f} adapters/s")
    return samples


def warm(engine: Engine, folder: Path, pulls: int) -> Samples:
    """Milliseconds of a pull of a version that is there: pinned (no network at all), and by alias (one look-up)."""
    client = Client(engine, open_store(f"s3://{BUCKET}"), folder)
    samples: Samples = {}
    for name, reference in (("pinned", "acme/user00000:1"), ("by alias", "acme/user00000")):
        client.pull(reference)
        samples[name] = []
        os.environ["AWS_ENDPOINT_URL_S3"] = "http://127.0.0.1:9"  # nobody
        for _ in range(pulls):
            start = time.perf_counter()
            client.pull(reference)
            samples[name].append(1e3 * (time.perf_counter() - start))
    return samples


def crowd(url: str, server: FarServer, folder: Path, pulls: int, processes: int) -> int:
    """How many GETs it takes when one version is pulled so many times at once."""
    each = (url, f"s3://{BUCKET}", folder, "acme/user00001", pulls // processes)
    crowds = [start_crowd(*each) for _ in range(processes)]
    before = server.gets
    if len(given := set(release(crowds))) != 1:
        raise SystemExit(f"they were given different things: {given}")
    return server.gets - before


@contextmanager
def servers(folder: Path, seconds: float) -> Iterator[tuple[str, S3Server, FarServer]]:
    """PostgreSQL, the S3 server, and the relay before it."""
    with running_postgres(folder / "postgres") as postgres, running_s3(folder / "s3") as s3:
        os.environ.update(s3.environment())
        with far_server(s3.url, seconds) as far:
            yield new_database(postgres), s3, far


def measure(options: argparse.Namespace, folder: Path) -> None:
    """Seed, measure, say, and keep."""
    with servers(folder, options.milliseconds / 1e3) as (url, s3, far):
        owner = open_database(url)
        migrate(owner, application=APPLICATION)
        engine = open_database(owner.url.set(username=APPLICATION).render_as_string(hide_password=False))
        application = engine.url.render_as_string(hide_password=False)
        start = time.perf_counter()
        seed(engine, options.adapters, options.kilobytes)
        say(f"{options.adapters} adapters published in {time.perf_counter() - start:.0f} s; real server: {s3.real}")
        os.environ["AWS_ENDPOINT_URL_S3"] = far.url
        versions = list(resolve_all(engine, "acme", LATEST, Where()))
        load = os.getloadavg()[0]
        seconds = compare(application, versions, options.rounds)
        for name in ("loop", "get loop"):
            say(f"pull is {spread(ratios(seconds[name], seconds['pull']))} faster than {name}")
        gets = {
            f"{options.pulls} pulls in {processes} processes": crowd(
                application, far, folder / f"crowd{processes}", options.pulls, processes
            )
            for processes in (1, 2)  # each may open 30 connections to a PostgreSQL that takes 100
        }
        say(f"GETs of a version of {len(versions[0].files)} files: {gets}")
        milliseconds = warm(engine, folder / "warm", 1000)
        for name, values in milliseconds.items():
            say(f"warm pull {name}: {spread(values, ' ms')}")
        result = {
            "adapters": options.adapters, "weights kilobytes": options.kilobytes, "files each": len(versions[0].files),
            "added milliseconds": options.milliseconds, "load before": round(load, 1), "seconds": seconds,
            "GETs of one version": gets, "warm milliseconds": milliseconds,
        }  # fmt: skip
        save(options.results / "pull_many.json", facts(s3), [result])
        engine.dispose()
        owner.dispose()


def facts(s3: S3Server) -> dict[str, str]:
    """What a figure was measured on."""
    return {
        "date": datetime.now(UTC).date().isoformat(), "machine": f"{processor()}, {os.cpu_count()} cores, shared",
        "python": platform.python_version(), "boto3": boto3.__version__,
        "s3": "Ceph RGW, in memory" if s3.real else "moto, in a thread of this process",
    }  # fmt: skip


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=from_one, default=2000)
    parser.add_argument("--kilobytes", type=from_one, default=64, help="of each adapter's weights")
    parser.add_argument("--milliseconds", type=float, default=20, help="that each request is held back")
    parser.add_argument("--rounds", type=from_one, default=3)
    parser.add_argument("--pulls", type=from_one, default=200, help="of one version at once, an even number")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.adapters < 10 or options.pulls % 2 or options.milliseconds < 0:
        parser.error(
            "a tenth of the adapters warms up, two processes share the pulls, and nobody answers before being asked"
        )
    end_when_told()
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)  # PostgreSQL's own user goes through it
    try:
        measure(options, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
