"""Objects under immutable keys: one contract, on S3-compatible storage and on a folder."""

import re
from collections.abc import Iterator
from pathlib import Path
from secrets import token_hex
from typing import Protocol
from urllib.parse import unquote

from registry.errors import ObjectDiffers, StoreUnavailable
from registry.folder_store import FolderStore
from registry.keys import checked_key, dataset_prefix, user_prefix, version_prefix
from registry.s3_store import S3Store, s3_client

__all__ = [
    "FolderStore",
    "ObjectStore",
    "S3Store",
    "checked_key",
    "dataset_prefix",
    "open_store",
    "overwrites",
    "s3_client",
    "user_prefix",
    "version_prefix",
]

# Scheme, host and path.  No query or fragment: in a key or a folder's name, ? and # are characters like any other.
_URL = re.compile(r"(?:([a-z][a-z0-9+.-]*):)?(?://([^/]*))?(.*)", re.IGNORECASE | re.DOTALL)
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")


class ObjectStore(Protocol):
    """Immutable objects: written once, read whole or streamed, deleted by the sweeper."""

    def put_new(self, key: str, data: bytes) -> bool:
        """Write an object unless it is there; True if this call wrote it.

        Raises ObjectDiffers when other bytes are there already.
        """

    def get(self, key: str) -> bytes:
        """The whole object.  Raises ObjectMissing."""

    def stream(self, key: str) -> Iterator[bytes]:
        """The object in pieces.  Raises ObjectMissing."""

    def size(self, key: str) -> int | None:
        """Bytes of an object; None where there is none."""

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is fine."""

    def clear(self, prefix: str) -> int:
        """Remove every byte of every object at or below a prefix; returns how many objects there were.

        Raises KeyRefused for the empty prefix.
        """

    def keys(self, prefix: str) -> Iterator[str]:
        """The keys below a prefix, for sweeping."""

    def signed_url(self, key: str, seconds: int) -> str:
        """A URL that gives this object, and nothing else, to whoever has it, for so long.

        Raises StoreUnavailable where nobody would check it.
        """

    def check(self) -> str:
        """Where it is, in words, once it has proved to answer.  Raises StoreUnavailable."""

    def set_up(self) -> None:
        """Make the bucket or folder if it is missing.  Raises StoreUnavailable."""


def overwrites(store: ObjectStore) -> bool:
    """Whether a store lets other bytes under a key that is taken, as an S3 does that ignores If-None-Match: by trying.

    Raises StoreUnavailable.
    """
    key = f"tried-{token_hex(16)}"
    try:
        store.put_new(key, b"first")
        store.put_new(key, b"second")
    except ObjectDiffers:
        return False
    finally:
        store.delete(key)
    return True


def open_store(url: str) -> ObjectStore:
    """A store from `s3://bucket[/prefix]`, `file:///folder` or a plain path.  Raises StoreUnavailable."""
    found = _URL.fullmatch(url)
    assert found  # every part may be missing
    scheme, host, path = (part or "" for part in found.groups())
    try:
        if scheme == "s3" and _BUCKET.fullmatch(host):
            return S3Store(host, path.strip("/"))
        if scheme == "file" and host in ("", "localhost") and path:
            return FolderStore(Path(unquote(path)))
        if scheme == "" and url:
            return FolderStore(Path(url))
    except RuntimeError:  # pathlib's word for a home that it does not know
        raise StoreUnavailable(url, "begins with the home of nobody", "write the whole path") from None
    raise StoreUnavailable(url, "is not a store's URL", "use s3://bucket/prefix or file:///folder")
