"""Progress on disk: a learner killed half-way goes on where it was, to the same bytes.

A save is a learner's rows and what its stream has heard: the stream is replayed from that without computing anything.
A save of other data, another recipe, base, bank or batch shape is not used.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lora_core.cohort import Aside
from lora_core.curriculum import Answers, Heard, Learner


@dataclass(frozen=True)
class Progress:
    """How far a learner is: its rows, its best row, the answers it has heard, and those to its present assignment."""

    aside: Aside
    best_P: Tensor
    heard: Sequence[Heard]
    answers: Answers


@dataclass(frozen=True)
class Saves:
    """A folder of saves.  `shape` names whatever decides the bytes besides the learner: base, device, libraries.

    `due` is asked after every micro-step whether to save now.
    """

    folder: Path
    shape: str
    due: Callable[[], bool]

    def shaped(self, *more: object) -> "Saves":
        """The saves of one training, whose slots, row length and bank decide the bytes too."""
        return replace(self, shape=f"{self.shape} {more}")

    def save(self, learner: Learner, progress: Progress) -> None:
        """Write a learner's progress over its earlier one, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = progress.aside
        tensors = {
            "weights": aside.weights_P, "first": aside.first_P, "second": aside.second_P,
            "gradient": aside.gradient_P, "best": progress.best_P,
        }  # fmt: skip
        facts = {"scale": aside.scale, "heard": progress.heard, "answers": progress.answers}
        metadata = {"of": self._of(learner), "facts": json.dumps(facts)}
        path = self._path(learner.name)
        beside = path.with_suffix(f".{os.getpid()}")
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, beside, metadata)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)

    def load(self, learner: Learner) -> Progress | None:
        """A learner's progress; None where there is none that fits, or the file is not whole."""
        try:
            with safe_open(self._path(learner.name), framework="pt") as file:
                metadata = file.metadata()
                if metadata["of"] != self._of(learner):
                    return None
                facts = json.loads(metadata["facts"])
                rows = {name: file.get_tensor(name) for name in ("weights", "first", "second", "gradient", "best")}
            aside = Aside(rows["weights"], rows["first"], rows["second"], rows["gradient"], facts["scale"])
            heard = [(answers, norm) for answers, norm in facts["heard"]]
            return Progress(aside, rows["best"], heard, facts["answers"])  # which saves of old do not have
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None

    def drop(self, name: str) -> None:
        """Forget a learner's progress: its result is safe elsewhere."""
        path = self._path(name)
        for file in (path, *self.folder.glob(f"{path.stem}.*")):  # what a kill left half-written too
            file.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{file_stem(name)}.safetensors"

    def _of(self, learner: Learner) -> str:
        """SHA-256 of everything that decides the learner's bytes."""
        return hashlib.sha256(f"{self.shape}\n{learner.digest}".encode()).hexdigest()


def file_stem(name: str) -> str:
    """How the names of a learner's saves begin, up to their first dot."""
    return hashlib.sha256(name.encode()).hexdigest()[:32]
