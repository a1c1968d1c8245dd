"""A user's examples as rows of T tokens: packed end to end, each example a document of its own.

Nothing but whole arrays is moved, since on a GPU all waits for this; the training loop stacks one row a slot into
K x T tensors.  T tokens a row.
"""

import hashlib
import random
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from lora_core.data.rendering import IGNORED, AnyRendered, Numbers, numbers


@dataclass(frozen=True)
class Row:
    """T tokens of one user.  Attention and positions restart at each document; what is left over is its own document.

    `targets[t]` is the token that position t must predict, or IGNORED; `documents[t]` numbers the example
    within the row from 0; `examples[d]` is the index of document d among the examples that were packed.  A pair is two
    documents, one after the other.
    """

    tokens: Numbers
    targets: Numbers
    positions: Numbers
    documents: Numbers
    examples: tuple[int, ...]
    lengths: tuple[int, ...]  # each document's tokens

    @property
    def used(self) -> int:
        """How many of the T tokens are examples rather than filling."""
        return sum(self.lengths)

    @cached_property
    def counted(self) -> int:
        """How many predictions count."""
        return len(self.targets) - self.targets.count(IGNORED)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that a frozen layer's output depends on besides the base: tokens, positions and documents."""
        return hashlib.sha256(b"".join((self.tokens, self.positions, self.documents))).hexdigest()


@dataclass
class _Filling:
    """A row being filled."""

    tokens: Numbers = field(default_factory=lambda: numbers(()))
    targets: Numbers = field(default_factory=lambda: numbers(()))
    positions: Numbers = field(default_factory=lambda: numbers(()))
    documents: Numbers = field(default_factory=lambda: numbers(()))
    examples: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    def add(self, index: int, rendered: AnyRendered) -> None:
        for document in rendered.documents:
            length = len(document.tokens)
            self.tokens.extend(document.tokens)
            self.targets.extend(document.targets)
            self.positions.extend(range(length))
            self.documents.extend(numbers([len(self.examples)]) * length)
            self.examples.append(index)
            self.lengths.append(length)

    def close(self, row_tokens: int) -> Row:
        rest = row_tokens - len(self.tokens)
        self.tokens.extend(numbers([0]) * rest)
        self.targets.extend(numbers([IGNORED]) * rest)
        self.positions.extend(numbers([0]) * rest)  # no position that a base may not have
        self.documents.extend(numbers([len(self.examples)]) * rest)
        fields = (self.tokens, self.targets, self.positions, self.documents)
        return Row(*fields, tuple(self.examples), tuple(self.lengths))


def filled(row: Row, tokens: int) -> Row:
    """The row with so many more tokens of filling."""
    if not tokens:
        return row
    more = {"tokens": 0, "targets": IGNORED, "positions": 0, "documents": len(row.examples)}
    return replace(row, **{name: getattr(row, name) + numbers([value]) * tokens for name, value in more.items()})


def empty_row(row_tokens: int) -> Row:
    """What a slot without work reads."""
    return _Filling().close(row_tokens)


def pack(examples: Sequence[tuple[int, AnyRendered]], row_tokens: int) -> list[Row]:
    """Numbered examples into as few rows as first-fit finds, order kept within a row.

    Raises ValueError for an example of more than `row_tokens` tokens: rendering should have cut it.
    """
    open_rows: list[_Filling] = []
    for index, rendered in examples:
        length = len(rendered.tokens)
        _check_length(index, length, row_tokens)
        row = next((row for row in open_rows if len(row.tokens) + length <= row_tokens), None)
        if row is None:
            row = _Filling()
            open_rows.append(row)
        row.add(index, rendered)
    return [row.close(row_tokens) for row in open_rows]


class DenseRows(Sequence[Row]):
    """All examples packed at once, each row made when it is asked for: many users' rows would fill the memory."""

    def __init__(self, examples: Sequence[AnyRendered], row_tokens: int) -> None:
        self._examples, self._row_tokens = examples, row_tokens
        self.members = densely([len(rendered.tokens) for rendered in examples], row_tokens)  # of each row, by number

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, number: Any) -> Any:  # an index: rows are never sliced
        (row,) = pack([(index, self._examples[index]) for index in self.members[number]], self._row_tokens)
        return row


def densely(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Which examples share a row when all are packed at once: best-fit decreasing, so rows are as full as can be.

    Takes each example's tokens, gives each row's examples by number.  Raises ValueError as `pack` does.
    """
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # room left and the row's number, the tightest first
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        _check_length(index, lengths[index], row_tokens)
        place = bisect_left(spaces, (lengths[index], -1))
        if place == len(spaces):
            spaces.append((row_tokens, len(rows)))
            rows.append([])
        room, number = spaces.pop(place)
        rows[number].append(index)
        insort(spaces, (room - lengths[index], number))
    return rows


def _check_length(index: int, length: int, row_tokens: int) -> None:
    if length > row_tokens:
        raise ValueError(f"example {index} has {length} tokens, a row {row_tokens}; lower max_length")


def epoch_batches(count: int, batch_size: int, seed: int, epoch: int) -> Iterator[list[int]]:
    """The numbers 0 to `count` of one epoch, shuffled by (seed, epoch) alone, `batch_size` at a time."""
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    for start in range(0, count, batch_size):
        yield order[start : start + batch_size]
