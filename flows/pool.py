"""A worker of a Prefect work pool that can be told to go: Prefect's own would wait for its flows, however long.

Prefect's worker, told to go, leaves the processes of its runs behind.  Ours first lets them know by a note, a file that
they look for between micro-steps: they save their progress and end, and then so does the worker.
"""

import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from flows.errors import Unready
from flows.leaving import Leave, on_signals

HEALTH_PORT = 8080  # of the worker for the first GPU; the next ones have the numbers after it
_LOOK, _MARGIN, _STOPPING = 0.1, 20.0, 10.0  # seconds: between looks; for Prefect to record a run's end; to stop itself


def serve(pool: str, leave: Leave, environment: Mapping[str, str], tell: Callable[[str], object]) -> int:
    """Run the work pool's runs, one at a time, until told to go; Prefect's worker's exit code, 0 where it was told."""
    with tempfile.TemporaryDirectory(prefix="lora-pool-") as folder, on_signals(leave, tell):
        note = Path(folder) / "leave"
        process = subprocess.Popen(
            command(pool), env={**environment, "LORA_LEAVE_NOTE": str(note)}, start_new_session=True
        )
        while process.poll() is None and not leave.asked:
            time.sleep(_LOOK)
        if process.poll() is not None:
            return process.returncode
        note.touch()
        runs = _runs(process.pid)
        _wait_for(runs, leave)
        _stop(process, [*runs, *_runs(process.pid)])
        return 0


def check_server() -> None:
    """Raises Unready where Prefect's server does not answer: its worker would try for minutes, with pages of traces."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        trouble = client.api_healthcheck()
    if trouble:
        fix = "start it, check PREFECT_API_URL, or leave out --pool to work without one"
        raise Unready(f"Prefect's server does not answer ({trouble})", fix)


def command(pool: str) -> Sequence[str]:
    """Prefect's worker: one run at a time, since a run has the whole GPU."""
    words = ("worker", "start", "--pool", pool, "--type", "process", "--limit", "1", "--with-healthcheck")
    return (sys.executable, "-m", "prefect", *words)


def health_port(device: str) -> str:
    """Where a worker for a device answers that it is well: every GPU's has a port of its own."""
    number = re.fullmatch(r"cuda:([0-9]{1,3})", device)
    return str(HEALTH_PORT + (int(number[1]) if number else 0))


def _runs(worker: int) -> list[psutil.Process]:
    """The processes of the runs under way, which are sessions of their own."""
    try:
        return [one for one in psutil.Process(worker).children(recursive=True) if _is_run(one)]
    except psutil.NoSuchProcess:
        return []


def _is_run(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):  # it may end while it is looked at
        return "prefect.engine" in process.cmdline()
    return False


def _wait_for(runs: Sequence[psutil.Process], leave: Leave) -> None:
    """Until runs are over; without patience once the grace is over, or when told to go at once."""
    end = time.monotonic() + leave.grace_seconds + _MARGIN
    while any(map(_goes_on, runs)) and time.monotonic() < end and not leave.hurried:
        time.sleep(_LOOK)


def _goes_on(run: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(run.is_running() and run.status() != psutil.STATUS_ZOMBIE)
    return False


def _stop(process: subprocess.Popen[bytes], runs: Sequence[psutil.Process]) -> None:
    """End Prefect's worker, and runs that have not ended or were begun meanwhile: others go on from what was saved."""
    process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_STOPPING)
    process.kill()
    for run in runs:
        with suppress(psutil.NoSuchProcess):
            run.kill()
    process.wait()
