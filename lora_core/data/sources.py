"""Where a dataset's files are: one file, a folder, an object or everything below a prefix in S3-compatible storage."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lora_core.errors import DatasetRefused

FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
COMPRESSIONS = (".gz", ".zst")
_MOST_ENTRIES = 100_000  # of a folder or below a prefix, data or not


@dataclass(frozen=True)
class Source:
    """One file to read: its name as the person gave it, what it holds, and how to open it."""

    name: str
    format: str
    compression: str
    open: Callable[[], BinaryIO]


def in_s3(given: str) -> bool:
    """Whether a source is an address in S3, for which `find_sources` needs a client."""
    return given.startswith("s3://")


def find_sources(given: str, most: int, s3: Any = None) -> Iterator[Source]:  # s3: a boto3 client
    """The files that a path, a folder or an `s3://` address means, in order of name.  Raises DatasetRefused."""
    if not given:  # as of a variable that is not set; pathlib would take it for the folder that we are in
        raise DatasetRefused("''", "names no file", "give a path, a folder or s3://bucket/key; `.` is this folder")
    found = list(itertools.islice(_in_bucket(given, s3) if in_s3(given) else _on_disk(given), most + 1))
    if len(found) > most:
        raise DatasetRefused(given, f"has more than {most:,} files", "split it by user")
    if not found:
        raise DatasetRefused(given, "has no file in a known format", f"give {', '.join(FORMATS)}, plain, .gz or .zst")
    yield from found


def _on_disk(given: str) -> Iterator[Source]:
    try:
        path = Path(given).expanduser()
        if path.is_dir():
            yield from _in_folder(given, path)
        elif path.is_file():
            yield _source(given, lambda: path.open("rb"))
        else:
            why = "is not a file or folder" if path.exists() else "does not exist"
            raise DatasetRefused(given, why, "check the path")
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise DatasetRefused(given, f"cannot be read ({error.strerror})", "check the path") from None
    except RuntimeError:  # pathlib's word for a home that it does not know
        raise DatasetRefused(given, "begins with the home of nobody", "write the whole path") from None


def _in_folder(given: str, folder: Path) -> Iterator[Source]:
    """Its files in order of name; a link that leads out of it is not followed, whoever made the folder."""
    inside, found = folder.resolve(), []
    for count, file in enumerate(folder.rglob("*")):
        if count == _MOST_ENTRIES:
            raise DatasetRefused(given, f"holds more than {_MOST_ENTRIES:,} files and folders", "split it by user")
        if not _hidden(file.relative_to(folder).as_posix()) and _kind(file.name) and file.is_file():
            if file.is_symlink() and not file.resolve().is_relative_to(inside):
                raise DatasetRefused(str(file), "is a link that leads out of its folder", "copy the file itself")
            found.append(file)
    named = {file.relative_to(folder).as_posix(): file for file in found}
    for name, file in sorted(named.items()):  # as a bucket's keys, where `/` is a letter like others
        yield _source(f"{given.rstrip('/')}/{name}", lambda file=file: file.open("rb"))  # type: ignore[misc]  # mypy and a lambda's default


def _hidden(name: str) -> bool:
    """Whether a file, or a folder on the way to it, is none of its user's: what editors and systems leave behind."""
    return any(part.startswith(".") for part in name.split("/"))


def _in_bucket(given: str, s3: Any) -> Iterator[Source]:  # a boto3 client
    from botocore.exceptions import BotoCoreError, ClientError  # imported late: only those who bring S3 need it

    if s3 is None:
        raise DatasetRefused(given, "is in S3, and no client for it was given", "pass a boto3 client as s3")
    bucket, _, key = given.removeprefix("s3://").partition("/")
    whole = not key or key.endswith("/")
    try:
        for name in _keys(s3, bucket, key) if whole else [key]:
            if not whole or (_kind(name) and not _hidden(name.removeprefix(key))):
                yield _source(f"s3://{bucket}/{name}", lambda name=name: _opened(s3, bucket, name))  # type: ignore[misc]  # mypy and a lambda's default
    except (BotoCoreError, ClientError) as error:
        why = f"cannot be read ({str(error).splitlines()[-1]})"
        raise DatasetRefused(given, why, "check the address, AWS_ENDPOINT_URL_S3 and the credentials") from None


def _keys(client: Any, bucket: str, prefix: str) -> list[str]:  # a boto3 client
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    keys = [found["Key"] for found in itertools.islice(_objects(pages), _MOST_ENTRIES + 1)]
    if len(keys) > _MOST_ENTRIES:
        raise DatasetRefused(f"s3://{bucket}/{prefix}", f"has more than {_MOST_ENTRIES:,} objects", "split it by user")
    return sorted(keys)


def _objects(pages: Iterable[Any]) -> Iterator[Any]:  # dicts of boto3
    for page in pages:
        yield from page.get("Contents", [])


def _opened(client: Any, bucket: str, key: str) -> BinaryIO:  # a boto3 client
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        body: BinaryIO = client.get_object(Bucket=bucket, Key=key)["Body"]
        return body
    except (BotoCoreError, ClientError) as error:
        code = error.response["Error"].get("Code") if isinstance(error, ClientError) else None
        why = f"cannot be read ({code or str(error).splitlines()[-1]})"
        raise DatasetRefused(f"s3://{bucket}/{key}", why, "check the address and the credentials") from None


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
