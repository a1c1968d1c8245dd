"""A process's connections, and the few moves that need both sides: add data, ask for training, find what is live."""

import getpass
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING

from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session

from flows.errors import Unready
from flows.pulse import Pulse
from flows.settings import FactorySettings
from lora_core.data.snapshot import IngestReport, SkipPolicy, Snapshot, take_snapshot
from lora_core.data.sources import in_s3
from lora_core.recipe import Recipe
from registry import queries
from registry.client import Client
from registry.datasets import Content, add_dataset
from registry.errors import NotFound, RegistryError
from registry.models import Dataset, SharedBase
from registry.names import Reference, TenantId
from registry.orders import Asked, Enqueued, Order, enqueue_many, newest_datasets
from registry.session import open_database
from registry.signing import Signer
from registry.store import ObjectStore, open_store, s3_client
from registry.tenancy import enter

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

    from lora_core.base_model import BaseModel


@dataclass(frozen=True)
class Pinned:
    """A base as its name, revision, quantisation and digest pin it."""

    name: str
    revision: str
    digest: str
    parameters: int
    quantised: str = ""


class Factory:
    """The registry, the store and the settings of one process."""

    def __init__(self, settings: FactorySettings) -> None:
        self.settings = settings
        self.pulse = Pulse()  # what the process is doing, for whoever looks
        self.loaded: BaseModel | None = None  # the base that was trained on last

    @classmethod
    def from_environment(cls, **given: object) -> "Factory":
        """A factory as the environment says, but for settings that are given.  Raises SettingRefused."""
        return cls(FactorySettings.read(**given))

    @cached_property
    def engine(self) -> Engine:
        """The registry's database."""
        return open_database(self.settings.database)

    @cached_property
    def store(self) -> ObjectStore:
        """The object store."""
        return open_store(self.settings.store)

    @cached_property
    def client(self) -> Client:
        """The pull client on the same registry and store."""
        settings = self.settings
        return Client(self.engine, self.store, settings.cache, settings.cache_size, settings.verifier)

    @cached_property
    def signer(self) -> Signer | None:
        """What signs the versions that are published here, if anything does.  Raises SettingRefused."""
        return self.settings.signer

    def set_up(self, revision: str | None = None) -> None:
        """Make what is missing: home folder, tables, bucket.  Safe to run again.  Raises Unready, SchemaUnknown.

        With the revision of an earlier release, the tables go back to it.
        """
        from registry.schema import migrate  # imported late: who only pulls waits for less

        home = self.settings.home_folder
        try:
            home.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Unready(f"the home {home} cannot be made ({error.strerror})", "set LORA_HOME to a folder") from None
        if self.settings.database_owner_url:
            owner = open_database(self.settings.database_owner_url)
            migrate(owner, revision or "head", application=self.engine.url.username)
            owner.dispose()
        else:
            migrate(self.engine, revision or "head")
        self.store.set_up()


def now() -> datetime:
    """The moment, in UTC: the flows' one clock."""
    return datetime.now(UTC)


def who() -> str:
    """Who runs this process, for the history of aliases."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run as a number without a name
        return f"uid {os.getuid()}"


def add_data(
    factory: Factory, reference: Reference, sources: Sequence[str], max_bad_share: float | None = None
) -> tuple[str, IngestReport]:
    """Snapshot a user's files into the store and the registry; returns the digest.  Raises DatasetRefused."""
    snapshot, report = read_data(factory, sources, max_bad_share)
    content = Content(snapshot.digest, snapshot.content, len(snapshot.examples))
    add_dataset(factory.engine, factory.store, reference, content, now())
    return snapshot.digest, report


def read_data(
    factory: Factory, sources: Sequence[str], max_bad_share: float | None = None
) -> tuple[Snapshot, IngestReport]:
    """A snapshot of files, not stored yet; the setting says how many rows may be bad where the caller does not."""
    share = factory.settings.max_bad_share if max_bad_share is None else max_bad_share
    return take_snapshot(sources, SkipPolicy(share), s3=_client_for(sources))


def _client_for(sources: Sequence[str]) -> "S3Client | None":
    """Only those who bring data from S3 need boto3's environment to be right."""
    return s3_client() if any(map(in_s3, sources)) else None


