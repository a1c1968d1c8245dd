"""Names and references: what may be called what, and how a person writes it."""

import re
import uuid
from dataclasses import dataclass
from typing import NewType

from registry.errors import NameRefused, NotFound

TenantId = NewType("TenantId", uuid.UUID)
UserId = NewType("UserId", uuid.UUID)
AdapterId = NewType("AdapterId", uuid.UUID)
DatasetId = NewType("DatasetId", uuid.UUID)
VersionId = NewType("VersionId", uuid.UUID)
JobId = NewType("JobId", uuid.UUID)
RunId = NewType("RunId", uuid.UUID)

# A name that also stands in keys and served names: what every store and engine takes.
_PLAIN = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_PLAIN_ALLOWED = "at most {} of a-z, 0-9 and single hyphens, starting with a letter"
_USER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=-]*")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_USER_ALLOWED = "at most 128 of A-Z, a-z, 0-9 and . _ = -, starting with a letter or digit"
_LONGEST = {"tenant": 63, "adapter": 40, "alias": 63, "actor": 128, "reason": 1000}

DEFAULT_ADAPTER = "default"
LATEST = "latest"  # the newest accepted version; moved by the gate


def check_plain(kind: str, name: str) -> str:
    """The name of a tenant, adapter or alias, if it is allowed.  Raises NameRefused."""
    longest = _LONGEST[kind]
    if len(name) > longest or not _PLAIN.fullmatch(name):
        raise NameRefused(kind, name, _PLAIN_ALLOWED.format(longest))
    return name


def check_user(name: str) -> str:
    """A user's name inside its tenant, if it is allowed.  Raises NameRefused."""
    if len(name) > 128 or not _USER.fullmatch(name) or ".." in name:
        raise NameRefused("user", name, _USER_ALLOWED)
    return name


def check_file(name: str) -> str:
    """The name of one of a version's files, if it is allowed.  Raises NameRefused."""
    if len(name) > 128 or not _FILE.fullmatch(name):
        raise NameRefused("file", name, "at most 128 of A-Z, a-z, 0-9 and . _ -, starting with a letter or digit")
    return name


def check_served(name: str) -> str:
    """The name under which an engine serves a version, if it is allowed.  Raises NameRefused."""
    if len(name) > 63 or not _PLAIN.fullmatch(name):
        raise NameRefused("served name", name, _PLAIN_ALLOWED.format(63))
    return name


def check_words(kind: str, text: str) -> str:
    """What a person or program says in its own words, if it can be stored and shown.  Raises NameRefused."""
    longest = _LONGEST[kind]
    if len(text) > longest or not text.isprintable():
        raise NameRefused(kind, text, f"at most {longest} characters on one line, without control characters")
    return text


@dataclass(frozen=True)
class Reference:
    """Which version of whose adapter: `acme/alice`, `acme/alice/notes`, `acme/alice:3`, `acme/alice@production`."""

    tenant: str
    user: str
    adapter: str = DEFAULT_ADAPTER
    number: int | None = None
    alias: str = LATEST

    def __post_init__(self) -> None:
        """Whoever makes one, by whatever door: what it holds can stand in a path, a key and a query."""
        check_plain("tenant", self.tenant)
        check_user(self.user)
        check_plain("adapter", self.adapter)
        check_plain("alias", self.alias)
        if self.number is not None and not 0 < self.number < 10**9:
            raise NameRefused("version number", str(self.number), "1, 2, 3 ...")

    @classmethod
    def parse(cls, text: str) -> "Reference":
        """Read a reference as a person writes it.  Raises NameRefused."""
        path, mark, version = text, "", ""
        for separator in ":@":
            if separator in text:
                path, mark, version = *text.partition(separator)[:1], separator, text.partition(separator)[2]
                break
        parts = path.split("/")
        if len(parts) not in (2, 3):
            raise NameRefused("reference", text, "tenant/user, tenant/user/adapter, and :3 or @alias after it")
        adapter = parts[2] if len(parts) == 3 else DEFAULT_ADAPTER
        if mark == ":" and not (version.isascii() and version.isdigit() and 0 < len(version) < 10 and int(version)):
            raise NameRefused("version number", version, "1, 2, 3 ...")
        number, alias = (int(version), LATEST) if mark == ":" else (None, version if mark else LATEST)
        return cls(parts[0], parts[1], adapter, number, alias)

    @classmethod
    def parse_adapter(cls, text: str) -> "Reference":
        """Read a reference to an adapter, of no version in particular.  Raises NameRefused for `:3` or `@alias`."""
        if ":" in text or "@" in text:
            raise NameRefused("adapter", text, "tenant/user and tenant/user/adapter, without :3 or @alias after it")
        return cls.parse(text)

    @property
    def label(self) -> str:
        """The adapter without its version: tenant/user, and the adapter's name unless it is the default."""
        return f"{self.tenant}/{self.user}" + ("" if self.adapter == DEFAULT_ADAPTER else f"/{self.adapter}")

    def not_found(self) -> NotFound:
        """That it means no version, in words."""
        return NotFound("version", str(self), f"see `lora history {self.label}` for those there are")

    def __str__(self) -> str:
        return f"{self.label}:{self.number}" if self.number else f"{self.label}@{self.alias}"
