"""A tenant's schedules as somebody wrote them down: a file, line by line and field by field."""

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import ByteSize, TypeAdapter, ValidationError

from flows.errors import FieldRefused, FlowError, Unready
from lora_core.errors import LoraError
from lora_core.recipe import Recipe, load_recipe
from registry.errors import NameRefused, ScheduleRefused
from registry.names import DEFAULT_ADAPTER, Reference
from registry.schedules import Terms
from registry.timing import Quiet, Timing

FIELDS = (
    "user", "adapter", "cron", "every", "on_data", "time_zone", "quiet", "priority", "min_examples", "min_bytes",
    "max_versions", "paused", "base", "recipe", "set",
)  # fmt: skip
MOST_LINES, MOST_BYTES = 100_000, 64 << 20  # of a file
_FIX = {".csv": "give a cell for each column, all on one line", ".jsonl": "give one JSON object a line, with a user"}
_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False, "": False}
Given = Mapping[str, object]  # a field's value: text, a number, or None and "" where it is not given
Read = TypeVar("Read")


@dataclass(frozen=True)
class Wish:
    """A schedule as somebody wants it, and the line that says so."""

    line: int
    reference: Reference
    timing: Timing
    terms: Terms
    base: str | None
    recipe: Recipe


@dataclass(frozen=True)
class BadLine:
    """A line of a file that cannot be followed: where, in which field, why, and what to do."""

    line: int
    field: str
    why: str
    fix: str


def read_wishes(path: Path, tenant: str) -> tuple[list[Wish], list[BadLine]]:
    """A tenant's schedules from a file, one a line of JSON or a row of CSV; every bad line with its reason.

    Raises Unready for a file that is no such thing, OSError.
    """
    wishes, bad, seen = list[Wish](), list[BadLine](), dict[str, int]()
    for number, given in _lines(path):
        try:
            if isinstance(given, str):
                raise FieldRefused("line", given, _FIX[path.suffix.lower()])
            wish = _wish(number, given, tenant)
            if (before := seen.setdefault(wish.reference.label, number)) != number:
                raise FieldRefused("user", f"line {before} is about the same adapter", "keep one of them")
            wishes.append(wish)
        except FieldRefused as error:
            bad.append(BadLine(number, *error.args))
    return wishes, bad


def _timing_and_terms(given: Given) -> tuple[Timing, Terms]:
    examples, size = _number(given, "min_examples"), _bytes(given)
    quiet = _tried("quiet", lambda: Quiet.parse(str(given["quiet"]))) if _is_given(given, "quiet") else None
    on_data = _flag(given, "on_data")
    ways = [name for name in ("cron", "every") if _is_given(given, name)] + ["on_data"] * on_data
    if len(ways) != 1:
        raise FieldRefused("cron", f"{len(ways)} timings are given", "give one of cron, every and on_data")
    (way,) = ways
    if way == "every" and not quiet and _is_given(given, "time_zone"):
        raise FieldRefused("time_zone", "an interval has no time zone of its own", "leave it out, or give quiet hours")
    zone = str(given["time_zone"]) if _is_given(given, "time_zone") else "UTC"
    terms = Terms(
        quiet=quiet,
        priority=_number(given, "priority") or 0,
        min_examples=1 if on_data and examples is None and size is None else examples,
        min_bytes=size,
        max_versions=_number(given, "max_versions"),
        paused=_flag(given, "paused"),
    )
    return _tried(way, lambda: _timing(way, given, zone)), _tried("priority", terms.check)


def _wish(line: int, given: Given, tenant: str) -> Wish:
    if unknown := [name for name in given if name not in FIELDS]:
        raise FieldRefused(str(unknown[0])[:40], "is no field", f"fields are {', '.join(FIELDS)}")
    if not _is_given(given, "user"):
        raise FieldRefused("user", "is missing", "name the user, as the tenant does")
    adapter = str(given["adapter"]) if _is_given(given, "adapter") else DEFAULT_ADAPTER
    reference = _tried("user", lambda: Reference(tenant, str(given["user"]), adapter))
    timing, terms = _timing_and_terms(given)
    base = str(given["base"]) if _is_given(given, "base") else None
    overrides = _overrides(given)
    return Wish(line, reference, timing, terms, base, _tried("recipe", lambda: _recipe(given, overrides)))


