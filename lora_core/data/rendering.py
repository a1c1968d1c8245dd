"""Placeholder until the data package lands."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rendered:
    """Tokens of one example."""

    tokens: tuple[int, ...]
    trained: tuple[bool, ...]
    truncated: bool = False
