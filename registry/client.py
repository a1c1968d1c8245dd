"""The client: from a reference to a verified local folder.  What an inference host installs; no torch."""

import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from itertools import islice
from pathlib import Path
from typing import TypeVar

from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session

from registry import feed, freshness, lookups, queries, search
from registry.cache import KNOWN
from registry.errors import NameRefused, NotFound
from registry.feed import Change
from registry.fleet import Where
from registry.freshness import Outdated
from registry.known import Known
from registry.lookups import Current
from registry.names import DEFAULT_ADAPTER, LATEST, Reference, TenantId, check_plain, check_user
from registry.pages import Page
from registry.pulling import Puller
from registry.resolved import Pulled, Resolved
from registry.resolving import PAGE, resolve_all, resolve_page
from registry.search import Found, Search
from registry.session import open_database, reading
from registry.settings import RegistrySettings
from registry.signing import Verifier
from registry.store import ObjectStore, open_store
from registry.tenancy import enter

Answer = TypeVar("Answer")

__all__ = ["Client", "Pulled", "Resolved"]


class Client(Puller):
    """Resolves references and keeps verified copies of adapters in a cache folder.  Safe to share by threads."""

    def __init__(
        self, engine: Engine, store: ObjectStore, cache: Path, limit: int = 0, verifier: Verifier | None = None
    ) -> None:
        super().__init__(store, cache, limit, verifier)
        self.engine, self.known = engine, Known(cache / KNOWN, _identity(engine))
        self._tenants: dict[str, TenantId] = {}

    @classmethod
    def from_environment(cls) -> "Client":
        """A client from LORA_DATABASE_URL, LORA_STORE_URL, LORA_HOME and LORA_CACHE_SIZE.

        Raises SettingRefused, DatabaseUnavailable, StoreUnavailable.
        """
        settings = RegistrySettings.read()
        database, store = open_database(settings.database), open_store(settings.store)
        return cls(database, store, settings.cache, settings.cache_size, settings.verifier)

    def resolve(self, reference: str | Reference) -> Resolved:
        """What a reference such as `acme/alice` or `acme/alice:3` means now.

        Raises NameRefused, NotFound, VersionGone for one that retention has removed.
        """
        wanted = _read(reference)
        return Resolved(wanted, *self._by_id(wanted.tenant, lambda id_: lookups.find(self.engine, id_, wanted)))

    def current(
        self, tenant: str, users: Iterable[str], adapter: str = DEFAULT_ADAPTER, alias: str = LATEST
    ) -> dict[str, Current]:
        """Where an alias of many users' adapters is now, in one question; who has none is left out.

        Raises NameRefused, NotFound for the tenant.
        """
        names = [check_user(name) for name in users]
        check_plain("adapter", adapter)
        check_plain("alias", alias)
        return self._by_id(tenant, lambda id_: lookups.find_many(self.engine, id_, names, adapter, alias))

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
        """The answer to a question about a tenant, in a transaction of its own."""

        def inside(known: TenantId) -> Answer:
            with reading(self.engine) as session:
                enter(session, known)
                return question(session, known)

        return self._by_id(tenant, inside)

    def _by_id(self, tenant: str, question: Callable[[TenantId], Answer]) -> Answer:
        """The answer to a question about a tenant, whose id is remembered: to ask for it takes longer than the rest."""
        if known := self._tenants.get(tenant):
            with suppress(NotFound):
                if answer := question(known):  # or is it another tenant by now?
                    return answer
        with reading(self.engine) as session:
            self._tenants[tenant] = queries.tenant_id(session, tenant)
        return question(self._tenants[tenant])

    def pull(self, reference: str | Reference, verify: bool = False) -> Path:
        """The local folder of a version's files, named as an engine serves it.

        A version in the cache touches no store; one that was pinned by number and pulled within a day, no registry
        either.  `verify` asks the registry, hashes the files again, and fetches them anew if they changed.  Raises
        NotFound, ObjectDiffers, ObjectMissing, StoreUnavailable, PullFailed; with keys to verify by,
        SignatureRefused for one that they have not signed, from the cache too.
        """
        wanted = _read(reference)
        if not verify and (folder := self._pinned(wanted)):
            return folder
        found = self.resolve(wanted)
        folder = self.fetch(found, verify)
        self.known.remember(found)
        return folder

    def pull_living(self, reference: str | Reference) -> Path:
        """As `pull`, with the registry asked what it means, pinned or not.

        For who names a version that it has looked up: where a user was forgotten, the number may be somebody else's.
        """
        return self.fetch(self.resolve(reference))

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
        known = self.known.recall(wanted)
        return self.kept(known) if known else None

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
