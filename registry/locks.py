"""Locks on a machine's files that hold between threads and between processes alike.

They are flock's: the kernel frees one with its owner, however that dies, so that none is ever stale.  Every open of a
file is a holder of its own, which is what makes threads wait for each other too.  The files must be on a local disk.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FOR_ALL = 0o666  # less the umask


@contextmanager
def alone(path: Path, wait: bool = True) -> Iterator[int | None]:
    """A block that one holder of a lock file is in at a time; gives its handle.

    Without `wait`, None where somebody else is in it.  Who is in it may unlink the file: those that wait then meet at a
    new one.
    """
    while True:
        with _closing(os.open(path, os.O_RDWR | os.O_CREAT, _FOR_ALL)) as handle:
            if not _locked(handle, fcntl.LOCK_EX, wait):
                yield None
                return
            if is_at(handle, path):
                yield handle
                return


@contextmanager
def shared(folder: Path) -> Iterator[int | None]:
    """A block in which nobody takes a folder away (`taken`); gives its handle, None where there is no such folder."""
    with _at(folder, fcntl.LOCK_SH, wait=True) as handle:
        yield handle


@contextmanager
def taken(folder: Path) -> Iterator[int | None]:
    """A block in which a folder may be taken away; gives its handle, None where somebody holds it or it is gone."""
    with _at(folder, fcntl.LOCK_EX, wait=False) as handle:
        yield handle


def is_at(handle: int, path: Path) -> bool:
    """Whether what was opened is still what has that name."""
    try:
        there = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return os.path.samestat(there, os.fstat(handle))


@contextmanager
def _at(folder: Path, kind: int, wait: bool) -> Iterator[int | None]:
    """A lock on a folder itself; None where it cannot be had, or the folder was moved away before it could."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        yield None
        return
    with _closing(handle):
        yield handle if _locked(handle, kind, wait) and is_at(handle, folder) else None


@contextmanager
def _closing(handle: int) -> Iterator[int]:
    try:
        yield handle
    finally:
        fcntl.flock(handle, fcntl.LOCK_UN)  # a child that was forked meanwhile has the same lock, and may live longer
        os.close(handle)


def _locked(handle: int, kind: int, wait: bool) -> bool:
    try:
        fcntl.flock(handle, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
