"""Objects as files below a folder of one machine."""

import hashlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from registry.errors import KeyRefused, ObjectMissing, StoreUnavailable
from registry.keys import check_same, checked_key

_CHUNK = 1 << 20
_TRIES = 5  # a sweeper may take the empty folder away just before a file is put into it
_MODE = 0o644  # less the umask: an inference server that runs as another user reads what a worker wrote


class FolderStore:
    """Objects as files below a folder of one machine."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()

    def put_new(self, key: str, data: bytes) -> bool:
        """Written aside, synced, then linked to its name: whole or not there, and never over another.

        Raises StoreUnavailable where the root is missing: making it would hide a disk that is not mounted.
        """
        path = self._path(key)
        with self._faults(key):
            os.stat(self.root)
            for _ in range(_TRIES - 1):
                with suppress(FileNotFoundError, FileExistsError):
                    return self._put_new(key, path, data)
            return self._put_new(key, path, data)

    def get(self, key: str) -> bytes:
        """The whole object.  Raises ObjectMissing."""
        with self._faults(key):
            return self._path(key).read_bytes()

    def stream(self, key: str) -> Iterator[bytes]:
        """The object in pieces.  Raises ObjectMissing."""
        with self._faults(key), self._path(key).open("rb") as file:
            while piece := file.read(_CHUNK):
                yield piece

    def size(self, key: str) -> int | None:
        """Bytes of an object; None where there is none."""
        try:
            return self._path(key).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def delete(self, key: str) -> None:
        """Remove an object, and the folders that it leaves empty."""
        path = self._path(key)
        with self._faults(key):
            path.unlink(missing_ok=True)
            self._prune(path.parent)

    def clear(self, prefix: str) -> int:
        """Remove every object at or below a prefix, with what killed writers left aside; returns how many objects."""
        start, removed = self._path(prefix), 0
        with self._faults(prefix):
            if start.is_file():
                start.unlink(missing_ok=True)
                removed += 1
            for folder, _, names in os.walk(start, topdown=False):
                for name in names:
                    Path(folder, name).unlink(missing_ok=True)
                    removed += not name.startswith(".")
                with suppress(OSError):  # somebody has just put a new object into it
                    os.rmdir(folder)
            self._prune(start.parent)
        return removed

    def keys(self, prefix: str) -> Iterator[str]:
        """The keys below a prefix; files still being written have no key."""
        start = self._path(prefix) if prefix else self.root
        for folder, folders, names in os.walk(start):
            folders.sort()
            for name in sorted(names):
                if not name.startswith("."):
                    yield Path(folder, name).relative_to(self.root).as_posix()

    def signed_url(self, key: str, seconds: int) -> str:
        """A folder cannot: whoever may read it needs no URL, and nobody else can be kept to one file."""
        raise StoreUnavailable(
            str(self.root), "a folder signs no URLs", "use a store on S3, or `lora pull` on this machine"
        )

    def check(self) -> str:
        """Where it is, once it has proved to be writable.  Raises StoreUnavailable."""
        with self._faults("a test file"), tempfile.TemporaryFile(dir=self.root):
            return f"folder {self.root}"

    def set_up(self) -> None:
        """Make the folder if it is missing.  Raises StoreUnavailable."""
        with self._faults("the folder"):
            self.root.mkdir(parents=True, exist_ok=True)

    def _put_new(self, key: str, path: Path, data: bytes) -> bool:
        """Raises FileNotFoundError, or FileExistsError from mkdir, when a sweeper takes the folder away meanwhile."""
        path.parent.mkdir(parents=True, exist_ok=True)
        wrote = not path.exists() and _link_new(path, data)
        if not wrote:
            check_same(key, data, path.read_bytes())
        _tidy(path)
        self._sync_folders(path)  # also where somebody wrote it who was killed before that
        return wrote

    def _sync_folders(self, path: Path) -> None:
        """Every folder above a file up to the root: a power cut must not take away a name that a row relies on."""
        for folder in path.parents:
            _sync_folder(folder)
            if folder == self.root:
                break

    def _path(self, key: str) -> Path:
        path = self.root / checked_key(key)
        if not path.resolve().is_relative_to(self.root.resolve()):
            raise KeyRefused(key, "it leads out of the store by a link")
        return path

    def _prune(self, folder: Path) -> None:
        """Remove a folder and those above it, below the root, as far as they are empty."""
        with suppress(OSError):  # one that is not empty, or that another sweeper has removed already
            while folder != self.root:
                folder.rmdir()
                folder = folder.parent

    @contextmanager
    def _faults(self, key: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            if not self.root.is_dir():
                fix = "run `lora setup`, or check LORA_STORE_URL"
                raise StoreUnavailable(str(self.root), "there is no such folder", fix) from None
            raise ObjectMissing(key, str(self.root)) from None
        except OSError as error:
            fix = "check space and permissions"
            raise StoreUnavailable(str(self.root), f"{error.strerror} for {key}", fix) from error


def _link_new(path: Path, data: bytes) -> bool:
    """Write aside, then link; False where somebody was sooner."""
    aside = path.parent / f"{_aside(path)}{secrets.token_hex(8)}"
    try:
        with open(aside, "xb", opener=lambda name, flags: os.open(name, flags, _MODE)) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.link(aside, path)
        return True
    except FileExistsError:
        return False
    finally:
        aside.unlink(missing_ok=True)


def _aside(path: Path) -> str:
    """How the names begin of files that are to become this one; of a fixed length, as a key's part may have 255."""
    return f".put-{hashlib.sha256(path.name.encode()).hexdigest()[:16]}-"


def _tidy(path: Path) -> None:
    """Remove what killed writers of a file left, now that it is there; a living one finds that it is and needs none."""
    for left in path.parent.glob(f"{_aside(path)}*"):
        left.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
