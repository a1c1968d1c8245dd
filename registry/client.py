"""The client: from a reference to a verified local folder.  What an inference host installs; no torch."""

import secrets
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path

from sqlalchemy.engine import Engine

from registry import queries
from registry.cache import PINS
from registry.errors import NameRefused
from registry.fleet import Where
from registry.names import LATEST, Reference
from registry.pins import Pins
from registry.pulling import Puller
from registry.resolved import Pulled, Resolved
from registry.resolving import PAGE, resolve_all, resolve_page
from registry.session import open_database, reading
from registry.settings import RegistrySettings
from registry.store import ObjectStore, open_store

__all__ = ["Client", "Pulled", "Resolved"]


class Client(Puller):
    """Resolves references and keeps verified copies of adapters in a cache folder.  Safe to share by threads."""

    def __init__(self, engine: Engine, store: ObjectStore, cache: Path, limit: int = 0) -> None:
        super().__init__(store, cache, limit)
        self.engine, self.pins = engine, Pins(cache / PINS, _identity(engine))

    @classmethod
    def from_environment(cls) -> "Client":
        """A client from LORA_DATABASE_URL, LORA_STORE_URL, LORA_HOME and LORA_CACHE_SIZE.

        Raises SettingRefused, DatabaseUnavailable, StoreUnavailable.
        """
        settings = RegistrySettings.read()
        return cls(open_database(settings.database), open_store(settings.store), settings.cache, settings.cache_size)

    def resolve(self, reference: str | Reference) -> Resolved:
        """What a reference such as `acme/alice` or `acme/alice:3` means now.  Raises NameRefused, NotFound."""
        wanted = _read(reference)
        with reading(self.engine) as session:
            version = queries.version(session, queries.tenant_id(session, wanted.tenant), wanted)
        return Resolved(
            wanted, version.number, version.state, version.served_name, version.prefix, version.sha256, version.files
        )

    def pull(self, reference: str | Reference, verify: bool = False) -> Path:
        """The local folder of a version's files, named as an engine serves it.

        A version in the cache touches no store; one that was pinned by number and pulled within a day, no registry
        either.  `verify` asks the registry, hashes the files again, and fetches them anew if they changed.  Raises
        NotFound, ObjectDiffers, ObjectMissing, StoreUnavailable, PullFailed.
        """
        wanted = _read(reference)
        if not verify and (folder := self._pinned(wanted)):
            return folder
        found = self.resolve(wanted)
        folder = self.fetch(found, verify)
        self.pins.remember(found)
        return folder

    def using(self, reference: str | Reference) -> AbstractContextManager[Path]:
        """The folder as `pull` gives it, for as long as the block lasts: the cache does not evict it meanwhile."""
        return self.holding(self.resolve(reference))

    def pull_many(self, references: Iterable[str | Reference], verify: bool = False) -> Iterator[Pulled]:
        """As `pull`, for any number: many at once, in their order, each with its folder or what went wrong with it.

        Raises DatabaseUnavailable, and StoreUnavailable once none of many finds the store.
        """
        return self.fetch_many(self._resolved(iter(references)), verify)

    def pull_all(
        self, tenant: str, alias: str = LATEST, where: Where | None = None, verify: bool = False
    ) -> Iterator[Pulled]:
        """What an alias of every adapter of a tenant points to; `where` says of which.  Raises as `pull_many`."""
        return self.fetch_many(resolve_all(self.engine, tenant, alias, where or Where()), verify)

    def _pinned(self, wanted: Reference) -> Path | None:
        """The folder of a pinned version that is known and there."""
        known = self.pins.recall(wanted)
        return self.cache.find(known) if known else None

    def _resolved(self, references: Iterator[str | Reference]) -> Iterator[Resolved | Pulled]:
        """What each means, a page of them at a time."""
        while page := list(islice(references, PAGE)):
            read = [_try_to_read(one) for one in page]
            found = resolve_page(self.engine, [one for one in read if isinstance(one, Reference)])
            for asked, one in zip(page, read, strict=True):
                meant = found[one] if isinstance(one, Reference) else one
                yield meant if isinstance(meant, Resolved) else Pulled(asked, error=meant)


def _identity(engine: Engine) -> str:
    """Which registry this is: files of one relative name in two folders are two, and one in memory is like no other."""
    if engine.dialect.name == "sqlite":
        file = engine.url.database
        return str(Path(file).absolute()) if file and file != ":memory:" else secrets.token_hex(16)
    place = {name: value for name, value in engine.url.query.items() if "pass" not in name}  # host= may be there
    return engine.url.set(password=None, query=place).render_as_string()


def _read(reference: str | Reference) -> Reference:
    return Reference.parse(reference) if isinstance(reference, str) else reference


def _try_to_read(reference: str | Reference) -> Reference | NameRefused:
    try:
        return _read(reference)
    except NameRefused as error:
        return error
