"""Progress on disk: a learner killed or stopped half-way goes on where it was, to the same bytes.

A save is a learner's rows and what its stream has heard: the stream is replayed from that without computing anything.
A save of other data, another recipe, base, bank or batch shape is not used.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lora_core.cohort import Aside
from lora_core.learner import Heard, Learner
from lora_core.referee import Answers

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """How far a learner is: its rows, its best row, the answers it has heard, and those to its present assignment."""

    aside: Aside
    best_P: Tensor
    heard: Sequence[Heard]
    answers: Answers

    @property
    def lessons(self) -> int:
        """How many lessons it has been through."""
        return sum(len(answers) for answers, _ in self.heard) + len(self.answers)


class Shelf(Protocol):
    """A second place for saves, where other machines find them.  `of` names everything that decides the bytes."""

    def put(self, name: str, of: str, lessons: int, path: Path, last: bool) -> None:
        """Take a copy of a learner's save, or leave it; the last one there will be, or one of many."""

    def newest(self, name: str, of: str) -> int | None:
        """How many lessons the furthest save there has been through; None where there is none."""

    def fetch(self, name: str, of: str, lessons: int, path: Path) -> None:
        """Copy that save to a path, whole or not at all."""


@dataclass(frozen=True)
class Saves:
    """A folder of saves.  `shape` names whatever decides the bytes besides the learner: base, device, libraries.

    `due` is asked after every micro-step whether to save now.
    """

    folder: Path
    shape: str
    due: Callable[[], bool]
    shelf: Shelf | None = None

    def shaped(self, *more: object) -> "Saves":
        """The saves of one training, whose slots, row length and bank decide the bytes too."""
        return replace(self, shape=f"{self.shape} {more}")

    def save(self, learner: Learner, progress: Progress, last: bool = False) -> None:
        """Write a learner's progress over its earlier one, whole or not at all.

        A disk that is full or broken costs progress and nothing else.
        """
        path, of = self._path(learner.name), self._of(learner)
        beside = path.with_suffix(f".{os.getpid()}")
        try:
            self._write(progress, of, beside)
            beside.replace(path)
        except (OSError, SafetensorError) as error:
            _log.warning("progress is not saved: %s", error)
            with suppress(OSError):
                beside.unlink(missing_ok=True)
            return
        if self.shelf:
            self.shelf.put(learner.name, of, progress.lessons, path, last)

    def _write(self, progress: Progress, of: str, file: Path) -> None:
        aside = progress.aside
        tensors = {
            "weights": aside.weights_P, "first": aside.first_P, "second": aside.second_P,
            "gradient": aside.gradient_P, "best": progress.best_P,
        }  # fmt: skip
        facts = {"scale": aside.scale, "heard": progress.heard, "answers": progress.answers}
        metadata = {"of": of, "facts": json.dumps(facts)}
        self.folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, file, metadata)
        with file.open("rb") as written:
            os.fsync(written.fileno())

    def load(self, learner: Learner) -> Progress | None:
        """A learner's progress, the furthest there is; None where there is none that fits and is whole."""
        of, path = self._of(learner), self._path(learner.name)
        found = _read(path, of)
        further = self.shelf and self.shelf.newest(learner.name, of)
        if self.shelf and further and further > (found.lessons if found else 0):
            with suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
                self.shelf.fetch(learner.name, of, further, path)
                found = _read(path, of)
        return found

    def drop(self, name: str) -> None:
        """Forget a learner's progress: its result is safe elsewhere."""
        path = self._path(name)
        for file in (path, *self.folder.glob(f"{path.stem}.*")):  # what a kill left half-written too
            with suppress(OSError):
                file.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{file_stem(name)}.safetensors"

    def _of(self, learner: Learner) -> str:
        """SHA-256 of everything that decides the learner's bytes."""
        return hashlib.sha256(f"{self.shape}\n{learner.digest}".encode()).hexdigest()


def _read(path: Path, of: str) -> Progress | None:
    """A file's progress; None where there is no file, or it is of something else or not whole."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata: Mapping[str, str] = file.metadata()
            if metadata["of"] != of:
                return None
            facts = json.loads(metadata["facts"])
            rows = {name: file.get_tensor(name) for name in ("weights", "first", "second", "gradient", "best")}
        aside = Aside(rows["weights"], rows["first"], rows["second"], rows["gradient"], facts["scale"])
        heard = [(answers, norm) for answers, norm in facts["heard"]]
        return Progress(aside, rows["best"], heard, facts["answers"])  # which saves of old do not have
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None


def file_stem(name: str) -> str:
    """How the names of a learner's saves begin, up to their first dot."""
    return hashlib.sha256(name.encode()).hexdigest()[:32]
