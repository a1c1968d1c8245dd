"""Objects under immutable keys: the same contract on S3-compatible storage and on a folder.

Keys: `<root>/t/<tenant>/u/<opaque user>/<adapter>/<served name>/<file>`, and `datasets/<digest>.jsonl` below the user.
Only what every S3 server agrees on is used: PUT with If-None-Match, GET, HEAD, DELETE, LIST (to sweep, never to read).
"""

import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from registry.errors import KeyRefused, ObjectDiffers, ObjectMissing, StoreUnavailable

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_PART = re.compile(r"[A-Za-z0-9_=-][A-Za-z0-9._=-]*")
_CHUNK = 1 << 20
Result = TypeVar("Result")


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

    def keys(self, prefix: str) -> Iterator[str]:
        """The keys below a prefix, for sweeping."""

    def check(self) -> str:
        """Where it is, in words, once it has proved to answer.  Raises StoreUnavailable."""

    def set_up(self) -> None:
        """Make the bucket or folder if it is missing.  Raises StoreUnavailable."""


def open_store(url: str) -> ObjectStore:
    """A store from `s3://bucket[/prefix]`, `file:///folder` or a plain path.  Raises StoreUnavailable."""
    parts = urlsplit(url)
    if parts.scheme == "s3" and parts.netloc:
        return S3Store(parts.netloc, parts.path.strip("/"))
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return FolderStore(Path(unquote(parts.path)))
    if parts.scheme == "" and url:
        return FolderStore(Path(url))
    raise StoreUnavailable(url, "is not a store's URL", "use s3://bucket/prefix or file:///folder")


def user_prefix(tenant: str, opaque: str) -> str:
    """Where everything of one user lies; `opaque` stands for the user, so that keys hold no personal data."""
    return f"t/{tenant}/u/{opaque}"


def version_prefix(tenant: str, opaque: str, adapter: str, served_name: str) -> str:
    """Where one version's files lie; the last part is the name under which an engine serves it."""
    return f"{user_prefix(tenant, opaque)}/{adapter}/{served_name}"


def dataset_key(tenant: str, opaque: str, digest: str) -> str:
    """Where one dataset snapshot lies."""
    return f"{user_prefix(tenant, opaque)}/datasets/{digest}.jsonl"


def checked_key(key: str) -> str:
    """A key that every store reads the same way.  Raises KeyRefused."""
    if len(key) > 1024:
        raise KeyRefused(key, f"{len(key)} characters, at most 1024")
    for part in key.split("/"):
        if not _PART.fullmatch(part) or len(part) > 255:
            raise KeyRefused(key, f"part {ascii(part)[:40]} is empty, starts with a dot or has odd characters")
    return key


