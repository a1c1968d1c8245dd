"""Objects in a bucket of any S3-compatible server, and the one way to a client for it.

Only what all such servers agree on is used: PUT with If-None-Match, GET, HEAD, DELETE, LIST (to sweep, never to read).
"""

import os
import re
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
        """Remove every object at or below a prefix, whoever put it there; returns how many there were.

        In a bucket with versioning a plain DELETE hides an object and keeps its bytes: every version goes, and what
        uploads in parts have left.
        """
        found = self._versions(prefix)
        for key, version in found:
            self._erase(key, version)
        for key, upload in self._parts(prefix):
            self._abort(key, upload)
        return len({key for key, _ in found})

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
            owned = self._status("", self._create)
            assert owned in (200, 409)  # 409: somebody made it meanwhile, or it is ours already

    def _create(self) -> None:
        """Make the bucket; in the client's region where a server wants to be told which, as AWS does but for one."""
        from botocore.exceptions import ClientError

        try:
            self.client.create_bucket(Bucket=self.bucket)
        except ClientError as error:
            if _code(error) != "IllegalLocationConstraintException":
                raise
            # mypy_boto3_s3 lists the regions that there were when it was made.
            place: Any = {"LocationConstraint": self.client.meta.region_name}
            self.client.create_bucket(Bucket=self.bucket, CreateBucketConfiguration=place)

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

    def _erase(self, whole_key: str, version: str) -> None:
        """Remove one version of an object; the empty one on a server that knows no versions."""
        if not version:
            self._delete(whole_key)
            return

        def delete() -> None:
            self.client.delete_object(Bucket=self.bucket, Key=whole_key, VersionId=version)

        with suppress(ObjectMissing):  # some servers say so where another sweeper was sooner
            self._call(whole_key, delete)

    def _abort(self, whole_key: str, upload: str) -> None:
        def abort() -> None:
            self.client.abort_multipart_upload(Bucket=self.bucket, Key=whole_key, UploadId=upload)

        with suppress(ObjectMissing):  # it has just ended
            self._call(whole_key, abort)

    def _versions(self, prefix: str) -> list[tuple[str, str]]:
        """Whole keys at or below a prefix with their versions, the marks of deleted ones among them."""
        start = self._key(prefix)
        pages = self._pages("list_object_versions", start)
        if pages is None:
            return [(self.root + key, "") for key in self.keys(prefix)]
        found = [one for page in pages for kind in ("Versions", "DeleteMarkers") for one in page.get(kind, [])]
        return [(one["Key"], one["VersionId"]) for one in found if _below(one["Key"], start)]

    def _parts(self, prefix: str) -> list[tuple[str, str]]:
        """Whole keys at or below a prefix that somebody uploads in parts, and the uploads' ids."""
        start = self._key(prefix)
        found = [one for page in self._pages("list_multipart_uploads", start) or [] for one in page.get("Uploads", [])]
        return [(one["Key"], one["UploadId"]) for one in found if _below(one["Key"], start)]

    def _pages(self, listing: str, start: str) -> list[Any] | None:  # boto3's response types differ by call
        """Every page of a list of what begins so; None from a server that has no such list, and so no such things."""
        from botocore.exceptions import ClientError

        def pages() -> list[Any] | None:
            try:
                # boto3 types each listing's name by itself.
                paginator: Any = self.client.get_paginator(listing)  # type: ignore[call-overload]
                return list(paginator.paginate(Bucket=self.bucket, Prefix=start))
            except ClientError as error:
                if _code(error) in ("NotImplemented", "MethodNotAllowed", "501"):
                    return None
                raise

        return self._call(start, pages)

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
                "NotImplemented": "use a server that knows it; of PUT, with If-None-Match",
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
    )
    try:
        session = boto3.Session()
        # boto3 itself reads AWS_DEFAULT_REGION and the profile, but not AWS_REGION, which AWS's other tools read.
        region = os.environ.get("AWS_REGION") or session.region_name or "us-east-1"
        client = session.client("s3", config=config, region_name=region)
        if not _is_aws(client):
            return client  # whose buckets are paths: another server may have no names for them
        # Else boto3 presigns for the one host of all regions, which newer regions do not answer at.
        regional = config.merge(Config(s3={"addressing_style": "virtual"}))
        return session.client("s3", config=regional, region_name=region)
    except (BotoCoreError, ValueError) as error:
        fix = "check AWS_PROFILE, AWS_ENDPOINT_URL_S3 and the other AWS_ variables"
        raise StoreUnavailable("S3", str(error).splitlines()[0].rstrip("."), fix) from None


def _is_aws(client: "S3Client") -> bool:
    return re.match(r"https?://s3\.([a-z0-9-]+\.)?amazonaws\.com", client.meta.endpoint_url) is not None


def _code(error: Any) -> str:  # botocore's ClientError, imported late
    return str(error.response.get("Error", {}).get("Code", ""))


def _below(key: str, start: str) -> bool:
    return key == start or key.startswith(f"{start}/")
