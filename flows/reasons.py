"""Why jobs failed, in groups: reasons that differ in names and numbers alone are one, with one thing to do about it."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from registry.overview import Failure

# Kinds of failure, few and fixed: they are labels of metrics.  The first pattern that is found says which.
KINDS = (
    ("attempts", r"given up after|its worker died"),
    ("memory", r"\bMiB\b|\bGiB\b|out of memory|needs? .* memory"),
    ("numbers", r"not finite"),
    ("search", r"trial of the search"),
    ("base", r"^base "),
    ("store", r"^(store|object|no object|database) "),
    ("data", r"examples?|dataset|preference|template|rows?\b"),
)
OTHER = "other"
ALL_KINDS = (*(kind for kind, _ in KINDS), OTHER)
# What one failure has for itself: quoted words, digests, paths, numbers.
_OWN = re.compile(r"'[^']*'|\"[^\"]*\"|\b[0-9a-f]{12,}\b|(?:/[\w.-]+){2,}|\d[\d,.]*")


@dataclass(frozen=True)
class Reason:
    """One group of failures: the latest stands for all."""

    kind: str
    count: int
    example: Failure
    why: str
    what_to_do: str


def kind_of(why: str) -> str:
    """What kind of failure a text tells of."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, why)), OTHER)


def grouped(failures: Sequence[Failure]) -> list[Reason]:
    """Failures by reason, the most frequent first; of each the first given, which is the latest, as the example."""
    told = [_unnamed(failure) for failure in failures]
    keys = [_OWN.sub("*", text) for text in told]
    first = {key: number for number, key in reversed(list(enumerate(keys)))}
    return [
        Reason(kind_of(told[first[key]]), count, failures[first[key]], *_halves(told[first[key]]))
        for key, count in Counter(keys).most_common()
    ]


def _unnamed(failure: Failure) -> str:
    """The reason without the user's name, which stands beside it."""
    label = re.escape(f"{failure.tenant}/{failure.user}")
    return re.sub(rf"{label}(/[\w.-]+)?:?\s*", "", failure.why).strip() or "no reason was given"


def _halves(why: str) -> tuple[str, str]:
    """What happened, and what to do: our errors put it after their last semicolon."""
    what, mark, fix = why.rpartition("; ")
    return (what, fix) if mark else (why, "ask again: lora train TENANT/USER")
