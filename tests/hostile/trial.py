"""A seeded run of hostile files: made here, read by a judge in a process of its own that is watched."""

import json
import os
import random
import selectors
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.hostile import artefacts, datasets

ROOT = Path(__file__).parents[2]
HANGS = 240.0  # seconds without an answer: not a measure of speed, but of whether there will be one


@dataclass(frozen=True)
class Verdict:
    """What came of one file: its kind and seed, and the cost of reading it."""

    what: str
    kind: str
    seed: int
    outcome: str
    seconds: float
    bytes: int
    reader_bytes: int

    @property
    def good(self) -> bool:
        """Whether it was refused in words, or taken as what it is."""
        return self.outcome in ("refused", "rows told", "accepted as it is")


class Judge:
    """The process, made anew after a file that killed it or that it hung on."""

    def __init__(self, file_bytes: int) -> None:
        self._file_bytes = file_bytes
        self._process: subprocess.Popen[str] | None = None

    def ask(self, what: str, path: Path) -> dict[str, object]:
        """What came of a file."""
        if self._process is None or self._process.poll() is not None:
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.hostile.judge", str(self._file_bytes)], cwd=ROOT, env=environment,
                text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
        process = self._process
        assert process.stdin
        assert process.stdout
        process.stdin.write(json.dumps([what, os.fspath(path)]) + "\n")
        process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if not selector.select(HANGS):
                process.kill()
                return {"outcome": "hung", "seconds": HANGS, "bytes": 0, "reader_bytes": 0}
        answer = process.stdout.readline()
        if not answer:
            return {"outcome": f"killed its reader ({process.wait()})", "seconds": 0, "bytes": 0, "reader_bytes": 0}
        found: dict[str, object] = json.loads(answer)
        return found

    def close(self) -> None:
        """End the process."""
        if self._process:
            with suppress(BrokenPipeError):
                self._process.communicate()


def run(place: Path, seeds: range, file_bytes: int = 1 << 27) -> Iterator[Verdict]:
    """Adapters and datasets in turn, one for each seed; nothing of them stays.

    `file_bytes` is the limit after decompression; by default below what is usual, for the bombs that are read up to it.
    """
    judge, valid = Judge(file_bytes), artefacts.valid_adapters(artefacts.hostile_base())
    try:
        for seed in seeds:
            generator, case = random.Random(seed), place / str(seed)
            if seed % 2:
                what, (kind, path) = "dataset", datasets.make_file(case, generator)
            else:
                what, kind, path = "artefact", artefacts.make_folder(case, generator, valid), case
            found = judge.ask(what, path)
            yield Verdict(what, kind, seed, **found)  # type: ignore[arg-type]  # as the judge writes it
            shutil.rmtree(case)
    finally:
        judge.close()
