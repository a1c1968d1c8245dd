"""Rows' hidden states, kept: in memory up to a budget, and in a folder for as long as that is quicker than computing.

Values are T x D tensors on the CPU under a key `<context>/<row>`, both SHA-256 as hex.  How they are computed, nothing
here knows.  They tell of a user's text: keep the folder as private as the data, and clear it when a user is forgotten.
"""

import hashlib
import math
import os
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

_DIGEST = hashlib.sha256().digest_size  # bytes before the safetensors payload: SHA-256 over the key and the payload


class RowMemory:
    """Rows in memory, at most `budget` bytes; the least recently used make room."""

    def __init__(self, budget: int) -> None:
        self.budget, self.used = budget, 0
        self._rows: OrderedDict[str, Tensor] = OrderedDict()  # the least recently used first

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def get(self, key: str) -> Tensor | None:
        """A row's states, shape T x D."""
        if key in self._rows:
            self._rows.move_to_end(key)
        return self._rows.get(key)

    def put(self, key: str, hidden_TD: Tensor) -> None:
        """Keep a row, unless it alone is above the budget."""
        if key in self._rows or hidden_TD.nbytes > self.budget:
            return
        while self.used + hidden_TD.nbytes > self.budget:
            self.used -= self._rows.popitem(last=False)[1].nbytes
        self._rows[key] = hidden_TD
        self.used += hidden_TD.nbytes


class RowFolder:
    """Rows on disk, about `budget` bytes; the least recently used make room.  Several processes may share one.

    A file is written aside and renamed; one that is broken, or lies under another key's name, is as good as absent.
    """

    def __init__(self, path: Path, budget: int) -> None:
        self.path, self.budget = path, budget
        self._used = sum(size for _, size, _ in self._files())

    def __contains__(self, key: str) -> bool:
        return (self.path / key).exists()

    def load(self, key: str) -> Tensor | None:
        """A row's states as they were saved, shape T x D; None where there is no sound file."""
        file = self.path / key
        try:
            content = file.read_bytes()
            if content[:_DIGEST] != _checksum(key, content[_DIGEST:]):
                file.unlink(missing_ok=True)  # or nobody would write a sound one in its place
                return None
            os.utime(file)  # used now
            hidden_TD: Tensor = safetensors.torch.load(content[_DIGEST:])["hidden"]
            return hidden_TD
        except (OSError, SafetensorError, KeyError):
            return None

    def save(self, key: str, hidden_TD: Tensor) -> None:
        """Keep a row.  Raises OSError."""
        payload = safetensors.torch.save({"hidden": hidden_TD})
        if self._used + len(payload) > self.budget:
            self._prune()
        file = self.path / key
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        aside = file.with_name(f"{uuid.uuid4().hex}.part")
        aside.write_bytes(_checksum(key, payload) + payload)
        aside.replace(file)
        self._used += len(payload)

    def clear(self) -> None:
        """Remove every row: what forgetting a user asks for."""
        for _, _, file in self._files():
            file.unlink(missing_ok=True)
        self._used = 0

    def _prune(self) -> None:
        """Remove the least recently used until a quarter of the budget is free."""
        files = sorted(self._files())
        self._used = sum(size for _, size, _ in files)
        for _, size, file in files:
            if self._used <= self.budget * 3 // 4:
                return
            file.unlink(missing_ok=True)
            self._used -= size

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """When each file was last used, its bytes, and where it is; files that others remove meanwhile are left out."""
        for file in self.path.glob("*/*"):
            try:
                facts = file.stat()
            except OSError:
                continue
            yield facts.st_mtime, facts.st_size, file


def _checksum(key: str, payload: bytes) -> bytes:
    return hashlib.sha256(key.encode() + payload).digest()


@dataclass
class Spent:
    """Seconds that something took, over how many rows."""

    seconds: float = 0.0
    rows: int = 0

    def add(self, seconds: float) -> None:
        """One row more."""
        self.seconds += seconds
        self.rows += 1

    @property
    def each(self) -> float:
        """Seconds a row."""
        return self.seconds / max(1, self.rows)


class RowStore:
    """Memory first, then the folder while that pays; `clock` gives seconds and tells whether it does."""

    TRIED = 8  # rows that a folder moves before it is judged

    def __init__(self, memory: RowMemory, clock: Callable[[], float], folder: RowFolder | None = None) -> None:
        self.memory, self.clock, self.folder = memory, clock, folder
        self.loaded, self.saved = Spent(), Spent()
        self.computing = math.inf  # seconds a row when last done quickest; infinite until it was done

    def __contains__(self, key: str) -> bool:
        return key in self.memory or (self.folder is not None and key in self.folder)

    def has_room(self, size: int) -> bool:
        """Whether so many bytes fit without another row having to go: else they are not worth reading ahead."""
        return self.folder is not None or self.memory.used + size <= self.memory.budget

    def get(self, key: str) -> Tensor | None:
        """A row's states, shape T x D; None where they have to be computed."""
        hidden_TD = self.memory.get(key)
        untimed = self.loaded.rows >= self.TRIED and self.computing == math.inf  # then compute, to know what it takes
        if hidden_TD is None and self.folder and not untimed:
            start = self.clock()
            hidden_TD = self.folder.load(key)
            if hidden_TD is not None:
                self.memory.put(key, hidden_TD)
                self._judge(self.loaded, start)
        return hidden_TD

    def put(self, key: str, hidden_TD: Tensor) -> None:
        """Keep a row wherever there is a place for it.  A folder that cannot be written is given up."""
        self.memory.put(key, hidden_TD)
        if self.folder and key not in self.folder:
            start = self.clock()
            try:
                self.folder.save(key, hidden_TD)
                self._judge(self.saved, start)
            except OSError:
                self.folder = None

    def compute(self, work: Callable[[], Tensor], rows: int) -> Tensor:
        """Do what a kept row saves, and note how long it took for so many rows."""
        start = self.clock()
        result = work()
        self.computing = min(self.computing, (self.clock() - start) / rows)
        return result

    def _judge(self, moved: Spent, start: float) -> None:
        """Note one row's way to or from the folder, and give the folder up once that is slower than computing."""
        moved.add(self.clock() - start)
        if moved.rows >= self.TRIED and moved.each > self.computing:
            self.folder = None
