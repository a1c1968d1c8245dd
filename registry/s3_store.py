"""Objects in a bucket of any S3-compatible server, and the one way to a client for it.

Only what all such servers agree on is used: PUT with If-None-Match, GET, HEAD, DELETE, LIST (to sweep, never to read).
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from registry.errors import ObjectMissing, StoreUnavailable
from registry.keys import check_same, checked_key

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_CHUNK = 1 << 20
_STARTS = 3  # of one object's download, each from where the last one broke off
_PAUSES = (0.05, 0.2, 0.5, 1.0, 2.0)  # seconds, while another write of the same key is under way
Result = TypeVar("Result")


class S3Store:
    """Objects in a bucket of any S3-compatible server."""

    def __init__(self, bucket: str, prefix: str = "", client: "S3Client | None" = None) -> None:
        self.bucket, self.root = bucket, f"{checked_key(prefix)}/" if prefix else ""
        self.name = f"s3://{bucket}/{prefix}"
        self.client = client or s3_client()

    def put_new(self, key: str, data: bytes) -> bool:
        """PUT with If-None-Match; a PUT whose answer was lost counts as ours when the bytes are the same."""

        def put() -> int:
            return self._status(
                key,
                lambda: self.client.put_object(Bucket=self.bucket, Key=self._key(key), Body=data, IfNoneMatch="*"),
            )

        for pause in _PAUSES:
            if (status := put()) == 200:
                return True
            # 412 there already, 409 somebody is writing it now, 404 as some servers say it for a lost race: it may
            # not be readable yet, and it is not there if the other write fails.
            with suppress(ObjectMissing):
                check_same(key, data, self.get(key))
                return False
            time.sleep(pause)
        raise StoreUnavailable(self.name, f"{key} is being written elsewhere ({status})", "try again")

    def get(self, key: str) -> bytes:
        """The whole object.  Raises ObjectMissing."""
        return b"".join(self.stream(key))

    def stream(self, key: str) -> Iterator[bytes]:
        """The object in pieces; where it breaks off, the rest is asked for.  Raises ObjectMissing, StoreUnavailable."""
        from botocore.exceptions import BotoCoreError  # imported late: the folder store needs no boto

        done, why = 0, ""
        for _ in range(_STARTS):
            try:
                for piece in self._from(key, done):
                    done += len(piece)
                    yield piece
                return
            except BotoCoreError as error:
                why = type(error).__name__
        raise StoreUnavailable(self.name, f"{key} broke off ({why})", "try again")

    def size(self, key: str) -> int | None:
        """Bytes of an object; None where there is none."""
        try:
            head = self._call(key, lambda: self.client.head_object(Bucket=self.bucket, Key=self._key(key)))
        except ObjectMissing:
            return None
        return head["ContentLength"]

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is fine."""
        self._delete(self._key(key))

    def clear(self, prefix: str) -> int:
        """Remove every object below a prefix, whoever put it there; returns how many there were."""
        checked_key(prefix)
        found = list(self.keys(prefix))
        for key in found:
            self._delete(self.root + key)
        return len(found)

    def keys(self, prefix: str) -> Iterator[str]:
        """The keys below a prefix, for sweeping."""
        start = f"{self._key(prefix)}/" if prefix else self.root
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=start)
        for page in self._call(prefix, lambda: list(pages)):
            for found in page.get("Contents", []):
                yield found["Key"].removeprefix(self.root)

    def signed_url(self, key: str, seconds: int) -> str:
        """A presigned GET: the server refuses it for another key or method, and once its time is over."""
        place = {"Bucket": self.bucket, "Key": self._key(key)}
        return self._call(key, lambda: self.client.generate_presigned_url("get_object", place, ExpiresIn=seconds))

    def check(self) -> str:
        """Where it is, once it has answered.  Raises StoreUnavailable."""
        try:
            self._call("", lambda: self.client.head_bucket(Bucket=self.bucket))
        except ObjectMissing:  # a HEAD's 404 says no more than that
            fix = "run `lora setup`, or check LORA_STORE_URL"
            raise StoreUnavailable(self.name, "there is no such bucket", fix) from None
        return f"{self.name} at {self.client.meta.endpoint_url}"

    def set_up(self) -> None:
        """Make the bucket if it is missing.  Raises StoreUnavailable."""
        try:
            self.check()
        except StoreUnavailable:
            owned = self._status("", lambda: self.client.create_bucket(Bucket=self.bucket))
            assert owned in (200, 409)  # 409: somebody made it meanwhile, or it is ours already

    def _from(self, key: str, start: int) -> Iterator[bytes]:
        """The object from a byte on: it is immutable, so that the rest of it fits what came before."""
        get = partial(self.client.get_object, Bucket=self.bucket, Key=self._key(key))
        response = self._call(key, lambda: get(Range=f"bytes={start}-") if start else get())
        with closing(response["Body"]) as body:  # read to its end, or it takes its connection with it
            yield from body.iter_chunks(_CHUNK)

    def _key(self, key: str) -> str:
        return self.root + checked_key(key)

    def _delete(self, whole_key: str) -> None:
        self._call(whole_key, lambda: self.client.delete_object(Bucket=self.bucket, Key=whole_key))

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
    """A boto3 client from boto3's own environment, careful with servers that know only plain S3.

    Raises StoreUnavailable for an environment that boto3 cannot read.
    """
    import boto3  # imported late: the folder store needs no boto
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    config = Config(
        signature_version="s3v4",  # else boto3 presigns by the older one, which fewer servers take
        retries={"mode": "standard", "max_attempts": 5},
        max_pool_connections=64,  # as many as pull at once keep theirs: a new one costs round trips
        connect_timeout=5,
        read_timeout=60,
        request_checksum_calculation="when_required",  # newer boto3 sends trailers that older servers answer with 411
        response_checksum_validation="when_required",
        s3={"addressing_style": "path" if os.environ.get("AWS_ENDPOINT_URL_S3") else "auto"},
    )
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    try:
        return boto3.Session().client("s3", config=config, region_name=region)
    except (BotoCoreError, ValueError) as error:
        fix = "check AWS_PROFILE, AWS_ENDPOINT_URL_S3 and the other AWS_ variables"
        raise StoreUnavailable("S3", str(error).splitlines()[0].rstrip("."), fix) from None


def _code(error: Any) -> str:  # botocore's ClientError, imported late
    return str(error.response.get("Error", {}).get("Code", ""))
