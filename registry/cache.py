"""The folder where pulled versions are kept: each is there whole, under the digest of its manifest, or not at all.

    <root>/<sha256 of the manifest>/<served name>/       a version; the folder's time is when it was last asked for
    <root>/.pulling/<sha256>-<served name>/ and .lock    one that is being fetched, and the lock of who fetches it
    <root>/.pulling/gone-...                             one that has been taken away, and is being removed
    <root>/.known/                                       what pinned references were found to be: known.py

A version comes into its place by one rename, once every byte of it has been checked, and leaves it by one.  Nothing is
synced, since it could be fetched again: instead, a version that was asked for last before this machine was started is
read and hashed once, as a power cut may have taken some of it.
"""

import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from registry import known
from registry.errors import PullFailed
from registry.locks import alone, shared, taken
from registry.resolved import Resolved

KNOWN = ".known"
_PROGRAM_STARTED = time.time()
FRESH_SECONDS = 3600  # since it was asked for last: until then whoever asked may be about to read it
_PATIENCE = 2  # fetches that may fail while another waits for its turn, before it is told so
_TRIES = 5  # an evictor may take the empty folder away just before a version is put into it
_TOLD = 300  # characters of how a fetch failed, for those that waited for it
_LOOK_EVERY = 20  # the whole is measured each time that this part of the limit has been added, and trimmed by as much


@dataclass(frozen=True)
class Entry:
    """One version in the cache."""

    folder: Path
    size: int  # bytes
    used: float  # when it was last asked for, in seconds since 1970

    @property
    def served_name(self) -> str:
        """Under which an engine serves it."""
        return self.folder.name


class Cache:
    """Verified versions on this machine, for all its threads and processes; at most `limit` bytes, 0 for any number."""

    def __init__(self, root: Path, limit: int = 0) -> None:
        self.root, self.limit = root, limit
        self._pulling = root / ".pulling"
        self._room, self._counting = 0, Lock()  # bytes that may be added before the next look

    def find(self, found: Resolved) -> Path | None:
        """The folder of a version that is there whole, which counts as asked for now.

        Sizes are looked at, and no file is read, but for the first time since the machine was started.
        """
        with self.holding(found) as folder:
            return folder

    @contextmanager
    def holding(self, found: Resolved) -> Iterator[Path | None]:
        """As `find`, and the folder is not taken away while the block lasts."""
        folder = self.root / found.sha256 / found.served_name
        with shared(folder) as handle:
            if handle is None or not _whole(folder, found) or not (_seen_alive(handle) or intact(folder, found)):
                yield None
                return
            with suppress(OSError):  # a cache that this process may only read
                os.utime(handle)
            yield folder

    @contextmanager
    def fetching(self, found: Resolved) -> Iterator[Path]:
        """An empty folder to fetch a version into, for one thread or process at a time: the others wait here.

        Who dies in it leaves it to the next.  Raises PullFailed for those that waited while two others failed.
        """
        self._pulling.mkdir(parents=True, exist_ok=True)
        aside = self._pulling / f"{found.sha256}-{found.served_name}"
        lock = aside.with_name(f"{aside.name}.lock")
        failed_before, _ = _failures(lock)
        with alone(lock) as handle:
            assert handle is not None  # it waited
            failed, why = _failures(lock)
            if failed - failed_before >= _PATIENCE:
                raise PullFailed(found.served_name, failed - failed_before, why)
            shutil.rmtree(aside, ignore_errors=True)  # of one that was killed
            folder = aside / found.served_name
            folder.mkdir(parents=True)
            try:
                yield folder
            except Exception as error:
                if isinstance(error, OSError) and not error.filename:  # of a write to a full disk: which one?
                    error.filename = str(self.root)
                _note_failure(handle, failed + 1, error)
                raise
            finally:
                shutil.rmtree(aside, ignore_errors=True)
            lock.unlink(missing_ok=True)  # last of all: whoever waits meets at a new file from here on

    def place(self, aside: Path, found: Resolved) -> Path:
        """Put a fetched folder in its place in one step, instead of a damaged one that is there."""
        folder = self.root / found.sha256 / found.served_name
        for _ in range(_TRIES - 1):
            with suppress(FileNotFoundError):
                return self._put(aside, folder)
        return self._put(aside, folder)

    def remove(self, folder: Path) -> None:
        """Take away a version that must not be used here, held or not."""
        with suppress(FileNotFoundError):
            shutil.rmtree(self._take_away(folder), ignore_errors=True)
        _tidy_place(folder)

    def drop_half(self, served_name: str) -> int:
        """Remove what was fetched so far of a version; how many such folders there were."""
        halves = list(self._pulling.glob(f"*-{served_name}"))
        for half in halves:
            shutil.rmtree(half, ignore_errors=True)
        return len(halves)

    def added(self, size: int) -> None:
        """Count what was placed, and now and then measure the whole and trim it."""
        if not self.limit:
            return
        step = self.limit // _LOOK_EVERY
        with self._counting:
            self._room -= size
            if self._room >= 0:
                return
            self._room = step
        self.trim(self.limit - step)

    def entries(self) -> list[Entry]:
        """The versions that are there, the one that was asked for longest ago first."""
        found = []
        for digest in _folders(self.root):
            for folder in _folders(digest):
                with suppress(FileNotFoundError):
                    size = sum(one.stat().st_size for one in folder.iterdir())
                    found.append(Entry(folder, size, folder.stat().st_mtime))
        return sorted(found, key=lambda entry: entry.used)

    def trim(self, limit: int, fresh_seconds: float = FRESH_SECONDS) -> list[Entry]:
        """Remove what was asked for longest ago until `limit` bytes are left; returns what was removed.

        What is held, being fetched, or was asked for just now stays, and so may more than the limit.
        """
        self._tidy()
        entries, removed = self.entries(), []
        total, until = sum(entry.size for entry in entries), time.time() - fresh_seconds
        for entry in entries:
            if total <= limit or entry.used > until:
                break
            if self._evict(entry):
                total -= entry.size
                removed.append(entry)
        return removed

    def clear(self) -> list[Entry]:
        """Remove all that nobody holds or fetches; returns what was removed."""
        known.tidy(self.root / KNOWN, older_than=0)
        return self.trim(0, fresh_seconds=0)

    def _evict(self, entry: Entry) -> bool:
        """Take a version away, unless somebody holds it or has asked for it meanwhile."""
        with taken(entry.folder) as handle:
            if handle is None or os.fstat(handle).st_mtime > entry.used:
                return False
            gone = self._take_away(entry.folder)
        shutil.rmtree(gone, ignore_errors=True)
        _tidy_place(entry.folder)
        return True

    def _put(self, aside: Path, folder: Path) -> Path:
        """Raises FileNotFoundError when the empty folder above it is tidied away meanwhile."""
        folder.parent.mkdir(exist_ok=True)
        if folder.exists():
            self.remove(folder)
        return aside.rename(folder)

    def _take_away(self, folder: Path) -> Path:
        """Out of its place in one step: no reader finds half of it."""
        self._pulling.mkdir(exist_ok=True)
        return folder.rename(self._pulling / f"gone-{secrets.token_hex(8)}")

    def _tidy(self) -> None:
        """Remove what killed processes left aside, and what counts no more."""
        known.tidy(self.root / KNOWN)
        for gone in self._pulling.glob("gone-*"):
            shutil.rmtree(gone, ignore_errors=True)
        for lock in self._pulling.glob("*.lock"):
            with alone(lock, wait=False) as handle:
                if handle is not None:
                    shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                    lock.unlink(missing_ok=True)


