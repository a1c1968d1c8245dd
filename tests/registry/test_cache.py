"""The cache: bounded, the one asked for longest ago goes first, and never one that somebody needs."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.cache import FRESH_SECONDS, Cache
from registry.locks import alone
from registry.names import Reference
from registry.pulling import Puller
from registry.resolved import Resolved
from registry.signing import SIGNATURE, Signer
from tests.registry.test_signing import write_pair

ROOT = Path(__file__).parents[2]
OLD = 3 * FRESH_SECONDS  # seconds ago


class Memory:
    """A source of versions that are made up as they are asked for."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    def version(self, number: int, size: int = 100) -> Resolved:
        """Version so-and-so, whose files have so many bytes in all."""
        weights = f"weights of {number}".encode()
        named: dict[str, dict[str, int | str]] = {
            "weights.bin": {"sha256": hashlib.sha256(weights).hexdigest(), "size": len(weights)}
        }
        manifest = json.dumps({"files": named}).encode()
        manifest += b" " * (size - len(weights) - len(manifest))
        digest, prefix = hashlib.sha256(manifest).hexdigest(), f"t/acme/{number}"
        self.objects |= {f"{prefix}/weights.bin": weights, f"{prefix}/manifest.json": manifest}
        files: dict[str, dict[str, int | str]] = {**named, "manifest.json": {"sha256": digest, "size": len(manifest)}}
        return Resolved(Reference("acme", "alice"), number, "accepted", f"default-{number}", prefix, digest, files)

    def stream(self, key: str) -> Iterator[bytes]:
        """An object in two pieces."""
        data = self.objects[key]
        yield data[:5]
        yield data[5:]


def age(folder: Path, seconds: float) -> None:
    """Asked for last so long ago."""
    os.utime(folder, (time.time() - seconds,) * 2)


@settings(max_examples=60, deadline=None)
@given(
    ages=st.lists(st.integers(0, 2 * FRESH_SECONDS).filter(lambda age: abs(age - FRESH_SECONDS) > 60), max_size=8),
    held=st.sets(st.integers(0, 7)),
    limit=st.integers(0, 2000),
    size=st.integers(200, 300),
)
def test_what_is_evicted(ages: list[int], held: set[int], limit: int, size: int) -> None:
    """Whatever lies there: oldest first, no more than needed, and nothing that is held or was asked for just now."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as holds:
        source = Memory()
        puller = Puller(source, Path(folder))
        versions = [source.version(number, size) for number in range(len(ages))]
        for number, (version, old) in enumerate(zip(versions, ages, strict=True)):
            puller.fetch(version)
            if number in held:
                holds.enter_context(puller.cache.holding(version))
            age(puller.cache.root / version.sha256 / version.served_name, old)

        removed = {one.served_name for one in puller.cache.trim(limit)}

        left = {one.served_name for one in puller.cache.entries()}
        assert removed | left == {one.served_name for one in versions}
        assert not removed & left
        by_age = sorted(range(len(ages)), key=lambda number: -ages[number])
        free = [number for number in by_age if number not in held and ages[number] > FRESH_SECONDS]
        needed = max(0, -(-(len(ages) * size - limit) // size))
        assert removed == {versions[number].served_name for number in free[:needed]}


def test_a_cache_stays_within_its_limit(tmp_path: Path) -> None:
    """As versions are pulled; but for the one that has just come."""
    source, most = Memory(), 0
    puller = Puller(source, tmp_path / "cache", limit=10_000)
    for number in range(60):
        folder = puller.fetch(source.version(number, 400))
        age(folder, OLD - number)
        most = max(most, sum(one.size for one in puller.cache.entries()))

    assert 9_000 < most <= 10_400
    assert [one.served_name for one in puller.cache.entries()][-1] == "default-59"


def test_what_was_asked_for_just_now_stays_whatever_the_limit(tmp_path: Path) -> None:
    """Whoever was given its folder may be about to read it."""
    source = Memory()
    puller = Puller(source, tmp_path, limit=1)
    folders = [puller.fetch(source.version(number)) for number in range(5)]

    assert all(folder.is_dir() for folder in folders)
    age(folders[0], OLD)
    age(folders[1], OLD)
    puller.fetch(source.version(0))  # which makes it fresh again
    puller.cache.trim(1)
    assert [folder.is_dir() for folder in folders] == [True, False, True, True, True]


HOLD = """
import sys
from pathlib import Path
from registry.locks import shared
with shared(Path(sys.argv[1])) as handle:
    print(handle is not None, flush=True)
    sys.stdin.readline()
