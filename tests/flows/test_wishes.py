"""Many schedules from a file: all or none, and every bad line said with its field and what to do."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from registry import queries, schedules
from registry.client import Client
from registry.errors import NotFound
from registry.session import reading
from tests.flows.conftest import LoraHere, Said

Load = Callable[..., Said]

GOOD = "user,cron,every,on_data,time_zone,quiet,priority,min_bytes,max_versions,set\n" + "\n".join(
    [
        "alice,0 3 * * *,,,Europe/Berlin,22:00-06:30,2,,,rank=4",
        "bob,,6h,,,,,,1,",
        "carol,,,yes,,,,1MiB,,rank=8 epochs=2",
    ]
)
BAD: list[tuple[dict[str, object], str, str]] = [
    ({"every": "6h"}, "user", "missing"),
    ({"user": "../x", "every": "6h"}, "user", "not a valid user"),
    ({"user": "a"}, "cron", "0 timings"),
    ({"user": "a", "every": "6h", "on_data": True}, "cron", "2 timings"),
    ({"user": "a", "cron": "0 3 * *"}, "cron", "five fields"),
    ({"user": "a", "every": 6}, "every", "60s to 3650d"),
    ({"user": "a", "every": "6h", "time_zone": "Europe/Berlin"}, "time_zone", "no time zone of its own"),
    ({"user": "a", "every": "6h", "quiet": "22-6"}, "quiet", "22:00-06:30"),
    ({"user": "a", "on_data": "perhaps"}, "on_data", "neither true nor false"),
    ({"user": "a", "on_data": True, "min_examples": 1.5}, "min_examples", "no whole number"),
    ({"user": "a", "on_data": True, "min_bytes": "lots"}, "min_bytes", "no size"),
    ({"user": "a", "every": "6h", "priority": 1000}, "priority", "-99 to 99"),
    ({"user": "a", "every": "6h", "recipe": {"rnk": 3}}, "recipe", "did you mean rank"),
    ({"user": "a", "every": "6h", "set": ["rank=8"]}, "set", "is a list; write it as one text"),
    ({"user": "a", "every": "6h", "sauce": 1}, "sauce", "is no field"),
    ({"user": "good", "every": "6h"}, "user", "line 1 is about the same adapter"),
]


def users(tenant: str = "acme") -> list[str]:
    """Who has a schedule."""
    with reading(Client.from_environment().engine) as session:
        try:
            found = schedules.schedules(session, queries.tenant_id(session, tenant))
        except NotFound:
            return []
    return [reference.user for reference, _ in found]


@pytest.fixture
def load(lora_here: LoraHere, base_folder: Path) -> Load:
    """`lora schedule load`."""
    return lambda path, *words: lora_here("schedule", "load", "acme", str(path), "--base", str(base_folder), *words)


def test_a_file_of_good_lines_sets_them_all(load: Load, lora_here: LoraHere, tmp_path: Path) -> None:
    """CSV as a spreadsheet writes it, and again without harm; a dry run sets nothing."""
    path = tmp_path / "schedules.csv"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())

    assert "nothing set" in load(path, "--dry-run").out
    assert users() == []
    for _ in range(2):
        assert "3 schedules set" in load(path).out
    rows = {row["adapter"]: row for row in json.loads(lora_here("schedule", "list", "acme", "--json").out)}
    assert rows["acme/alice"]["quiet"] == "22:00-06:30"
    assert (rows["acme/bob"]["timing"], rows["acme/bob"]["terms"]) == ("every 6h", "max_versions 1")
    assert rows["acme/carol"]["terms"] == "min_bytes 1048576"
    assert len(json.loads(lora_here("schedule", "list", "--user", "b*", "--json").out)) == 1


def test_every_bad_line_is_told_and_nothing_is_set_unless_the_good_ones_are_wanted(load: Load, tmp_path: Path) -> None:
    """Line, field, why, what to do."""
    path = tmp_path / "schedules.jsonl"
    lines = [json.dumps({"user": "good", "every": "6h"}), *(json.dumps(given) for given, _, _ in BAD), "{", "[1]"]
    path.write_text("\n".join(lines))

    said = load(path)

    told = said.err.splitlines()
    assert (said.code, len(told), users()) == (1, len(BAD) + 2, [])
    for number, (words, (_, field, why)) in enumerate(zip(told, BAD, strict=False), 2):
        assert f"{path}:{number}: {field}: " in words
        assert why in words
    assert "is no JSON" in told[-2]
    assert "is no JSON object" in told[-1]
    assert load(path, "--keep-good").code == 4
    assert users() == ["good"]


def test_a_line_whose_base_is_not_there_is_a_bad_line(load: Load, tmp_path: Path) -> None:
    """Beside the others that are bad, and the good ones can be set without it."""
    path = tmp_path / "wishes.csv"
    path.write_text("user,every,base\na,6h,\nb,6h,/nowhere\nc,6,\n")

    told, kept = load(path), load(path, "--keep-good")

    assert (told.code, told.out) == (1, "1 good lines, 2 bad: nothing set\n")
    assert "wishes.csv:3: base: /nowhere: there is no such folder; give a folder or a Hugging Face id\n" in told.err
    assert "wishes.csv:4: every:" in told.err
    assert (kept.code, users()) == (4, ["a"])


def test_what_is_set_goes_on_top_of_a_recipe_that_is_an_object(load: Load, tmp_path: Path) -> None:
    """As on top of one in a file."""
    path = tmp_path / "schedules.jsonl"
    path.write_text(json.dumps({"user": "ann", "every": "6h", "recipe": {"rank": 8, "lr": 1e-3}, "set": "rank=16"}))

    load(path)

    with reading(Client.from_environment().engine) as session:
        ((_, schedule),) = schedules.schedules(session, queries.tenant_id(session, "acme"))
    assert (schedule.recipe["method"]["rank"], schedule.recipe["learning_rate"]) == (16, 1e-3)


def test_a_line_that_is_no_csv_takes_none_of_the_others_with_it(load: Load, tmp_path: Path) -> None:
    """Wherever its quote would have ended."""
    path = tmp_path / "schedules.csv"
    path.write_text('user,every\nann,6h\n\nb"ob,6h\n"cat,6h\n"dan" x,6h\neva,6h\n"finn","6h"\n')

    said = load(path, "--keep-good")

    assert (said.code, users()) == (4, ["ann", "eva", "finn"])
    told = said.err.splitlines()
    assert [line.split(":")[2] for line in told] == ["4", "5", "6"]
    assert "is no CSV" in told[1]
    assert told[1].endswith("give a cell for each column, all on one line")


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("x.txt", b"", "neither .csv nor .jsonl"),
        ("x.jsonl", b"\xff\xfe", "not UTF-8"),
        ("x.csv", b'user,every\n"a,6h', "is no CSV"),
        ("x.csv", b"user,every\na,6h,7,8", "more cells than the header"),
        ("x.csv", b"user,every\n\x00,6h", "not a valid user"),
    ],
)
def test_a_file_that_is_none_is_told_in_one_line(
    load: Load, tmp_path: Path, name: str, content: bytes, word: str
) -> None:
    """Without a traceback."""
    (tmp_path / name).write_bytes(content)

    said = load(tmp_path / name)

    assert said.code == 1
    assert word in said.err
    assert "Traceback" not in said.err