@dataclass(frozen=True)
class Wanted:
    """Training that is asked for, of a user's newest dataset."""

    reference: Reference
    base: Pinned
    recipe: Recipe
    priority: int = 0


def request_training(
    session: Session, reference: Reference, base: Pinned, recipe: Recipe, priority: int = 0
) -> Enqueued:
    """Enqueue a user's newest dataset; what was trained before from equal data, base and recipe stays as it is."""
    return request_all(session, [Wanted(reference, base, recipe, priority)])[reference]


def request_all(session: Session, wanted: Sequence[Wanted]) -> dict[Reference, Enqueued]:
    """The same for many, each once, of any tenants.  Raises what ails the first of them.

    Tenant by tenant, as a tick asks: of two who ask for the same at once one waits, and never both.
    """
    names = dict.fromkeys(one.reference.tenant for one in wanted)
    tenants = {queries.tenant_id(session, name): name for name in names}
    found: dict[Reference, Enqueued | RegistryError] = {}
    for tenant, name in sorted(tenants.items()):
        enter(session, tenant)
        own = list({one.reference: one for one in wanted if one.reference.tenant == name}.values())
        found |= zip((one.reference for one in own), request_many(session, tenant, own), strict=True)
    asked: dict[Reference, Enqueued] = {}
    for one in wanted:
        became = found[one.reference]
        if isinstance(became, RegistryError):
            raise became
        asked[one.reference] = became
    return asked


def request_many(session: Session, tenant: TenantId, wanted: Sequence[Wanted]) -> list[Enqueued | RegistryError]:
    """The same for many adapters of one tenant, which the transaction sees already; each is told what came of it."""
    if not wanted:
        return []
    newest = newest_datasets(session, tenant, [one.reference for one in wanted])
    bases = {one.base: _base_row(session, one.base) for one in wanted}
    troubles = {one.reference: found for one in wanted if isinstance(found := newest[one.reference], NotFound)}
    asked = [
        Asked(found[0], _order(found[1], bases[one.base], one), one.priority)
        for one in wanted
        if not isinstance(found := newest[one.reference], NotFound)
    ]
    outcomes = iter(enqueue_many(session, tenant, asked, now()))
    return [troubles.get(one.reference) or next(outcomes) for one in wanted]


def _order(dataset: Dataset, base: SharedBase, wanted: Wanted) -> Order:
    recipe = wanted.recipe
    return Order(dataset, base, recipe.model_dump(mode="json"), recipe.digest, group(wanted.base, recipe))


def group(base: Pinned, recipe: Recipe) -> str:
    """Jobs of one group can share a cohort: with equal base, row length and bank, neighbours change nobody's bytes.

    Who drops inputs has cohorts apart: masks are everybody's, and take memory that a plan without has given to slots.
    """
    shape: tuple[object, ...] = (base.digest, recipe.row_tokens, bool(recipe.method.dropout), *recipe.method.shape)
    if recipe.search:
        shape = (*shape, recipe.search.rank, recipe.search.layers)
    return hashlib.sha256(repr(shape).encode()).hexdigest()


def pin_base(factory: Factory, name: str | None = None, revision: str | None = None) -> Pinned:
    """The base that is meant, read and fingerprinted without loading it.  Raises Unready, BaseModelError.

    LORA_BASE_REVISION is one of LORA_BASE: it says nothing about another base.
    """
    # Imported late: reading commands do without what this needs.
    from lora_core.base_files import check_quantise, count_parameters, fingerprint, locate

    settings = factory.settings
    name = name or settings.base
    if not name:
        raise Unready("no base is named", "pass --base or set LORA_BASE to a folder or a Hugging Face id")
    revision = revision or (settings.base_revision if name == settings.base else "") or None
    check_quantise(name, settings.quantise)
    folder = locate(name, revision)
    shown = os.path.abspath(name) if os.path.isdir(name) else name
    digest = fingerprint(folder, settings.quantise)
    return Pinned(shown, revision or "main", digest, count_parameters(folder), settings.quantise)


def _base_row(session: Session, base: Pinned) -> SharedBase:
    return queries.ensure_base(
        session, name=base.name, revision=base.revision, quantised=base.quantised, digest=base.digest,
        parameters=base.parameters, now=now(),
    )  # fmt: skip
