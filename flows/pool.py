"""A worker of a Prefect work pool that can be told to go: Prefect's own would wait for its flows, however long.

SIGTERM makes Prefect's worker take no more runs and wait for those under way; they learn of it by a note, a file that
they look for between micro-steps, save their progress and end.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from flows.leaving import Leave, on_signals

HEALTH_PORT = 8080  # of the worker for the first GPU; the next ones have the numbers after it
_LOOK, _MARGIN = 0.1, 30.0  # seconds: between looks; for Prefect to record what has ended


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
        process.send_signal(signal.SIGTERM)
        _wait(process, leave)
        return 0


def command(pool: str) -> Sequence[str]:
    """Prefect's worker: one run at a time, since a run has the whole GPU."""
    words = ("worker", "start", "--pool", pool, "--type", "process", "--limit", "1", "--with-healthcheck")
    return (sys.executable, "-m", "prefect", *words)


def health_port(device: str) -> str:
    """Where a worker for a device answers that it is well: every GPU's has a port of its own."""
    number = re.fullmatch(r"cuda:([0-9]{1,3})", device)
    return str(HEALTH_PORT + (int(number[1]) if number else 0))


def _wait(process: subprocess.Popen[bytes], leave: Leave) -> None:
    """Until it is over; without patience once the grace is over, or when told to go at once."""
    end = time.monotonic() + leave.grace_seconds + _MARGIN
    while process.poll() is None and time.monotonic() < end and not leave.hurried:
        time.sleep(_LOOK)
    if process.poll() is None:  # leases run out, and others go on from what was saved
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
