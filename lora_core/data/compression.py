"""Bytes out of a file, plain, gzip or zstd: whole or an error, and never more of them than allowed."""

import gzip
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, Protocol

from lora_core.errors import DatasetRefused

NAMES = {".gz": "gzip", ".zst": "zstd"}
_STEP = 1 << 10  # of zstd at a time: at most 32 MiB come out of it, its blocks being 128 KiB from 4 bytes


class Stream(Protocol):
    """What is read from, piece by piece; no bytes at the end."""

    def read(self, size: int, /) -> bytes:
        """The next piece, of at most `size` bytes."""


class Bounded:
    """A stream that refuses to give more than a number of bytes: a decompression bomb ends here."""

    def __init__(self, name: str, stream: Stream, most: int) -> None:
        self._name, self._stream, self._left, self._most = name, stream, most, most

    def read(self, size: int, /) -> bytes:
        """The next piece.  Raises DatasetRefused after too many bytes."""
        piece = self._stream.read(size)
        self._left -= len(piece)
        if self._left < 0:
            why = f"has more than {self._most:,} bytes once decompressed"
            raise DatasetRefused(self._name, why, "split it by user")
        return piece


@contextmanager
def decompressed(raw: BinaryIO, compression: str) -> Iterator[Stream]:
    """What a file holds.  Reading raises EOFError where the compressed data is cut off."""
    if compression == ".gz":
        with gzip.GzipFile(fileobj=raw) as stream:
            yield stream
    else:
        yield _Zstd(raw) if compression == ".zst" else raw


class _Zstd:
    """A zstd stream, frame by frame: zstandard's own reader takes one that is cut off for whole."""

    def __init__(self, raw: BinaryIO) -> None:
        self._pieces, self._piece = _unzipped(raw), io.BytesIO()

    def read(self, size: int, /) -> bytes:
        while not (read := self._piece.read(size)) and (piece := next(self._pieces, b"")):
            self._piece = io.BytesIO(piece)
        return read


def _unzipped(raw: BinaryIO) -> Iterator[bytes]:
    import zstandard  # an extra: only those who bring zstd need it

    data = raw.read(_STEP)
    while data:
        frame = zstandard.ZstdDecompressor().decompressobj()
        while not frame.eof:
            if not data:
                raise EOFError("it ends inside a frame")
            if piece := frame.decompress(data):
                yield piece
            data = frame.unused_data or raw.read(_STEP)