class FolderStore:
    """Objects as files below a folder of one machine."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()

    def put_new(self, key: str, data: bytes) -> bool:
        """Written aside, synced, then linked to its name: whole or not there, and never over another."""
        path = self._path(key)
        with self._faults(key):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, aside = tempfile.mkstemp(dir=path.parent, prefix=".put-")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.link(aside, path)
                _sync_folder(path.parent)
                return True
            except FileExistsError:
                return _same(key, data, path.read_bytes())
            finally:
                os.unlink(aside)

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
            for folder in path.parents:
                if folder == self.root or not folder.exists() or any(folder.iterdir()):
                    return
                folder.rmdir()

    def keys(self, prefix: str) -> Iterator[str]:
        """The keys below a prefix; files still being written have no key."""
        start = self._path(prefix) if prefix else self.root
        found = [start] if start.is_file() else sorted(start.rglob("*"))
        for path in found:
            if path.is_file() and not path.name.startswith("."):
                yield path.relative_to(self.root).as_posix()

    def check(self) -> str:
        """Where it is, once it has proved to be writable.  Raises StoreUnavailable."""
        with self._faults("a test file"), tempfile.TemporaryFile(dir=self.root):
            return f"folder {self.root}"

    def set_up(self) -> None:
        """Make the folder if it is missing.  Raises StoreUnavailable."""
        with self._faults("the folder"):
            self.root.mkdir(parents=True, exist_ok=True)

    def _path(self, key: str) -> Path:
        path = self.root / checked_key(key)
        if not path.resolve().is_relative_to(self.root.resolve()):
            raise KeyRefused(key, "it leads out of the store by a link")
        return path

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


class S3Store:
    """Objects in a bucket of any S3-compatible server."""

    def __init__(self, bucket: str, prefix: str = "", client: "S3Client | None" = None) -> None:
        self.bucket, self.root = bucket, f"{checked_key(prefix)}/" if prefix else ""
        self.name = f"s3://{bucket}/{prefix}"
        self.client = client or s3_client()

    def put_new(self, key: str, data: bytes) -> bool:
        """PUT with If-None-Match; a PUT whose answer was lost counts as ours when the bytes are the same."""
        status = self._status(
            key,
            lambda: self.client.put_object(Bucket=self.bucket, Key=self._key(key), Body=data, IfNoneMatch="*"),
        )
        # 412 there already, 409 somebody is writing it now, 404 as some servers say it for a lost race
        return True if status == 200 else _same(key, data, self.get(key))

    def get(self, key: str) -> bytes:
        """The whole object.  Raises ObjectMissing."""
        return b"".join(self.stream(key))

    def stream(self, key: str) -> Iterator[bytes]:
        """The object in pieces.  Raises ObjectMissing."""
        from botocore.exceptions import BotoCoreError  # imported late: the folder store needs no boto

        response = self._call(key, lambda: self.client.get_object(Bucket=self.bucket, Key=self._key(key)))
        try:
            yield from response["Body"].iter_chunks(_CHUNK)
        except BotoCoreError as error:
            raise StoreUnavailable(self.name, f"{key} broke off ({type(error).__name__})", "try again") from error

    def size(self, key: str) -> int | None:
        """Bytes of an object; None where there is none."""
        try:
            head = self._call(key, lambda: self.client.head_object(Bucket=self.bucket, Key=self._key(key)))
        except ObjectMissing:
            return None
        return head["ContentLength"]

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is fine."""
        self._call(key, lambda: self.client.delete_object(Bucket=self.bucket, Key=self._key(key)))

    def keys(self, prefix: str) -> Iterator[str]:
        """The keys below a prefix, for sweeping."""
        start = f"{self._key(prefix)}/" if prefix else self.root
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=start)
        for page in self._call(prefix, lambda: list(pages)):
            for found in page.get("Contents", []):
                yield found["Key"].removeprefix(self.root)

    def check(self) -> str:
        """Where it is, once it has answered.  Raises StoreUnavailable."""
        self._call("", lambda: self.client.head_bucket(Bucket=self.bucket))
        return f"{self.name} at {self.client.meta.endpoint_url}"

    def set_up(self) -> None:
        """Make the bucket if it is missing.  Raises StoreUnavailable."""
        try:
            self.check()
        except (ObjectMissing, StoreUnavailable):
            owned = self._status("", lambda: self.client.create_bucket(Bucket=self.bucket))
            assert owned in (200, 409)  # 409: somebody made it meanwhile, or it is ours already

    def _key(self, key: str) -> str:
        return self.root + checked_key(key)

    def _status(self, key: str, call: Callable[[], Any]) -> int:  # boto3's response types differ by call
        """200, or the status of a conditional write that lost."""
        from botocore.exceptions import ClientError

        def guarded() -> int:
            try:
                call()
                return 200
            except ClientError as error:
                status = int(error.response["ResponseMetadata"].get("HTTPStatusCode", 0))
                if status in (409, 412) or (status == 404 and _code(error) in ("NoSuchKey", "404")):
                    return status
                raise

        return self._call(key, guarded)

    def _call(self, key: str, call: Callable[[], Result]) -> Result:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return call()
        except ClientError as error:
            if _code(error) in ("NoSuchKey", "404"):
                raise ObjectMissing(key, self.name) from None
            fix = {
                "NoSuchBucket": "run `lora setup`",
                "AccessDenied": "check the keys and their rights",
                "403": "check the keys and their rights",
                "SignatureDoesNotMatch": "check AWS_SECRET_ACCESS_KEY",
                "InvalidAccessKeyId": "check AWS_ACCESS_KEY_ID",
            }.get(_code(error), "look at the server's log")
            raise StoreUnavailable(self.name, f"{error.operation_name} of {key!r}: {_code(error)}", fix) from error
        except BotoCoreError as error:
            why = str(error).splitlines()[0]
            raise StoreUnavailable(self.name, why, "check AWS_ENDPOINT_URL_S3 and the credentials") from error


def s3_client() -> "S3Client":
    """A boto3 client from boto3's own environment, careful with servers that know only plain S3."""
    import boto3  # imported late: the folder store needs no boto
    from botocore.config import Config

    config = Config(
        retries={"mode": "standard", "max_attempts": 5},
        connect_timeout=5,
        read_timeout=60,
        request_checksum_calculation="when_required",  # newer boto3 sends trailers that older servers answer with 411
        response_checksum_validation="when_required",
        s3={"addressing_style": "path" if os.environ.get("AWS_ENDPOINT_URL_S3") else "auto"},
    )
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    return boto3.Session().client("s3", config=config, region_name=region)


def _code(error: Any) -> str:  # botocore's ClientError, imported late
    return str(error.response.get("Error", {}).get("Code", ""))


def _same(key: str, data: bytes, there: bytes) -> bool:
    """False (not written by us, but right); raises ObjectDiffers for other bytes."""
    if there != data:
        raise ObjectDiffers(key, hashlib.sha256(data).hexdigest(), hashlib.sha256(there).hexdigest())
    return False


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
