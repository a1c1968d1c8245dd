"""What a reference comes to, and what becomes of it when it is pulled."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from registry.names import Reference


@dataclass(frozen=True)
class Resolved:
    """What a reference means now: one version, and where its files lie."""

    reference: Reference
    number: int
    state: str
    served_name: str
    prefix: str
    sha256: str  # of the manifest
    files: Mapping[str, Mapping[str, int | str]]  # file name to sha256 and size

    @cached_property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(int(facts["size"]) for facts in self.files.values())


@dataclass(frozen=True)
class Pulled:
    """What became of one of many references: the folder of its files, or why there is none."""

    reference: Reference | str  # a string where it cannot be read
    folder: Path | None = None
    number: int = 0
    fetched: int = 0  # bytes that came from the store; 0 where the cache had it
    error: Exception | None = None
