"""Long answers in pages: a page's rows, and a cursor that says where the next one begins.

A cursor holds the place of a page's last row in the order of the index, so that the next page starts there however many
rows lie before it, and whatever was added or removed meanwhile.  What it holds is nobody's business but ours.
"""

import base64
import binascii
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sqlalchemy import ColumnElement, tuple_

from registry.errors import CursorRefused, NameRefused

Row = TypeVar("Row")
Place = list[Any]  # strings and numbers: the last row's values in the columns of the order

LARGEST = 10_000  # rows of a page


@dataclass(frozen=True)
class Page(Generic[Row]):
    """Some rows of an answer, and where it goes on; None after the last."""

    rows: Sequence[Row]
    cursor: str | None


def write_cursor(place: Place, *question: object) -> str:
    """The cursor of a row, for the same question only."""
    return base64.urlsafe_b64encode(json.dumps([_mark(question), *place]).encode()).decode().rstrip("=")


def read_cursor(text: str, *question: object) -> Place | None:
    """The place that a cursor holds; None for an empty one, the beginning.  Raises CursorRefused."""
    if not text:
        return None
    try:
        mark, *place = json.loads(base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True))
    except (binascii.Error, ValueError, TypeError, RecursionError):
        raise CursorRefused(text, "it was cut or changed") from None
    if mark != _mark(question):
        raise CursorRefused(text, "it belongs to another question")
    return list(place)


def beyond(order: Sequence[Any], place: Place, descending: bool = False) -> ColumnElement[bool]:  # columns of any type
    """What comes after a place in that order, as a comparison of rows: an index of these columns starts right there."""
    return tuple_(*order) < tuple(place) if descending else tuple_(*order) > tuple(place)


def check_limit(limit: int) -> None:
    """Raises NameRefused for a page of no rows, or of more than anybody should hold at once."""
    if not 0 < limit <= LARGEST:
        raise NameRefused("limit", str(limit), f"1 to {LARGEST:,} rows a page")


def check_digest(kind: str, digest: str) -> str:
    """A digest or its beginning, if it is one; empty is allowed.  Raises NameRefused."""
    if len(digest) > 64 or not ((digest.isascii() and digest.isalnum() and digest == digest.lower()) or not digest):
        raise NameRefused(f"{kind} digest", digest, "up to 64 of 0-9 and a-f: a SHA-256, or its beginning")
    return digest


def _mark(question: tuple[object, ...]) -> str:
    """Stands for a question in its cursors."""
    return hashlib.sha256(repr(question).encode()).hexdigest()[:12]
