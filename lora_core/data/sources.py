"""Where a dataset's files are: one file, a folder, an object or everything below a prefix in S3-compatible storage."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from lora_core.errors import DatasetRefused

FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
COMPRESSIONS = (".gz", ".zst")


@dataclass(frozen=True)
class Source:
    """One file to read: its name as the person gave it, what it holds, and how to open it."""

    name: str
    format: str
    compression: str
    open: Callable[[], BinaryIO]


def find_sources(given: str, most: int, s3: Any = None) -> Iterator[Source]:  # s3: a boto3 client
    """The files that a path, a folder or an `s3://` address means, in order of name.  Raises DatasetRefused."""
    found = list(_in_s3(given, s3) if given.startswith("s3://") else _in_folder(given))
    if len(found) > most:
        raise DatasetRefused(given, f"has {len(found):,} files, at most {most:,}", "split it by user")
    if not found:
        raise DatasetRefused(given, "has no file in a known format", f"give {', '.join(FORMATS)}, plain, .gz or .zst")
    yield from found


def _in_folder(given: str) -> Iterator[Source]:
    path = Path(given).expanduser()
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            relative = file.relative_to(path)
            if file.is_file() and not any(part.startswith(".") for part in relative.parts) and _kind(file.name):
                yield _source(f"{given.rstrip('/')}/{relative.as_posix()}", lambda file=file: file.open("rb"))  # type: ignore[misc]  # mypy and a lambda's default
    elif path.is_file():
        yield _source(given, lambda: path.open("rb"))
    else:
        why = "is not a file or folder" if path.exists() else "does not exist"
        raise DatasetRefused(given, why, "check the path")


def _in_s3(given: str, s3: Any) -> Iterator[Source]:  # a boto3 client
    from botocore.exceptions import BotoCoreError, ClientError  # imported late: only those who bring S3 need it

    bucket, key = urlsplit(given).netloc, urlsplit(given).path.lstrip("/")
    client = s3 or _client()
    try:
        for name in _keys(client, bucket, key) if not key or key.endswith("/") else [key]:
            if not key.endswith("/") or _kind(name):
                yield _source(f"s3://{bucket}/{name}", lambda name=name: _opened(client, bucket, name))  # type: ignore[misc]  # mypy and a lambda's default
    except (BotoCoreError, ClientError) as error:
        why = f"cannot be read ({str(error).splitlines()[0]})"
        raise DatasetRefused(given, why, "check the address, AWS_ENDPOINT_URL_S3 and the credentials") from None


def _keys(client: Any, bucket: str, prefix: str) -> list[str]:  # a boto3 client
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return sorted(found["Key"] for page in pages for found in page.get("Contents", []))


def _opened(client: Any, bucket: str, key: str) -> BinaryIO:  # a boto3 client
    from botocore.exceptions import ClientError

    try:
        body: BinaryIO = client.get_object(Bucket=bucket, Key=key)["Body"]
        return body
    except ClientError as error:
        why = f"cannot be read ({error.response['Error'].get('Code', 'refused')})"
        raise DatasetRefused(f"s3://{bucket}/{key}", why, "check the address and the credentials") from None


def _client() -> Any:  # a boto3 client
    import boto3
    from botocore.config import Config

    config = Config(
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"addressing_style": "path" if os.environ.get("AWS_ENDPOINT_URL_S3") else "auto"},
    )
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    return boto3.Session().client("s3", config=config, region_name=region)


def _kind(name: str) -> tuple[str, str] | None:
    """Format and compression by a file's name; None for one that is not a dataset."""
    compression = next((end for end in COMPRESSIONS if name.lower().endswith(end)), "")
    bare = name.lower().removesuffix(compression)
    form = next((end for end in FORMATS if bare.endswith(end)), None)
    return (form, compression) if form else None


def _source(name: str, opener: Callable[[], BinaryIO]) -> Source:
    kind = _kind(name)
    if kind is None:
        raise DatasetRefused(name, "is of no known format", f"give {', '.join(FORMATS)}, plain, .gz or .zst")
    return Source(name, *kind, opener)
