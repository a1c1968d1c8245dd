"""Scripts that measure: what they are told, who is there when they begin, and what is left when they end."""

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from sqlalchemy.engine import Engine

from benchmarks import fleet_move, registry_seed, storm
from benchmarks.command_line import from_one
from benchmarks.registry_seed import database, new_database
from benchmarks.storms.servers import Process, Site
from benchmarks.storms.watching import Watch
from registry.session import open_database
from tests.servers import execute, is_over

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "", "many", "٣"])
def test_a_number_that_cannot_be_meant_is_told(text: str) -> None:
    """Before anything is started and measured."""
    with pytest.raises(argparse.ArgumentTypeError, match="is not a whole number from 1 on"):
        from_one(text)

    assert from_one("12") == 12


@pytest.mark.long
def test_a_database_ends_with_its_block_however_that_ends(tmp_path: Path) -> None:
    """A server whose folder is gone could not be told to stop any more."""
    with pytest.raises(SystemExit), database("", tmp_path) as url:
        execute(url, "SELECT 1")
        (pid,) = (int(file.read_text().split()[0]) for file in tmp_path.glob("*/postgres/postmaster.pid"))
        server = psutil.Process(pid)
        raise SystemExit("what was measured is wrong")

    assert is_over(server)


SLEEPER = """
import sys, time
from pathlib import Path
from benchmarks.command_line import end_when_told
end_when_told()
try:
    print("there", flush=True)
    time.sleep(60)
finally:
    print("ended", flush=True)
"""


def test_a_script_that_is_told_to_end_stops_what_it_started() -> None:
    """`timeout` and supervisors send SIGTERM, which ends Python at once."""
    with subprocess.Popen([sys.executable, "-c", SLEEPER], cwd=ROOT, stdout=subprocess.PIPE, text=True) as script:
        assert script.stdout
        assert script.stdout.readline() == "there\n"
        script.send_signal(signal.SIGTERM)

        assert script.stdout.read() == "ended\n"
    assert script.returncode == 143


def test_a_registry_whose_seeding_was_cut_short_is_not_measured(postgres_server: str) -> None:
    """It has no indexes, or half its rows."""
    execute(postgres_server, "DROP DATABASE IF EXISTS bench_2_2")
    url, there = new_database(postgres_server, "bench_2_2")
    assert not there
    with pytest.raises(SystemExit, match="is there and is not seeded to its end; drop it"):
        new_database(postgres_server, "bench_2_2")

    registry_seed.seed(url, 2, 2).dispose()

    assert new_database(postgres_server, "bench_2_2") == (url, True)
    execute(postgres_server, "DROP DATABASE bench_2_2")


def test_an_onlooker_who_cannot_look_has_not_found_everything_well(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread would end, and what it saw until then would be all old or all new."""
    monkeypatch.setattr(fleet_move, "there", lambda _: type("Moved", (), {"count": 1}))
    monkeypatch.setattr(fleet_move, "back", fleet_move.there)

    with pytest.raises(SystemExit, match="nobody looked on: .*acme"):  # no such tenant
        fleet_move.measure(engine, 1, 1)


def test_the_time_that_a_killed_service_took_is_not_forgotten(postgres_url: str, tmp_path: Path) -> None:
    """While it is away its processes are not there to be asked, and it may have taken much."""
    busy = [
        sys.executable,
        "-c",
        "import time\nwhile time.process_time() < 0.2: pass\nprint(flush=True)\ntime.sleep(60)",
    ]
    log = tmp_path / "log"
    service = Process("worker", busy, dict(os.environ), log, lambda: log.exists() and log.stat().st_size > 0)
    site = Site(tmp_path, {}, {"worker": service})
    watch = Watch(site, open_database(postgres_url))
    service.start()
    try:
        watch.look(measured=True)
    finally:
        service.kill()

    watch.look(measured=True)

    assert watch.cpu_seconds["worker"] >= 0.2


def test_what_a_service_leaves_behind_is_ended_with_it(tmp_path: Path) -> None:
    """Prefect's worker goes, and its runs are sessions of their own: they would train on without any server."""
    log = tmp_path / "log"
    command = ["sh", "-c", "setsid sleep 60 & echo $!; wait"]
    service = Process("worker", command, dict(os.environ), log, lambda: log.exists() and log.stat().st_size > 0)
    service.start()
    run = psutil.Process(int(log.read_text()))

    service.stop()

    assert is_over(run)


@pytest.mark.parametrize(
    ("words", "name"),
    [("", "storm_10000"), ("--users 1000 --kill", "storm_1000_killed"), ("--layers 6", "storm_10000_layers_6")],
)
def test_another_storm_does_not_write_over_the_usual_ones_figures(words: str, name: str) -> None:
    """The pages link to them."""
    parser = storm.command_line()

    assert storm.result_name(parser.parse_args(words.split()), parser) == name
