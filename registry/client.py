"""Pull: from a reference to a verified local folder.  What an inference host installs; no torch, no LIST."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session

from registry import feed, freshness, lookups, queries, search
from registry.errors import NotFound, ObjectDiffers, ObjectMissing
from registry.feed import Change
from registry.freshness import Outdated
from registry.lookups import Current
from registry.names import DEFAULT_ADAPTER, LATEST, Reference, TenantId, check_file, check_plain, check_user
from registry.pages import Page
from registry.publishing import MANIFEST
from registry.search import Found, Search
from registry.session import open_database, reading
from registry.settings import RegistrySettings
from registry.store import ObjectStore, open_store
from registry.tenancy import enter

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Resolved:
    """What a reference means now: one version, and where its files lie."""

    reference: Reference
    number: int
    state: str
    served_name: str
    prefix: str
    sha256: str  # of the manifest
    files: Mapping[str, Mapping[str, int | str]]  # file name to sha256 and size


class Source(Protocol):
    """Where a version's objects come from."""

    def stream(self, key: str) -> Iterator[bytes]:
        """The object in pieces.  Raises ObjectMissing."""


class Puller:
    """Keeps verified copies of versions in a cache folder, from whatever source."""

    def __init__(self, store: Source, cache: Path) -> None:
        self.store, self.cache = store, cache

    def fetch(self, found: Resolved, verify: bool = False) -> Path:
        """The local folder of a version that is known already.  Raises ObjectDiffers, ObjectMissing."""
        folder = self.cache / found.sha256 / found.served_name
        if verify and folder.is_dir() and not _intact(folder, found):
            shutil.rmtree(folder)
        if not folder.is_dir():
            self._download(found, folder)
        return folder

    def _download(self, found: Resolved, folder: Path) -> None:
        """Fetch and check every file aside, then put the whole folder in place in one step."""
        self.cache.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=self.cache, prefix=".pull-"))
        try:
            content = aside / found.served_name
            content.mkdir()
            self._fetch(found, MANIFEST, found.sha256, content)
            manifest = json.loads((content / MANIFEST).read_text(encoding="utf-8"))
            for name, facts in manifest["files"].items():
                self._fetch(found, name, facts["sha256"], content)
            folder.parent.mkdir(exist_ok=True)
            try:
                content.rename(folder)
            except OSError:
                if not folder.is_dir():  # else somebody pulled the same bytes meanwhile: theirs will do
                    raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _fetch(self, found: Resolved, name: str, sha256: str, folder: Path) -> None:
        """Stream one file to disk, hashing on the way.  Raises ObjectDiffers."""
        key, hashed = f"{found.prefix}/{check_file(name)}", hashlib.sha256()
        if name not in found.files:
            raise ObjectMissing(key, "the registry")
        limit = int(found.files[name]["size"])
        with (folder / name).open("wb") as file:
            for piece in self.store.stream(key):
                hashed.update(piece)
                limit -= len(piece)
                if limit < 0:  # an endless object must not fill the disk
                    break
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        if limit != 0 or hashed.hexdigest() != sha256:
            raise ObjectDiffers(key, sha256, hashed.hexdigest())


class Client(Puller):
    """Resolves references and keeps verified copies of adapters in a cache folder.  Safe to share by threads."""

    def __init__(self, engine: Engine, store: ObjectStore, cache: Path) -> None:
        super().__init__(store, cache)
        self.engine = engine
        self._tenants: dict[str, TenantId] = {}

    @classmethod
    def from_environment(cls) -> "Client":
        """A client from LORA_DATABASE_URL, LORA_STORE_URL and LORA_HOME.

        Raises SettingRefused, DatabaseUnavailable, StoreUnavailable.
        """
        settings = RegistrySettings.read()
        return cls(open_database(settings.database), open_store(settings.store), settings.cache)

    def resolve(self, reference: str | Reference) -> Resolved:
        """What a reference such as `acme/alice` or `acme/alice:3` means now.  Raises NameRefused, NotFound."""
        wanted = Reference.parse(reference) if isinstance(reference, str) else reference
        return Resolved(wanted, *self._asked(wanted.tenant, lambda session, id_: lookups.find(session, id_, wanted)))

    def current(
        self, tenant: str, users: Iterable[str], adapter: str = DEFAULT_ADAPTER, alias: str = LATEST
    ) -> dict[str, Current]:
        """Where an alias of many users' adapters is now, in one question; who has none is left out.

        Raises NameRefused, NotFound for the tenant.
        """
        names = [check_user(name) for name in users]
        check_plain("adapter", adapter)
        check_plain("alias", alias)
        return self._asked(tenant, lambda session, id_: lookups.find_many(session, id_, names, adapter, alias))

    def search(self, tenant: str, wanted: Search, *, after: str = "", limit: int = 100) -> Page[Found]:
        """Versions by what they are, a page at a time.  Raises NotFound, NameRefused, CursorRefused."""
        return self._asked(tenant, lambda session, id_: search.search(session, id_, wanted, after=after, limit=limit))

    def outdated(
        self, tenant: str, *, base: str = "", recipe: str = "", after: str = "", limit: int = 1000
    ) -> Page[Outdated]:
        """Who needs training again, a page at a time.  Raises NotFound, NameRefused, CursorRefused."""
        given = {"base": base, "recipe": recipe, "after": after}
        return self._asked(tenant, lambda session, id_: freshness.outdated(session, id_, **given, limit=limit))

    def changes(self, tenant: str, *, after: str = "", limit: int = 1000) -> Page[Change]:
        """What changed since a cursor; its own is where to ask again.  Raises NotFound, NameRefused, CursorRefused."""
        return self._asked(tenant, lambda session, id_: feed.changes(session, id_, after=after, limit=limit))

    def changes_from_now(self, tenant: str) -> str:
        """The cursor that only what is to come lies behind.  Raises NotFound."""
        return self._asked(tenant, feed.now)

    def _asked(self, tenant: str, question: Callable[[Session, TenantId], Answer]) -> Answer:
        """The answer to a question about a tenant, whose id is remembered: to ask for it takes longer than the rest."""
        with reading(self.engine) as session:
            if known := self._tenants.get(tenant):
                enter(session, known)
                try:
                    return question(session, known)
                except NotFound:  # is it another tenant by now?
                    session.rollback()
            self._tenants[tenant] = queries.tenant_id(session, tenant)
            return question(session, self._tenants[tenant])

    def pull(self, reference: str | Reference, verify: bool = False) -> Path:
        """The local folder of a version's files, named as an engine serves it.  Raises ObjectDiffers, ObjectMissing.

        A version in the cache touches no store; `verify` hashes its files again and fetches it anew if they changed.
        """
        return self.fetch(self.resolve(reference), verify)


def _intact(folder: Path, found: Resolved) -> bool:
    """Whether a cached folder still holds the bytes that were pulled."""
    try:
        return all(
            hashlib.sha256((folder / name).read_bytes()).hexdigest() == facts["sha256"]
            for name, facts in found.files.items()
        )
    except OSError:
        return False
