"""Values and bytes that nobody should send, by a seeded generator."""

import json
import random
from collections.abc import Callable

ODD: tuple[object, ...] = (
    None, True, False, 0, -1, 1, 1.5, 2**31, 2**63, 2**64, -(2**63), 10**400, 1e308, -0.0, float("nan"), float("inf"),
    "", " ", "x" * 5000, "\0", "\ud800", "\u202e", "é" * 50, "../../etc/passwd", "/dev/zero", "http://127.0.0.1/x",
    "(a+)+$" * 10, ".*", "NaN", "1e999", [], {}, [[]], [None], [[[[[[[[]]]]]]]], {"": ""}, {"a": {"b": {"c": []}}},
    [0] * 500,
)  # fmt: skip


def odd(generator: random.Random) -> object:
    """One of them."""
    return generator.choice(ODD)


def dumped(value: object) -> bytes:
    """JSON as a careless writer makes it: NaN as NaN, half a surrogate pair as such."""
    return json.dumps(value).encode()


def flipped(data: bytes, generator: random.Random) -> bytes:
    """A few bytes changed."""
    changed = bytearray(data)
    for _ in range(generator.randrange(1, 9)):
        changed[_place(data, generator)] = generator.randrange(256)
    return bytes(changed)


def cut(data: bytes, generator: random.Random) -> bytes:
    """The end is missing."""
    return data[: _place(data, generator)]


def dropped(data: bytes, generator: random.Random) -> bytes:
    """A stretch is missing."""
    start = _place(data, generator)
    return data[:start] + data[start + generator.randrange(1, 64) :]


def doubled(data: bytes, generator: random.Random) -> bytes:
    """A stretch stands twice."""
    start = _place(data, generator)
    end = start + generator.randrange(1, 200)
    return data[:end] + data[start:end] + data[end:]


def sprinkled(data: bytes, generator: random.Random) -> bytes:
    """Foreign bytes stand in between."""
    start = _place(data, generator)
    foreign = generator.choice(
        [b"\0", b"\xff\xfe", b'"', b"[[[[", b"{", b"\r", b"\xed\xa0\x80", generator.randbytes(40)]
    )
    return data[:start] + foreign + data[start:]


MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (flipped, cut, dropped, doubled, sprinkled)


def _place(data: bytes, generator: random.Random) -> int:
    """Mostly near an end, where formats keep what they say of themselves."""
    size = len(data)
    near = min(size, 600)
    where = generator.randrange(3)
    return generator.randrange(size) if where == 0 else generator.randrange(near) + (size - near) * (where - 1)