"""


def test_a_folder_that_another_process_holds_stays_until_that_lets_go_or_dies(tmp_path: Path) -> None:
    """No lock outlives its owner."""
    source = Memory()
    puller = Puller(source, tmp_path / "cache")
    folder = puller.fetch(source.version(1))
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "True\n"

        assert puller.cache.clear() == []
        holder.kill()
    assert [one.folder for one in puller.cache.clear()] == [folder]
    assert not folder.parent.exists()


def test_pulls_and_evictions_at_once_never_give_half_a_version(tmp_path: Path) -> None:
    """Four threads pull and read what they hold, one evicts all it can: nobody misses a file."""
    source, over = Memory(), threading.Event()
    puller = Puller(source, tmp_path / "cache")
    versions = [source.version(number) for number in range(3)]

    def read(seed: int) -> int:
        for turn in range(60):
            with puller.holding(versions[(seed + turn) % 3]) as folder:
                names = {path.name: path.read_bytes() for path in folder.iterdir()}
            assert len(names) == 2
            assert hashlib.sha256(names["manifest.json"]).hexdigest() == folder.parent.name
        return 60

    def evict() -> int:
        count = 0
        while not over.is_set():
            count += len(puller.cache.clear())
        return count

    with ThreadPoolExecutor(5) as pool:
        evictions = pool.submit(evict)
        reads = [pool.submit(read, seed) for seed in range(4)]
        done = [one.exception() for one in reads]
        over.set()

    assert done == [None] * 4
    assert evictions.result() > 3
    assert sum(1 for path in (tmp_path / "cache" / ".pulling").iterdir() if path.suffix != ".lock") == 0


def test_what_killed_processes_left_is_tidied_and_what_is_being_fetched_is_not(tmp_path: Path) -> None:
    """Who fetches holds a lock; the dead hold none."""
    source = Memory()
    cache = Cache(tmp_path)
    version = source.version(1)
    aside = tmp_path / ".pulling"
    for left in ("gone-1234", "dead-default-7"):
        (aside / left).mkdir(parents=True)
        (aside / left / "half").write_text("x")
    (aside / "dead-default-7.lock").touch()

    with cache.fetching(version) as folder:
        (folder / "half").write_text("x")
        cache.clear()

        assert {one.name for one in aside.iterdir()} == {folder.parent.name, f"{folder.parent.name}.lock"}
        assert (folder / "half").exists()
    assert list(aside.iterdir()) == []


def test_a_lock_file_that_is_gone_lets_only_one_in(tmp_path: Path) -> None:
    """Who held it takes it away at the end; those that wait meet at a new one."""
    inside = most = 0
    lock, counting = tmp_path / "lock", threading.Lock()

    def enter(_: int) -> None:
        nonlocal inside, most
        with alone(lock):
            with counting:
                inside += 1
                most = max(most, inside)
            time.sleep(0.001)
            with counting:
                inside -= 1
            lock.unlink()

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(enter, range(64)))

    assert most == 1


FIND = """
from tests.registry.test_cache import *
os.setuid(65534)
print(Cache(Path(sys.argv[1])).find(Memory().version(1)))
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("why", [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "no quota")])
def test_a_disk_that_fills_while_a_version_is_written_is_named(tmp_path: Path, why: OSError) -> None:
    """A write that fails names no file; the one who is told may have several disks."""
    cache, source = Cache(tmp_path / "pulled"), Memory()

    with pytest.raises(OSError) as told, cache.fetching(source.version(1)):
        raise why

    assert told.value.filename == str(tmp_path / "pulled")


def test_a_cache_that_may_only_be_read_serves_what_it_has() -> None:
    """Such as one that is part of an image: to a user whom it does not belong to."""
    with tempfile.TemporaryDirectory() as cache:
        folder = Puller(source := Memory(), Path(cache)).fetch(source.version(1))
        Path(cache).chmod(0o755)

        done = subprocess.run([sys.executable, "-c", FIND, cache], cwd=ROOT, capture_output=True, text=True)

        assert done.stdout.strip() == str(folder), done.stderr


KNOWS = """
import model_signing.verifying  # before it may be out of reach
from registry.signing import Verifier
from tests.registry.test_cache import *
os.setuid(65534)
print(Verifier([Path(sys.argv[1])]).knows(Path(sys.argv[2])))
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_a_signed_version_in_a_cache_that_may_only_be_read_is_taken() -> None:
    """It is checked each time, as nothing can be noted beside it; that was a traceback."""
    with tempfile.TemporaryDirectory() as cache:
        private, public = write_pair(Path(cache, "keys"))
        folder, files = Path(cache, "digest", "default-1"), {"weights.bin": b"weights"}
        folder.mkdir(parents=True)
        for name, data in {**files, SIGNATURE: Signer(private).sign(folder.name, files)}.items():
            (folder / name).write_bytes(data)
        Path(cache).chmod(0o755)

        done = subprocess.run([sys.executable, "-c", KNOWS, public, folder], cwd=ROOT, capture_output=True, text=True)

        assert done.stdout.strip() == "True", done.stderr
