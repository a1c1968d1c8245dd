"""A work pool's worker: it ends as Prefect's does, passes on that it is time to go, and waits no longer than it may."""

import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from flows import pool
from flows.leaving import Leave

# Stands for Prefect's worker: it waits for its run, which ends once it has seen the note.
PATIENT = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: None)
here = pathlib.Path(sys.argv[1])
here.joinpath("ready").touch()
while not pathlib.Path(os.environ["LORA_LEAVE_NOTE"]).exists():
    time.sleep(0.02)
here.joinpath("saved").touch()
"""
STUBBORN = PATIENT.replace("while not", "while not None or")


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str, grace: float, signals: int) -> int:
    """Serve a pool with a worker of our own, and send signals once it is ready."""

    def ours(_: str) -> Sequence[str]:
        return (sys.executable, "-c", code, str(folder))

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
    """It has the time to save, and the worker's exit code is 0."""
    assert run(monkeypatch, tmp_path, PATIENT, grace=60, signals=1) == 0
    assert (tmp_path / "saved").exists()


def test_asked_twice_a_worker_does_not_wait(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """However long its run and its grace are: leases and saves take care of the rest."""
    assert run(monkeypatch, tmp_path, STUBBORN, grace=3600, signals=2) == 0


def test_a_worker_that_ends_by_itself_says_how(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whoever started it may start it again."""
    code = "import sys, pathlib; pathlib.Path(sys.argv[1], 'ready').touch(); sys.exit(3)"

    assert run(monkeypatch, tmp_path, code, grace=60, signals=0) == 3


def test_every_gpus_worker_answers_at_a_port_of_its_own() -> None:
    """Else only the first on a machine could say that it is well."""
    assert [pool.health_port(device) for device in ("", "cpu", "cuda", "cuda:0", "cuda:3")] == [
        "8080", "8080", "8080", "8080", "8083",
    ]  # fmt: skip