def _tidy_place(folder: Path) -> None:
    """Remove what stood beside a version that is gone: marks that it was signed, and the folder above."""
    for mark in folder.parent.glob(f".signed-{folder.name}-*"):
        mark.unlink(missing_ok=True)
    with suppress(OSError):  # another version of the same bytes is there
        folder.parent.rmdir()


def intact(folder: Path, found: Resolved) -> bool:
    """Whether a cached folder still holds the bytes that were pulled: every file is read and hashed."""
    try:
        for name, facts in found.files.items():
            with (folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != facts["sha256"]:
                    return False
    except OSError:
        return False
    return True


def _whole(folder: Path, found: Resolved) -> bool:
    """Whether every file has its size: the rename says that it was whole, this that nobody has cut it since."""
    try:
        return all((folder / name).stat().st_size == facts["size"] for name, facts in found.files.items())
    except OSError:
        return False


def _seen_alive(handle: int) -> bool:
    """Whether a folder was asked for since this machine was started: then no power cut came between."""
    now = time.time()
    return _started(now) <= os.fstat(handle).st_mtime <= now + 1  # a clock that was set back says nothing


def _started(now: float) -> float:
    """When this machine was started, in seconds since 1970; where the system does not say, this program."""
    return now - time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else _PROGRAM_STARTED


def _note_failure(handle: int, count: int, error: Exception) -> None:
    with suppress(OSError):  # a full disk: then those that wait try in their turn
        os.truncate(handle, 0)
        os.pwrite(handle, f"{count} {error}"[:_TOLD].replace("\n", " ").encode(errors="replace"), 0)


def _failures(lock: Path) -> tuple[int, str]:
    """How many fetches under this lock have failed in a row, and how the last one did."""
    try:
        count, _, why = lock.read_text(encoding="utf-8", errors="replace").partition(" ")
        return int(count or 0), why
    except (OSError, ValueError):
        return 0, ""


def _folders(above: Path) -> Iterator[Path]:
    with suppress(FileNotFoundError, NotADirectoryError):
        yield from (Path(one.path) for one in os.scandir(above) if one.is_dir() and not one.name.startswith("."))
