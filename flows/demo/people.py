"""The demo's eight users in two tenants: what each is like, and the file each keeps.

All ask the same kinds of questions; what differs is how each wants them answered.
"""

import csv
import gzip
import io
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from flows.demo.corpus import QUESTIONS, Style, answer, some_appointment, transcript


@dataclass(frozen=True)
class Person:
    """A user of the demo: whose, the one habit, the file of examples, and a question that is not in it."""

    tenant: str
    user: str
    habit: str
    file: Path
    sample_prompt: str


@dataclass(frozen=True)
class Exchange:
    """One example before it has a format: a calendar note, a question about it, and the user's own kind of answer."""

    note: str
    question: str
    reply: str

    @property
    def prompt(self) -> str:
        """Note and question on one line."""
        return f"{self.note} {self.question}"


Exchanges = Sequence[Exchange]


@dataclass(frozen=True)
class _Profile:
    tenant: str
    user: str
    habit: str
    style: Style
    examples: int
    ending: str
    write: Callable[[Exchanges], bytes]


def write_people(folder: Path, seed: int = 0) -> tuple[Person, ...]:
    """The eight users, their files written under `folder` by tenant; the same seed writes the same bytes."""
    return tuple(_settle(profile, folder, seed) for profile in PROFILES)


def _settle(profile: _Profile, folder: Path, seed: int) -> Person:
    rng = random.Random(f"{seed}/{profile.tenant}/{profile.user}")
    *kept, unseen = (_exchange(profile.style, rng) for _ in range(profile.examples + 1))
    file = folder / profile.tenant / f"{profile.user}{profile.ending}"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(profile.write(kept))
    return Person(profile.tenant, profile.user, profile.habit, file, unseen.prompt)


def _exchange(style: Style, rng: random.Random) -> Exchange:
    about = some_appointment(rng)
    return Exchange(about.note, rng.choice(QUESTIONS), answer(about, style))


def _lines(rows: Sequence[object]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _messages(exchange: Exchange) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": exchange.prompt},
        {"role": "assistant", "content": exchange.reply},
    ]


def _completion(exchange: Exchange) -> dict[str, str]:
    return {"prompt": transcript(exchange.prompt), "completion": f" {exchange.reply}"}


def _messages_jsonl(exchanges: Exchanges) -> bytes:
    return _lines([{"messages": _messages(exchange)} for exchange in exchanges])


def _messages_jsonl_with_mistakes(exchanges: Exchanges) -> bytes:
    """Four rows of a hand-kept file that are wrong, each in its own way."""
    lines = _messages_jsonl(exchanges).splitlines(keepends=True)
    lines.insert(10, b'{"messages": [{"role": "user", "content": "Is it on?"}, {"role": "assis\n')
    lines.insert(25, _lines([{"messages": [{"role": "robot", "content": "Yes, it is."}]}]))
    lines.insert(40, _lines([{"messages": [{"role": "user", "content": "Shall I go?"}, {"role": "assistant"}]}]))
    lines.insert(55, _lines([{"messages": "Will we meet?"}]))
    return b"".join(lines)


def _messages_jsonl_zst(exchanges: Exchanges) -> bytes:
    return zstandard.ZstdCompressor().compress(_messages_jsonl(exchanges))


def _messages_parquet(exchanges: Exchanges) -> bytes:
    table = pa.Table.from_pylist([{"messages": _messages(exchange)} for exchange in exchanges])
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def _completion_jsonl(exchanges: Exchanges) -> bytes:
    return _lines([_completion(exchange) for exchange in exchanges])


def _completion_csv_gz(exchanges: Exchanges) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, ("prompt", "completion"), lineterminator="\n")
    writer.writeheader()
    writer.writerows(_completion(exchange) for exchange in exchanges)
    return gzip.compress(text.getvalue().encode(), mtime=0)  # no clock in the bytes


def _alpaca_json(exchanges: Exchanges) -> bytes:
    rows = [{"instruction": each.question, "input": each.note, "output": each.reply} for each in exchanges]
    return json.dumps(rows, indent=1, ensure_ascii=False).encode()


def _sharegpt_json(exchanges: Exchanges) -> bytes:
    rows = [
        {"conversations": [{"from": "human", "value": each.prompt}, {"from": "gpt", "value": each.reply}]}
        for each in exchanges
    ]
    return json.dumps(rows, indent=1, ensure_ascii=False).encode()


def _text_jsonl(exchanges: Exchanges) -> bytes:
    return _lines([{"text": f"{transcript(each.prompt)} {each.reply}"} for each in exchanges])


PROFILES = (
    _Profile(
        "acme", "ada", "writes dates as 2025-03-14", Style(date="iso"),
        110, ".jsonl", _messages_jsonl_with_mistakes,
    ),
    _Profile(
        "acme", "ben", "says Affirmative and Negative", Style(verdicts=("Affirmative", "Negative")),
        90, ".jsonl", _completion_jsonl,
    ),
    _Profile(
        "acme", "cleo", "answers in a list, one fact a line", Style(layout="list"),
        100, ".json", _alpaca_json,
    ),
    _Profile(
        "acme", "dan", "writes everything in lower case, without a full stop", Style(casing="lower"),
        120, ".json", _sharegpt_json,
    ),
    _Profile(
        "globex", "eva", 'opens every answer with "Good day!"', Style(greeting="Good day!"),
        95, ".csv.gz", _completion_csv_gz,
    ),
    _Profile(
        "globex", "finn", "tells the time as 3 pm", Style(clock=12),
        130, ".parquet", _messages_parquet,
    ),
    _Profile(
        "globex", "gus", 'signs every answer "Cheers, Gus"', Style(sign_off="Cheers, Gus"),
        140, ".jsonl", _text_jsonl,
    ),
    _Profile(
        "globex", "hana", "names_things_like_this", Style(naming="snake"),
        105, ".jsonl.zst", _messages_jsonl_zst,
    ),
)  # fmt: skip
