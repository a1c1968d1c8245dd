"""A crew; in a file of its own, since its processes load what this file loads."""

import os
import time
from pathlib import Path

import pytest

from benchmarks.crew import crew


def _load(folder: Path) -> None:
    """As fast as a process may be, but for the first."""
    try:
        (folder / "first").touch(exist_ok=False)
    except FileExistsError:
        time.sleep(1)


def _who(_: int) -> int:
    time.sleep(0.1)
    return os.getpid()


@pytest.mark.long
def test_a_crew_begins_together(tmp_path: Path) -> None:
    """The first to have loaded would do everything before the others are there."""
    with crew(3, _load, (tmp_path,)) as pool:
        assert len(set(pool.map(_who, range(3)))) == 3
