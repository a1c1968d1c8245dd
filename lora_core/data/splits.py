"""Which examples are learnt and which are kept to judge by: decided by their content, the same on every machine."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lora_core.data.examples import Example, canonical_line
from lora_core.data.rendering import AnyRendered


@dataclass(frozen=True)
class Split:
    """The two halves of a dataset, each in its order."""

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]


def split(
    examples: Sequence[Example],
    share: float = 0.1,
    by: Literal["content", "order"] = "content",
    minimum: int = 8,
) -> Split:
    """Keep about `share` of the examples, at least `minimum` of them but never more than half, from training.

    By content: those whose hash is lowest, so an example does not change sides as the data grows, once there are
    enough for the share to decide.  By order: the last ones, for data in order of time.
    """
    half = len(examples) // 2
    if by == "order":
        count = min(max(minimum, round(share * len(examples))), half)
        return Split(tuple(examples[: len(examples) - count]), tuple(examples[len(examples) - count :]))
    ranks = [_rank(example) for example in examples]
    count = min(max(minimum, sum(rank < share for rank in ranks)), half)
    kept = set(sorted(range(len(ranks)), key=ranks.__getitem__)[:count])
    return Split(
        tuple(example for index, example in enumerate(examples) if index not in kept),
        tuple(example for index, example in enumerate(examples) if index in kept),
    )


def _rank(example: Example) -> float:
    """A number from 0 to 1 that depends on the example's content alone."""
    digest = hashlib.sha256(canonical_line(example).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def newest(examples: Sequence[AnyRendered], max_tokens: int | None) -> tuple[AnyRendered, ...]:
    """The last examples that together have at most `max_tokens` tokens: equal budgets for unequal users."""
    if max_tokens is None:
        return tuple(examples)
    kept: list[AnyRendered] = []
    for rendered in reversed(examples):
        max_tokens -= len(rendered.tokens)
        if max_tokens < 0:
            break
        kept.append(rendered)
    return tuple(reversed(kept))
