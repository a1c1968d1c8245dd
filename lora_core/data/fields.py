"""What a field of a row holds: a text, or what is wrong with it and how to mend it."""

import difflib
import itertools
from collections.abc import Mapping, Sequence

from lora_core.errors import BadRow


def string(row: Mapping[str, object], field: str, blank: bool = False) -> str:
    """The text of a row's field.  Raises BadRow, with a field that may have been meant where it is missing."""
    if field not in row:
        near = difflib.get_close_matches(field, first_keys(row), n=1)
        raise BadRow(field, "is missing", f"rename {near[0]!r} to {field!r}" if near else f"add {field!r}")
    return text_of(row[field], field, blank)


def text_of(value: object, field: str, blank: bool) -> str:
    """A value that is a text which can be learnt from; `blank`: it may be empty.  Raises BadRow."""
    if value is None:
        raise BadRow(field, "is missing", "add the text")
    if not isinstance(value, str):
        fix = "write it as one text" if isinstance(value, list | tuple | Mapping) else "put it in quotes"
        raise BadRow(field, f"is {shown(value)}, not text", fix)
    if not blank and not value.strip():
        raise BadRow(field, "is empty", "write the text that is to be learnt, or drop the row")
    if "\0" in value:
        raise BadRow(field, "holds a NUL character", "remove it")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(field, "holds half of a surrogate pair", "write the character itself") from None
    return value


def joined(content: object, field: str) -> object:
    """Parts of text as one, where a turn's content is a list of them (OpenAI's newer layout); else as it is.

    Raises BadRow for a part of another kind.
    """
    if not isinstance(content, Sequence) or isinstance(content, str) or not content:
        return content
    texts = []
    for index, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise BadRow(f"{field}[{index}]", f"is {shown(part)}, not a part of text", "drop the part, or the row")
        texts.append(text_of(part.get("text"), f"{field}[{index}].text", blank=True))
    return "".join(texts)


def first_keys(row: Mapping[str, object]) -> list[str]:
    """A few keys' beginnings: likenesses take time, and a hostile row has a hundred thousand keys."""
    return [str(key)[:40] for key in itertools.islice(row, 50)]


def shown(value: object) -> str:
    """What a value is, in a few words."""
    return "missing" if value is None else f"{type(value).__name__} {str(value)[:30]!r}"
