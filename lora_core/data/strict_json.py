"""Strict JSON of limited depth, and an array's rows one at a time: its objects are never all held.

Brackets are counted before the parser, which recurses, sees anything.
"""

import json
import re
from collections.abc import Iterator

# Strings whole, so that brackets inside them do not count.  Possessive, and good without its last quote: linear time.
_TOKEN = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{},]', re.DOTALL)


def decoded(data: bytes) -> str:
    """UTF-8, with or without a byte order mark.  Raises ValueError in plain words."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} is not UTF-8") from None


def parse_json(text: str, depth: int) -> object:
    """Strict JSON of limited depth: no NaN, no key twice.  Raises ValueError in plain words."""
    if text.count("[") + text.count("{") > depth:
        for _ in _ends(text, depth):
            pass
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at character {error.pos + 1}") from None


def array_elements(text: str, depth: int) -> Iterator[str]:
    """The elements of a JSON array as text, or the whole text where it is none.  Raises ValueError in plain words."""
    if not text.lstrip().startswith("["):
        yield text
        return
    begin = text.index("[") + 1
    for end, last in _ends(text, depth):
        element = text[begin:end].strip()
        if not element and not (last and text[:begin].strip() == "["):
            raise ValueError(f"there is no value at character {end + 1}")
        if element:
            yield element
        begin = end + 1
        if last:
            if rest := text[begin:].strip():
                raise ValueError(f"after its end there is {rest[:20]!r}")
            return
    raise ValueError("it ends inside its array")


def _ends(text: str, most: int) -> Iterator[tuple[int, bool]]:
    """Where elements of the outermost array end, and whether that is its last.  Raises ValueError where it is deep."""
    depth = 0
    for found in _TOKEN.finditer(text):
        token = found[0]
        if token in ("[", "{"):
            depth += 1
            if depth > most:
                raise ValueError(f"it is nested deeper than {most}")
        elif token in ("]", "}"):
            depth -= 1
            if not depth:
                yield found.start(), True
        elif token == "," and depth == 1:
            yield found.start(), False


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key[:40]!r} stands twice")
        found[key] = value
    return found


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")