def _overrides(given: Given) -> list[str]:
    value = given.get("set") or ""
    if not isinstance(value, str):
        raise FieldRefused("set", f"is a {type(value).__name__}", 'write it as one text, such as "rank=8 epochs=2"')
    return value.split()


def _recipe(given: Given, overrides: Sequence[str]) -> Recipe:
    """A file's, an object's or the default one, with what is set on top."""
    written = given.get("recipe")
    source = written if isinstance(written, Mapping) else str(written) if _is_given(given, "recipe") else None
    return load_recipe(source, overrides)


def _timing(way: str, given: Given, zone: str) -> Timing:
    if way == "on_data":
        return Timing.on_data(zone)
    return Timing.cron(str(given["cron"]), zone) if way == "cron" else Timing.every(str(given["every"]), zone)


def _lines(path: Path) -> Iterator[tuple[int, Given | str]]:
    """Each line with its number: its fields, or what is wrong with it."""
    kind = path.suffix.lower()
    if kind not in (".csv", ".jsonl"):
        raise Unready(f"{path.name} is neither .csv nor .jsonl", "name the file after what it holds")
    if path.stat().st_size > MOST_BYTES:
        raise Unready(f"{path.name} is larger than {MOST_BYTES >> 20} MiB", "split it")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unready(f"{path.name} is not UTF-8 at byte {error.start}", "save it as UTF-8") from None
    if text.count("\n") > MOST_LINES:
        raise Unready(f"{path.name} has more than {MOST_LINES:,} lines", "split it")
    yield from _rows(text) if kind == ".csv" else _objects(text)


def _rows(text: str) -> Iterator[tuple[int, Given | str]]:
    """Each line by itself: one that is no CSV takes none of the others with it."""
    names: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            cells = next(csv.reader([line], strict=True), [])
        except csv.Error as error:
            yield number, f"is no CSV: {error}"
            continue
        if not names:
            names = cells
        elif len(cells) > len(names):
            yield number, "has more cells than the header"
        elif cells:
            yield number, dict(zip(names, cells, strict=False))


def _objects(text: str) -> Iterator[tuple[int, Given | str]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, f"is no JSON: {str(error)[:80]}"
        else:
            yield number, found if isinstance(found, dict) else "is no JSON object"


def _is_given(given: Given, name: str) -> bool:
    return given.get(name) not in (None, "", False)


def _number(given: Given, name: str) -> int | None:
    value = given.get(name)
    if value in (None, ""):
        return None
    try:
        if isinstance(value, bool | float):
            raise ValueError
        return int(str(value))
    except ValueError:
        raise FieldRefused(name, f"{str(value)[:40]!r} is no whole number", "give one such as 50") from None


def _bytes(given: Given) -> int | None:
    value = given.get("min_bytes")
    if value in (None, ""):
        return None
    return parse_size(str(value))


def parse_size(text: str) -> int:
    """A size such as 1MiB, in bytes.  Raises FieldRefused."""
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise FieldRefused("min_bytes", f"{text[:40]!r} is no size", "give one such as 1MiB or 20000") from None


def _flag(given: Given, name: str) -> bool:
    value = given.get(name)
    if value is None or isinstance(value, bool):
        return bool(value)
    try:
        return _WORDS[str(value).lower()]
    except KeyError:
        raise FieldRefused(name, f"{str(value)[:40]!r} is neither true nor false", "give one of them") from None


def _tried(field: str, read: Callable[[], Read]) -> Read:
    """What reading a field gives, or the refusal under the field's name."""
    try:
        return read()
    except ScheduleRefused as error:
        given, why, fix = error.args
        raise FieldRefused(field, f"{given!r} {why}", fix) from None
    except (NameRefused, LoraError, FlowError, OSError) as error:
        raise FieldRefused(field, str(error), "mend it") from None
