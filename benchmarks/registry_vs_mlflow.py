"""Which version does an alias mean: this registry against MLflow's, in turn, on one PostgreSQL.

Both hold the same number of models (a user's adapter here, a registered model there) with an alias on each.  Each side
asks for random ones by its public Python API: `Client.resolve` here, `MlflowClient.get_model_version_by_alias` there,
straight on the database, without an HTTP server between.  MLflow runs in a process and an environment of its own, made
by this script with `pip install mlflow-skinny`, since it wants other versions of what we share.  The sides take turns,
round after round; this registry goes through row-level security and MLflow does not.

    python benchmarks/registry_vs_mlflow.py --models 10000 --rounds 5 --lookups 500

MLflow's models are made by its own API for the first and by SQL for the rest: its API would take hours for them.
"""

import argparse
import json
import os
import random
import subprocess
import tempfile
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from sqlalchemy import create_engine, make_url, text
from sqlalchemy.engine import Engine

from benchmarks.command_line import end_when_told, from_one
from benchmarks.fleet_move import facts
from benchmarks.measuring import RESULTS, save, say, spread
from benchmarks.registry_seed import MUCH_WAL, TENANT, database, seed
from registry.client import Client
from registry.store import open_store

SIDE = Path(__file__).with_name("mlflow_side.py")
MLFLOW = ("mlflow-skinny>=3,<4", "sqlalchemy", "alembic", "psycopg[binary]")


def mlflow_python(folder: Path, given: str) -> str:
    """An interpreter that has MLflow: the one that is given, or a new environment's."""
    if given:
        return given
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", *MLFLOW], check=True)
    return str(python)


@contextmanager
def other_side(python: str, url: str, models: int) -> Iterator["OtherSide"]:
    """MLflow with its models, waiting to be asked."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LORA_", "PYTHONPATH"))}
    process = subprocess.Popen(
        [python, SIDE, url, str(models)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdin  # both are pipes
    assert process.stdout
    try:
        yield OtherSide(process.stdin, process.stdout)
    finally:
        process.stdin.close()
        process.wait(30)


class OtherSide:
    """MLflow in its process: a line of JSON asked, a line answered."""

    def __init__(self, asked: IO[str], answers: IO[str]) -> None:
        self._asked, self._answers = asked, answers
        self.version = str(self._answer()["version"])

    def lookups(self, numbers: list[int]) -> list[float]:
        """Seconds of each."""
        self._asked.write(json.dumps(numbers) + "\n")
        self._asked.flush()
        seconds: list[float] = self._answer()["seconds"]
        return seconds

    def _answer(self) -> dict[str, list[float]]:
        line = self._answers.readline()
        if not line:
            raise SystemExit("MLflow's side ended; its words are above")
        answer: dict[str, list[float]] = json.loads(line)
        return answer


def ours(client: Client, numbers: list[int]) -> list[float]:
    """Seconds of each of our lookups."""
    seconds = []
    for number in numbers:
        start = time.perf_counter()
        client.resolve(f"{TENANT}/user-{number}@latest")
        seconds.append(time.perf_counter() - start)
    return seconds


def measure(engine: Engine, other: OtherSide, models: int, rounds: int, count: int) -> dict[str, object]:
    """Round after round, either side; the first warms up and is not kept."""
    chance = random.Random(7)
    samples: dict[str, list[list[float]]] = {"lora": [], "mlflow": []}
    with tempfile.TemporaryDirectory() as folder:
        client = Client(engine, open_store(Path(folder).as_uri()), Path(folder) / "cache")
        for number in range(rounds + 1):
            asked = [chance.randint(1, models) for _ in range(count)]
            for name, seconds in (("lora", ours(client, asked)), ("mlflow", other.lookups(asked))):
                samples[name] += [seconds] if number else []
    rates = {name: [count / sum(one) for one in some] for name, some in samples.items()}
    ratios = [mine / theirs for mine, theirs in zip(rates["lora"], rates["mlflow"], strict=True)]
    for name, values in rates.items():
        say(f"{name:<7} {spread(values)} lookups/s")
    say(f"ratio  {spread(ratios)}")
    return {
        "models": models, "mlflow": other.version, "load": round(os.getloadavg()[0], 1), "ratios": ratios,
        "seconds": samples,
    }  # fmt: skip


def main() -> None:
    """Measure, say, and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=from_one, default=10_000)
    parser.add_argument("--rounds", type=from_one, default=5)
    parser.add_argument("--lookups", type=from_one, default=500, help="of each side in a round")
    parser.add_argument("--mlflow-python", default="", help="an interpreter that has MLflow; by default one is made")
    parser.add_argument("--url", default="", help="a PostgreSQL, as its superuser; two databases are made on it")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    end_when_told()
    with database(options.url, max_wal_size=MUCH_WAL) as server, tempfile.TemporaryDirectory() as folder:
        python = mlflow_python(Path(folder) / "mlflow", options.mlflow_python)
        urls = {name: _made(server, name) for name in ("bench_lora", "bench_mlflow")}
        engine = seed(urls["bench_lora"], options.models, 2)
        with other_side(python, urls["bench_mlflow"], options.models) as other:
            result = measure(engine, other, options.models, options.rounds, options.lookups)
        engine.dispose()
        save(options.results / "registry_vs_mlflow.json", facts(server), [result])


def _made(server: str, name: str) -> str:
    """The URL of a new database on a server."""
    admin = create_engine(server, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE IF EXISTS {name}"))
        connection.execute(text(f"CREATE DATABASE {name}"))
    admin.dispose()
    return make_url(server).set(database=name).render_as_string(hide_password=False)


if __name__ == "__main__":
    main()
