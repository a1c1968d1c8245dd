"""Hostile dataset files: valid ones of each format spoilt, and bombs of each kind."""

import csv
import gzip
import io
import json
import os
import random
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import zstandard

from tests.hostile.oddities import MUTATIONS, dumped, odd

ROWS: list[dict[str, object]] = [
    {"prompt": "q1 é", "completion": 'a, 1\n"x"'}, {"prompt": "q2", "completion": "b"}, {"prompt": "",
    "completion": "c"},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
    {"instruction": "do", "input": "this", "output": "done"}, {"text": "plain"},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"prompt": "p", "chosen": "good", "rejected": "bad"},
]  # fmt: skip
PLAIN = [row for row in ROWS if set(row) == {"prompt", "completion"}]


def jsonl(rows: list[dict[str, object]]) -> bytes:
    """One object a line."""
    return b"\n".join(map(dumped, rows)) + b"\n"


def cells(rows: list[dict[str, object]], comma: str = ",") -> bytes:
    """A heading and a line a row."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ("prompt", "completion"), delimiter=comma)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def table(columns: dict[str, object], **settings: object) -> bytes:
    """A Parquet file."""
    sink = arrow.BufferOutputStream()
    parquet.write_table(arrow.table(columns), sink, **settings)
    return bytes(sink.getvalue())


def valid(extension: str) -> bytes:
    """What such a file holds when nothing is wrong."""
    return {
        ".jsonl": lambda: jsonl(ROWS),
        ".json": lambda: dumped(ROWS),
        ".csv": lambda: cells(PLAIN),
        ".tsv": lambda: cells(PLAIN, "\t"),
        ".parquet": lambda: table({key: [row[key] for row in PLAIN] for key in ("prompt", "completion")}),
    }[extension]()


def packed(data: bytes, compression: str) -> bytes:
    """As it is, gzip or zstd."""
    if compression == ".gz":
        return gzip.compress(data, 1)
    return zstandard.compress(data) if compression == ".zst" else data


class Spoiler:
    """Writes one hostile file or folder below a place, and gives back its path."""

    def __init__(self, place: Path, generator: random.Random) -> None:
        self.place, self.generator = place, generator

    def mutate(self) -> Path:
        """Bytes changed, cut, dropped, doubled or put in; of what is compressed, before or after."""
        extension = self.generator.choice([".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl"])
        compression = self.generator.choice(["", "", ".gz", ".zst"])
        mutation, data = self.generator.choice(MUTATIONS), valid(extension)
        if self.generator.random() < 0.5:
            return self._file(extension, mutation(data, self.generator), compression)
        return self._raw(extension + compression, mutation(packed(data, compression), self.generator))

    def odd_values(self) -> Path:
        """Fields of every format with values that nobody should send."""
        rows = json.loads(json.dumps(ROWS))
        for row in rows:
            if self.generator.random() < 0.5:
                row[self.generator.choice([*row, "extra", "\ud800", "\x1b[31m"])] = odd(self.generator)
            turns = row.get("messages")
            for turn in turns if isinstance(turns, list) else []:
                if isinstance(turn, dict) and self.generator.random() < 0.3:
                    turn[self.generator.choice(["role", "content", "name"])] = odd(self.generator)
        return self._file(*self.generator.choice([(".jsonl", jsonl(rows)), (".json", dumped(rows))]))

    def odd_lines(self) -> Path:
        """Lines that are no rows among those that are."""
        size = self.generator.choice([100, 5_000, 100_000])
        lines = [
            b"[" * size, b'{"a":' * size, b'{"text": "' + b"x" * (20 * size) + b'"}', b'{"text": "\xff"}', b"\0" * size,
            b'{"text": "a\\u0000b"}', b'{"text": "\\ud83d"}', b'{"text": "\\ud83d\\ude00"}', b'{"text": NaN}',
            b"9" * size,
            b'{"text": "a", "text": "b"}', b"{" + b",".join(b'"k%d":0' % n for n in range(size)) + b"}", b"null",
            b'"' * size,
            b'{"' + b"k" * size + b'": 1}', b'{"text": "' + b'\\"' * size, b"\xef\xbb\xbf" + jsonl(PLAIN), b"\r", b"",
            jsonl(PLAIN).decode().encode("utf-16"), b'{"messages": [' + b"{}," * size + b"{}]}", b"{'text': 'a'}",
        ]  # fmt: skip
        body = [self.generator.choice(lines) for _ in range(3)]
        return self._file(".jsonl", b"\n".join([jsonl(ROWS), *body, jsonl(PLAIN)]))

    def odd_json(self) -> Path:
        """A document that is deep, endless, empty, or no list of rows."""
        size = self.generator.choice([10, 10_000, 200_000])
        texts = [
            b"[" * size, b"[" + b"{}," * size + b"{}]", b"[" + b"[]," * size + b"[]]", b"[" + b"0," * size + b"0]",
            b'[{"text": "a"},]', b'[{"text": "a"} {"text": "b"}]', b'[{"text": "a"}] x', b"[,]", b"[]", b"", b"null",
            b'{"text": "a"}', b"[" + b'"' * size, b'["' + b'\\"' * size, b"[{" + b'"a":1,' * size + b'"b":2}]',
            b"[[" + b"{}," * size + b"{}]]", b"]" * size, b"\xef\xbb\xbf[]",
            b'[{"text": "' + b"x" * (4 * size) + b'"}]',
        ]  # fmt: skip
        return self._file(".json", self.generator.choice(texts))

    def odd_cells(self) -> Path:
        """Headings without end, quotes without end, NULs, cells without end."""
        size = self.generator.choice([50, 5_000, 200_000])
        texts = [
            b",".join(b"c%d" % n for n in range(size)) + b"\n" + b"x\n" * size, b'prompt,completion\n"' + b"a\n" * size,
            b'prompt,completion\n"' + b'a\n","' * size, b"prompt,completion\n" + b"," * size, b"prompt,prompt\na,b\n",
            b"prompt,completion\na\0b,c\n", b'prompt,completion\n"' + b"x" * (10 * size) + b'",b\n', b"prompt\r" * size,
            b"\n" * size, b"prompt,completion\n\xff\xfe,b\n", b"messages\n" + b"[" * size + b"\n", b'"' * size,
            b",\n,\n",
            b'messages\n"[{""role"":""user""}]"\n', cells(PLAIN).decode().encode("utf-16"),
            b"\xef\xbb\xbf" + cells(PLAIN),
        ]  # fmt: skip
        return self._file(self.generator.choice([".csv", ".tsv"]), self.generator.choice(texts))

    def odd_table(self) -> Path:
        """Tables that are larger than their file, of types that are no text, or with two columns of one name."""
        long, count = "x" * self.generator.choice([1 << 10, 1 << 20, 1 << 22]), self.generator.choice([200, 20_000])
        indices = arrow.array([0] * count, arrow.int32())
        repeated = arrow.DictionaryArray.from_arrays(indices, arrow.array([long]))
        offsets = arrow.array([0, count], arrow.int32())
        deep: object = "x"
        for _ in range(self.generator.choice([5, 60])):
            deep = [deep]
        made = [
            lambda: table({"text": repeated}), lambda: table({"text": ["a"] * count, "n": [float("nan")] * count}),
            lambda: table({"text": arrow.ListArray.from_arrays(offsets, repeated)}), lambda: table({"text": [deep]}),
            lambda: table({"text": [b"\xff\0"] * 5}), lambda: table({"text": arrow.array([1, 2],
            arrow.timestamp("us"))}),
            lambda: table({"text": arrow.array([{"a": None}, {"a": "b"}])}),
            lambda: table({"text": arrow.nulls(count)}),
            lambda: table({"text": [long] * 20}, compression="zstd"),
            lambda: table({f"c{n}": [n] for n in range(2000)}),
            lambda: _renamed(table({"text": ["a"], "texu": ["b"]})), lambda: b"PAR1" + b"\xff" * 4 + b"PAR1",
            lambda: b"PAR1" + bytes(1 << 20) + (1 << 20).to_bytes(4, "little") + b"PAR1",
        ]  # fmt: skip
        return self._file(".parquet", self.generator.choice(made)())

    def odd_compression(self) -> Path:
        """Bombs, frames without end, windows that nobody has memory for, and archives that break off."""
        big = self.generator.choice([1 << 16, 1 << 24]) if self.generator.random() < 0.95 else 1 << 26
        repeat = self.generator.choice([1, 3, 80 if self.generator.random() < 0.1 else 2])
        letter = self.generator.choice([b"\n", b"x", b"["])
        wide = zstandard.ZstdCompressor(
            compression_params=zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)
        ).compressobj()
        skippable = b"\x50\x2a\x4d\x18" + (0).to_bytes(4, "little")
        made = [
            (".gz", gzip.compress(letter * big, 9) * repeat), (".zst", zstandard.compress(letter * big, 3) * repeat),
            (".zst", wide.compress(letter * 1000) + wide.flush()), (".zst", skippable * self.generator.choice([10,
            20_000])),
            (".gz", gzip.compress(b"") * self.generator.choice([10, 20_000])), (".gz",
            gzip.compress(jsonl(ROWS)) + b"junk"),
            (".gz", b"\x1f\x8b\x08\x08" + bytes(6) + b"n" * (1 << 20)), (".zst", b"\x28\xb5\x2f\xfd" + b"\xff" * 60),
            (".gz", zstandard.compress(jsonl(ROWS))), (".zst", gzip.compress(jsonl(ROWS))), (".gz", b""), (".zst", b""),
        ]  # fmt: skip
        compression, data = self.generator.choice(made)
        return self._raw(self.generator.choice([".jsonl", ".json", ".csv", ".parquet"]) + compression, data)

    def odd_place(self) -> Path:
        """Folders with links that lead out, pipes, loops, too many files, or names that lie about what they hold."""
        kind = self.generator.choice(["out", "loop", "pipe", "many", "lie", "device", "parent", "name"])
        folder = self.place / "folder"
        folder.mkdir()
        (folder / "a.jsonl").write_bytes(jsonl(ROWS))
        if kind == "many":
            for number in range(1_100):
                (folder / f"{number}.jsonl").touch()
        elif kind == "lie":
            for end in (".csv", ".json", ".parquet", ".jsonl.gz", ".tsv"):
                if self.generator.random() < 0.3:
                    (folder / f"b{end}").write_bytes(jsonl(ROWS))
        elif kind == "pipe":
            os.mkfifo(folder / "b.jsonl")
        elif kind == "name":
            (folder / "b\x1b[31m\n\udcff.jsonl").write_bytes(b"nonsense\n" * 5)
        else:
            target = {"out": "/etc/hostname", "loop": "b.jsonl", "device": "/dev/zero", "parent": ".."}[kind]
            (folder / "b.jsonl").symlink_to(target)
        return folder

    def _file(self, extension: str, data: bytes, compression: str | None = None) -> Path:
        chosen = self.generator.choice(["", "", "", ".gz", ".zst"]) if compression is None else compression
        return self._raw(extension + chosen, packed(data, chosen))

    def _raw(self, end: str, data: bytes) -> Path:
        path = self.place / f"x{end}"
        path.write_bytes(data)
        return path


KINDS = (
    "mutate", "mutate", "mutate", "odd_values", "odd_values", "odd_lines", "odd_json", "odd_cells", "odd_table",
    "odd_compression", "odd_place",
)  # fmt: skip


def _renamed(data: bytes) -> bytes:
    """The second column's name is the first one's."""
    return data.replace(b"texu", b"text")


def make_file(place: Path, generator: random.Random) -> tuple[str, Path]:
    """A hostile file or folder in a new place; returns its kind and its path."""
    place.mkdir()
    kind = generator.choice(KINDS)
    path: Path = getattr(Spoiler(place, generator), kind)()
    return kind, path
