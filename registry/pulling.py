"""Pull: fetch a resolved version's files, verify them, and keep them in the cache.  No database, no LIST.

The registry says every file's SHA-256 and size, the manifest's too, so all files of a version are asked for at once.
"""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from registry.cache import Cache, intact
from registry.errors import ManifestRefused, ObjectDiffers, ObjectMissing, PullFailed, RegistryError, StoreUnavailable
from registry.keys import MANIFEST
from registry.manifests import files_named
from registry.names import check_file
from registry.resolved import Pulled, Resolved
from registry.signing import SIGNATURE, Verifier

FILES_AT_ONCE = 8  # of one version
VERSIONS_AT_ONCE = 32  # of many: enough to wait for the network and the disk while the interpreter is busy
_AHEAD = 4  # versions in line for each that is under way
_GIVE_UP = 64  # versions in a row that find no store: it is away, and the others would wait for it in vain


class Source(Protocol):
    """Where a version's objects come from."""

    def stream(self, key: str) -> Iterator[bytes]:
        """The object in pieces.  Raises ObjectMissing."""


class Puller:
    """Keeps verified copies of versions in a cache folder, from whatever source.  Safe to share by threads."""

    def __init__(self, store: Source, cache: Path, limit: int = 0, verifier: Verifier | None = None) -> None:
        self.store, self.cache, self.verifier = store, Cache(cache, limit), verifier or Verifier()

    def fetch(self, found: Resolved, verify: bool = False) -> Path:
        """The local folder of a version that is known already.  Raises ObjectDiffers, ObjectMissing, PullFailed,
        and with keys to verify by SignatureRefused.

        One in the cache touches no store.  Many that want the same one at once, in threads or processes of this
        machine, fetch it once; `verify` hashes a cached one again and fetches it anew if its bytes changed.
        """
        return self._kept(found, verify, FILES_AT_ONCE)[0]

    def fetch_many(self, versions: Iterable[Resolved | Pulled], verify: bool = False) -> Iterator[Pulled]:
        """What becomes of many versions, in their order; what has failed already is passed on.

        One that fails says so and stops no other.  Raises StoreUnavailable once none of many finds the store.
        """
        unanswered = 0
        for done in self._in_turn(versions, verify):
            if not isinstance(done.error, PullFailed):  # by others, for whom it waited: theirs are counted
                unanswered = unanswered + 1 if isinstance(done.error, StoreUnavailable) else 0
            yield done
            if unanswered >= _GIVE_UP and isinstance(done.error, StoreUnavailable):
                raise done.error

    @contextmanager
    def holding(self, found: Resolved) -> Iterator[Path]:
        """The folder as `fetch` gives it, kept from being evicted while the block lasts."""
        while True:
            self.fetch(found)
            with self.cache.holding(found) as folder:
                if folder:
                    yield folder
                    return

    def _in_turn(self, versions: Iterable[Resolved | Pulled], verify: bool) -> Iterator[Pulled]:
        """Many at once, and never more in line than a few for each: memory does not grow with how many there are."""
        pool, line = ThreadPoolExecutor(VERSIONS_AT_ONCE, "pull"), deque[Future[Pulled]]()
        try:
            for one in versions:
                line.append(pool.submit(self._outcome, one, verify))
                if len(line) >= VERSIONS_AT_ONCE * _AHEAD:
                    yield line.popleft().result()
            while line:
                yield line.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _outcome(self, one: Resolved | Pulled, verify: bool) -> Pulled:
        if isinstance(one, Pulled):
            return one
        try:
            folder, fetched = self._kept(one, verify, files_at_once=1)
        except (RegistryError, OSError) as error:
            return Pulled(one.reference, number=one.number, error=error)
        return Pulled(one.reference, folder, one.number, fetched)

    def _kept(self, found: Resolved, verify: bool, files_at_once: int) -> tuple[Path, int]:
        """The folder, and how many bytes had to be fetched for it."""
        if folder := self._cached(found, verify):
            return folder, 0
        with self.cache.fetching(found) as aside:
            if folder := self._cached(found, verify):  # who was here before has fetched it
                return folder, 0
            self._download(found, aside, files_at_once)
            _accept(found, aside)
            self.verifier.check(aside)
            folder = self.cache.place(aside, found)
        self.cache.added(found.size)
        return folder, found.size

    def kept(self, found: Resolved) -> Path | None:
        """The folder of a version that is in the cache; one that the verifier does not take is removed."""
        folder = self.cache.find(found)
        if folder and not self.verifier.knows(folder):
            self.cache.remove(folder)
            return None
        return folder

    def _cached(self, found: Resolved, verify: bool) -> Path | None:
        folder = self.kept(found)
        return folder if folder and (not verify or intact(folder, found)) else None

    def _download(self, found: Resolved, folder: Path, files_at_once: int) -> None:
        """Every file of a version, verified.  Raises ObjectDiffers, ObjectMissing."""
        if files_at_once == 1:
            for name in found.files:
                self._fetch(found, name, folder)
            return
        with ThreadPoolExecutor(min(files_at_once, len(found.files) or 1), "pull") as pool:
            for _ in pool.map(lambda name: self._fetch(found, name, folder), found.files):
                pass

    def _fetch(self, found: Resolved, name: str, folder: Path) -> None:
        """Stream one file to disk, hashing on the way.  Raises ObjectDiffers, ObjectMissing."""
        key, hashed = f"{found.prefix}/{check_file(name)}", hashlib.sha256()
        facts = found.files[name]
        left = int(facts["size"])
        with (folder / name).open("xb") as file:
            for piece in self.store.stream(key):
                hashed.update(piece)
                left -= len(piece)
                if left < 0:  # an endless object must not fill the disk
                    break
                file.write(piece)
        if left != 0 or hashed.hexdigest() != facts["sha256"]:
            raise ObjectDiffers(key, str(facts["sha256"]), hashed.hexdigest())


def _accept(found: Resolved, folder: Path) -> None:
    """The last look at a fetched version before it has a place in the cache: what raises here leaves nothing there.

    Its files are what the registry says, or a ticket; here, that its manifest says the same and that there is nothing
    else but a signature.  Raises ObjectDiffers, ObjectMissing, ManifestRefused.
    """
    key = f"{found.prefix}/{MANIFEST}"
    try:
        with (folder / MANIFEST).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise ObjectMissing(key, "the registry") from None
    if digest != found.sha256:
        raise ObjectDiffers(key, found.sha256, digest)
    named = files_named(folder / MANIFEST, key)
    if more := found.files.keys() - named.keys() - {MANIFEST, SIGNATURE}:
        raise ManifestRefused(found.prefix, f"does not name {min(more)!a}")
    for name, sha256 in named.items():
        if name not in found.files:
            raise ObjectMissing(f"{found.prefix}/{name!a}", "the registry")
        if found.files[name]["sha256"] != sha256:
            raise ObjectDiffers(f"{found.prefix}/{name}", sha256, str(found.files[name]["sha256"]))
