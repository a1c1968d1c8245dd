"""A work pool's worker: it ends as Prefect's does, passes on that it is time to go, and waits no longer than it may."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from flows import pool
from flows.leaving import Leave
from tests.flows.conftest import Lora

# Stands for Prefect's worker: it begins a run in a session of its own, and ends at once when it is told to go.
WORKER = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[2], sys.argv[1], "prefect.engine"], start_new_session=True)
time.sleep(600)
"""
RUN = """
import os, pathlib, sys, time
here = pathlib.Path(sys.argv[1])
here.joinpath("ready").write_text(str(os.getpid()))
while not pathlib.Path(os.environ["LORA_LEAVE_NOTE"]).exists():
    time.sleep(0.02)
here.joinpath("saved").touch()
"""
STUBBORN = RUN.replace("while not", "while True or")


def serve(monkeypatch: pytest.MonkeyPatch, folder: Path, run: str, grace: float, signals: int, worker: str) -> int:
    """Serve a pool with a worker of our own, and send signals once its run is under way."""

    def ours(_: str) -> Sequence[str]:
        return (sys.executable, "-c", worker, str(folder), run)

    def send() -> None:
        while not (folder / "ready").exists():
            stopped.wait(0.02)
        for _ in range(signals):
            os.kill(os.getpid(), signal.SIGTERM)
            stopped.wait(0.3)

    monkeypatch.setattr(pool, "command", ours)
    stopped = threading.Event()
    sender = threading.Thread(target=send)
    sender.start()
    try:
        return pool.serve("gpu", Leave(grace), os.environ, lambda _: None)
    finally:
        sender.join()


def test_a_run_learns_by_a_note_that_it_is_time_to_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It has the time to save before its worker ends, and the exit code is 0."""
    assert serve(monkeypatch, tmp_path, RUN, grace=60, signals=1, worker=WORKER) == 0
    assert (tmp_path / "saved").exists()


def test_asked_twice_a_worker_does_not_wait(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """However long its run and its grace are; and no run is left behind that nobody knows of."""
    assert serve(monkeypatch, tmp_path, STUBBORN, grace=3600, signals=2, worker=WORKER) == 0
    left = int((tmp_path / "ready").read_text())
    for _ in range(500):  # whoever adopts orphans has to notice, too
        if not psutil.pid_exists(left) or psutil.Process(left).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.02)
    raise AssertionError(left)


def test_a_process_that_ends_while_runs_are_looked_for_hides_none_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is not found is not waited for: it is killed in the middle of its training."""
    brief = subprocess.Popen([sys.executable, "-c", ""])
    over = psutil.Process(brief.pid)
    brief.wait()
    with subprocess.Popen([sys.executable, "-c", "input()", "prefect.engine"], stdin=subprocess.PIPE) as run:
        monkeypatch.setattr(psutil.Process, "children", lambda *_, **__: [over, psutil.Process(run.pid)])

        found = [one.pid for one in pool._runs(os.getpid())]

        run.kill()
    assert found == [run.pid]


def test_a_worker_that_ends_by_itself_says_how(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whoever started it may start it again."""
    ends = "import sys, pathlib; pathlib.Path(sys.argv[1], 'ready').touch(); sys.exit(3)"

    assert serve(monkeypatch, tmp_path, RUN, grace=60, signals=0, worker=ends) == 3


def test_every_gpus_worker_answers_at_a_port_of_its_own() -> None:
    """Else only the first on a machine could say that it is well."""
    assert [pool.health_port(device) for device in ("", "cpu", "cuda", "cuda:0", "cuda:3")] == [
        "8080", "8080", "8080", "8080", "8083",
    ]  # fmt: skip


def test_a_server_that_does_not_answer_is_told_before_prefects_worker_begins(lora: Lora) -> None:
    """It would try for minutes, and end in pages of its own traces."""
    away = {"PREFECT_API_URL": "http://127.0.0.1:1/api"}

    said = lora("work", "--pool", "gpu", code=1, environment=away).stderr

    assert (said.count("\n"), "does not answer" in said, "check PREFECT_API_URL" in said) == (1, True, True), said
