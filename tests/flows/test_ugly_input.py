"""Settings and words that nobody should give: one clear line, an exit code, and no traceback.

In this process, since each one of its own would cost seconds.
"""

import getpass
import json
import os
import subprocess
import sys
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from unittest.mock import Mock

import pytest
from sqlalchemy.engine import Engine

from flows.cli.printing import shown
from flows.factory import Factory, pin_base
from flows.settings import FactorySettings
from registry import jobs, queries
from registry.names import Reference
from registry.publishing import publish
from registry.session import open_database, reading, transaction
from registry.store import FolderStore
from tests.flows.conftest import LORA, ROOT, LoraHere, Said, write_user
from tests.registry.conftest import NOW, enqueue, finished


@pytest.fixture
def lora(lora_here: LoraHere) -> LoraHere:
    """The `lora` command in this process."""
    return lora_here


@pytest.fixture
def registry(home: Path) -> Engine:
    """A registry in LORA_HOME with its tables."""
    (home / "store").mkdir()
    return open_database(f"sqlite:///{home / 'registry.db'}")


@pytest.fixture
def published(registry: Engine, tmp_path: Path) -> None:
    """Alice's version 1, of a few bytes."""
    with transaction(registry) as session:
        enqueue(session, "acme/alice", 1)
        (job,) = jobs.claim(session, "worker", timedelta(hours=1), 1, NOW)
    publish(registry, FolderStore(tmp_path / "home" / "store"), job, finished(), NOW)


def refused(said: Said, code: int, *words: str) -> None:
    """The code is right, the words are there, and the answer is one line."""
    assert said.code == code, said
    assert said.err.count("\n") == 1, said.err
    assert all(word in said.err for word in words), said.err


SETTINGS: list[tuple[dict[str, str], tuple[str, ...], tuple[str, ...]]] = [
    ({"LORA_SLOTS": "abc"}, ("doctor",), ("LORA_SLOTS is 'abc'", "valid integer")),
    ({"LORA_SLOTS": "9999"}, ("doctor",), ("LORA_SLOTS is '9999'", "1024")),
    ({"LORA_LEASE_SECONDS": "999999999999999"}, ("doctor",), ("LORA_LEASE_SECONDS is '999999999999999'", "86400")),
    ({"LORA_HOME": "~nosuchuser/x"}, ("doctor",), ("LORA_HOME", "home of nobody")),
    ({"LORA_HOME": "/dev/null/x"}, ("setup",), ("/dev/null/x cannot be made", "set LORA_HOME to a folder")),
    ({"LORA_HOME": "/dev/null"}, ("setup",), ("/dev/null cannot be made", "set LORA_HOME to a folder")),
    ({"LORA_DATABASE_URL": "postgresql+psycopg://u:geheim@h:notaport/x"}, ("list",), ("port is not a number",)),
    ({"LORA_DATABASE_URL": "postgresql+psycopg://u:ge@heim:geheim@h/x"}, ("list",), ("port is not a number",)),
    ({"LORA_DATABASE_URL": "mysql://h/x?password=geheim"}, ("list",), ("use sqlite:///file",)),
    ({"LORA_DATABASE_URL": "sqlite:////nonexist/x.db"}, ("setup",), ("folder /nonexist is missing: make it",)),
    ({"LORA_STORE_URL": "s3://["}, ("setup",), ("store s3://[", "use s3://bucket/prefix")),
    ({"LORA_STORE_URL": "s3://bucket/a?b"}, ("setup",), ("'a?b' refused", "plain names")),
    ({"LORA_STORE_URL": "s3://bucket", "AWS_PROFILE": "nosuch"}, ("setup",), ("nosuch", "AWS_PROFILE")),
    ({"AWS_PROFILE": "nosuch"}, ("data", "check", "s3://bucket/x.jsonl"), ("nosuch", "AWS_PROFILE")),
]


@pytest.mark.parametrize(("environment", "words", "expected"), SETTINGS)
def test_a_wrong_setting_is_told_with_what_is_allowed(
    lora: LoraHere, environment: dict[str, str], words: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    """By the variable's name, and never with a password."""
    said = lora(*words, **environment)

    refused(said, 1, *expected)
    assert "heim" not in said.err


def test_a_blank_around_a_url_is_no_part_of_it(lora: LoraHere, tmp_path: Path) -> None:
    """With one before it an `s3://` was a folder here, and an end of line made another, empty database."""
    urls = {"LORA_DATABASE_URL": f"sqlite:///{tmp_path}/here.db\n", "LORA_STORE_URL": f" {(tmp_path / 's').as_uri()}"}

    assert lora("setup", **urls).code == 0

    assert (tmp_path / "here.db").is_file()
    assert (tmp_path / "s").is_dir()
    assert "not a store's URL" in lora("doctor", LORA_STORE_URL=" gs://bucket ").out


def test_a_file_that_is_no_database_is_told_and_left_alone(lora: LoraHere, tmp_path: Path) -> None:
    """Whoever mixes up two paths loses nothing."""
    path = tmp_path / "passwd"
    path.write_text("root:x:0:0:root:/root:/bin/bash\n" * 9)

    refused(lora("setup", LORA_DATABASE_URL=f"sqlite:///{path}"), 1, "something else than a database", "another file")
    assert path.read_text() == "root:x:0:0:root:/root:/bin/bash\n" * 9


@pytest.mark.usefixtures("registry")
def test_doctor_tries_whether_objects_are_overwritten_and_a_probe_does_not(
    lora: LoraHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An S3 that ignores the condition of a PUT says nothing of it; a probe writes nothing."""
    assert "never overwritten" in lora("doctor").out

    monkeypatch.setattr("flows.cli.system.overwrites", lambda _: True)
    said = lora("doctor")

    assert (said.code, "conditional PUT" in " ".join(said.out.split())) == (1, True)
    assert lora("doctor", "--ready").code == 0


@pytest.mark.usefixtures("registry")
def test_doctor_shows_the_settings_when_the_store_is_wrong(lora: LoraHere) -> None:
    """It is what it is for."""
    said = lora("doctor", LORA_STORE_URL="http://x", LORA_SLOTS="5")

    assert said.code == 1
    assert "LORA_SLOTS" in said.out
    assert "error: store http://x" in said.out


@pytest.mark.usefixtures("registry")
def test_doctor_says_that_a_device_is_not_here(lora: LoraHere) -> None:
    """No worker would begin; a probe asks for registry and store alone."""
    said = lora("doctor", "--json", LORA_DEVICE="potato")

    (told,) = [row["state"] for row in json.loads(said.out) if row["what"] == "device"]
    assert said.code == 1
    assert "error: device 'potato' is not here" in told
    assert "potato" not in lora("doctor", "--ready").out


def test_doctor_shows_no_password_that_a_url_holds_in_its_query(lora: LoraHere) -> None:
    """PostgreSQL takes it there as well."""
    said = lora("doctor", LORA_DATABASE_URL="postgresql+psycopg://127.0.0.1:1/x?password=geheim&connect_timeout=1")

    assert "error: database postgresql+psycopg://127.0.0.1:1/x" in said.out
    assert "geheim" not in said.out + said.err


LONG = "x" * 300
WORDS: list[tuple[tuple[str, ...], int, tuple[str, ...]]] = [
    (("data", "check", LONG), 1, ("cannot be read (File name too long)",)),
    (("data", "check", f"{LONG}/x.jsonl"), 1, ("cannot be read (File name too long)",)),
    (("data", "check", "~nosuchuser/x.jsonl"), 1, ("home of nobody",)),
    (("data", "check", ""), 1, ("'': names no file", "`.` is this folder")),
    (("data", "add", "acme/alice", ""), 1, ("'': names no file", "`.` is this folder")),
    (("train", "acme/alice", "--data", "", "--base", "B"), 1, ("'': names no file", "`.` is this folder")),
    (("train", "acme/alice", "--base", LONG), 1, ("base", "folder or a Hugging Face id")),
    (("train", "acme/alice", "--base", f"/{LONG}"), 1, ("base", "no such folder")),
    (("schedule", "set", "acme/alice", "--every", "9999999d", "--base", "B"), 1, ("60s to 3650d",)),
    (("schedule", "set", "acme/alice", "--cron", "", "--base", "B"), 1, ("schedule ''", "five fields")),
    (("schedule", "set", "acme/alice", "--cron", "R R * * *", "--base", "B"), 1, ("five fields",)),
    (("schedule", "set", "acme/alice", "--on-data", "--time-zone", "", "--base", "B"), 1, ("is no time zone",)),
    (("data", "add", "acme/alice:3", "x.jsonl"), 1, ("'acme/alice:3' is not a valid adapter", "without :3")),
    (("latest", "acme/alice:3"), 1, ("without :3 or @alias",)),
    (("history", "acme/alice@production"), 1, ("without :3 or @alias",)),
    (("schedule", "set", "acme/alice:3", "--every", "1d", "--base", "B"), 1, ("without :3 or @alias",)),
    (("schedule", "pause", "acme/alice:3"), 1, ("without :3 or @alias",)),
    (("schedule", "remove", "acme/alice@x"), 1, ("without :3 or @alias",)),
    (("rollback", "acme/alice:3"), 1, ("without :3 or @alias",)),
    (("rollback", "acme/alice", "--alias", "BAD ALIAS"), 1, ("'BAD ALIAS' is not a valid alias",)),
    (("pull", "acme/alice", "--to", "/dev/null/x"), 1, ("/dev/null/x cannot be written (", "new folder")),
    (("pull", "acme/alice", "--to", LONG), 1, ("cannot be written (File name too long)",)),
    (("queue", "list", "--reason", "\udcff"), 1, (r"'\udcff' is not a valid reason",)),  # a byte that is no UTF-8
    (("queue", "retry", "acme", "--reason", "\udcff"), 1, (r"'\udcff' is not a valid reason",)),
    (("schedule", "list", "--user", "\udcff*"), 1, ("is not a valid user",)),
    (("metrics", "--host", "\udcff"), 1, ("cannot be listened on",)),
]


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize(("words", "code", "expected"), WORDS)
def test_a_wrong_word_is_told_with_what_is_allowed(
    lora: LoraHere, base_folder: Path, words: tuple[str, ...], code: int, expected: tuple[str, ...]
) -> None:
    """Long paths, other people's homes, versions where an adapter is meant, moments that never come."""
    refused(lora(*[str(base_folder) if word == "B" else word for word in words]), code, *expected)


@pytest.mark.usefixtures("published")
def test_rolling_back_an_alias_named_in_the_reference_is_refused_with_the_option(lora: LoraHere) -> None:
    """Else `latest` would have moved instead."""
    said = lora("rollback", "acme/bob@production")

    assert said.code == 2
    assert "lora rollback acme/bob --alias production" in said.err


def test_what_is_no_text_in_a_prompt_is_asked_as_in_a_pipe(lora: LoraHere, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a mark in its place: no tokenizer takes it."""
    talk = Mock(said={}, ask=Mock(return_value=("yes", "")))
    monkeypatch.setattr("flows.talk.Talk.of", lambda *_: talk)

    assert lora("chat", "acme/alice", "-p", "caf\udce9").out == "yes\n"
    assert talk.ask.call_args.args[0] == "caf?"


def test_a_junk_base_is_told_by_its_file(lora: LoraHere, tmp_path: Path) -> None:
    """Before anything is enqueued."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(b"junk")

    refused(lora("train", "acme/alice", "--base", str(tmp_path / "base")), 1, "model.safetensors is no safetensors")


@pytest.mark.usefixtures("published")
def test_what_people_wrote_is_shown_as_they_wrote_it(lora: LoraHere) -> None:
    """In tables, lines and errors: rich takes [/x] for markup, with a traceback for one that nothing opened."""
    reason = "[red]till [/friday] :100:"

    assert reason in lora("protect", "acme", "canary", "--reason", reason).out
    assert reason in lora("promote", "acme/alice:1", "--alias", "canary").err
    assert reason in lora("pin", "acme/alice:1", "--reason", reason).out
    lora("promote", "acme/alice:1", "--alias", "beta", "--reason", reason)
    assert reason in lora("history", "acme/alice").out


def test_a_letter_that_no_terminal_knows_is_shown_escaped(lora: LoraHere, tmp_path: Path) -> None:
    """Half of a surrogate pair, as JSON may hold it."""
    path = write_user(tmp_path / "a.jsonl", "hello")
    path.write_text(path.read_text() + '{"tex\\ud800": 1}\n')

    said = lora("data", "check", str(path), "--max-bad", "1")

    assert said.code == 0
    assert "a.jsonl:61 tex\\ud800: is not a known field" in said.out


def test_a_file_that_may_not_be_read_is_told_by_name(lora: LoraHere, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the operating system refuses, and wherever."""

    def closed(factory: Factory, revision: str | None) -> None:
        raise PermissionError(13, "Permission denied", "/srv/x")

    monkeypatch.setattr(Factory, "set_up", closed)

    refused(lora("setup"), 1, "error: /srv/x: Permission denied")


def test_a_reader_that_has_seen_enough_is_no_error(registry: Engine) -> None:
    """`lora list --json | head -0`: nothing is said, and no traceback at Python's end."""
    with transaction(registry) as session:
        queries.ensure_adapter(session, Reference.parse("acme/alice"), NOW)
    reader, writer = os.pipe()
    os.close(reader)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    words = [*LORA, "list", "--json"]

    done = subprocess.run(words, cwd=ROOT, env=buffered, stdout=writer, stderr=subprocess.PIPE, text=True)

    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


CLOSED: list[tuple[tuple[str, ...], str, str]] = [
    (("list",), "stdout", "standard output is closed"),
    (("show", "acme/alice:1", "--json"), "stdout", "standard output is closed"),
    (("chat", "acme/alice:1"), "stdin", "standard input is closed; give a --prompt"),
    (("forget", "acme/alice"), "stdin", "standard input is closed; pass --yes"),
    (("pull", "--list", "-"), "stdin", "standard input is closed; name a file"),
    (("redeem", "-"), "stdin", "standard input is closed; name a file"),
]


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize(("words", "stream", "expected"), CLOSED)
def test_a_closed_stream_is_told(
    lora: LoraHere, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], stream: str, expected: str
) -> None:
    """As by `lora list >&-` and `lora redeem - <&-`: then Python has none; nothing is done."""
    with monkeypatch.context() as closed:
        closed.setattr(sys, stream, None)
        refused(lora(*words), 1, expected)

    assert lora("latest", "acme/alice").code == 0


@pytest.mark.parametrize(("words", "code"), [((), 0), (("--max-bad", "0.1"), 1)])
def test_the_setting_says_how_many_rows_may_be_bad_where_nobody_else_does(
    lora: LoraHere, tmp_path: Path, words: tuple[str, ...], code: int
) -> None:
    """For looking and for adding alike."""
    path = write_user(tmp_path / "a.jsonl", "hello", count=2)
    path.write_text(path.read_text() + "{}\n{}\n")

    for command in (("check",), ("add", "acme/alice")):
        assert lora("data", *command, str(path), *words, LORA_MAX_BAD_SHARE="0.6").code == code


def test_the_command_says_which_version_it_is(lora: LoraHere) -> None:
    """What anybody types first, and what a report of a bug begins with."""
    assert lora("--version") == Said(0, f"lora-factory {version('lora-factory')}\n", "")


@pytest.mark.parametrize(
    ("number", "words"),
    [(0.0, "0.000"), (0.5, "0.5000"), (999.96, "1000"), (1234.5, "1,234.5"), (1.5e6, "1,500,000.0")],
)
def test_a_large_number_is_written_out(number: float, words: str) -> None:
    """Device seconds of a month, and what they cost, are read by people who add them up."""
    assert shown(number) == words


@pytest.mark.usefixtures("published")
def test_where_no_terminal_is_a_row_is_a_line(lora: LoraHere, monkeypatch: pytest.MonkeyPatch) -> None:
    """`lora protect acme | grep ...` finds what a fold would have cut in two; COLUMNS folds all the same."""
    monkeypatch.delenv("COLUMNS")

    whole = lora("protect", "acme", "beta", "--reason", "x" * 90).out.splitlines()
    folded = lora("protect", "acme", COLUMNS="60").out.splitlines()

    assert any("beta" in line and "x" * 90 in line for line in whole)
    assert not any("x" * 90 in line for line in folded)


@pytest.mark.usefixtures("published")
def test_programs_are_told_sizes_in_bytes(lora: LoraHere) -> None:
    """By `lora list` and `show` as by `cache list` and `export`; people in larger units."""
    (listed,), shown_ = (
        json.loads(lora("list", "acme", "--json").out),
        json.loads(lora("show", "acme/alice", "--json").out),
    )

    assert isinstance(listed["size"], int)
    assert listed["size"] == shown_["size"]
    assert f"{listed['size']} B" in lora("list", "acme").out


@pytest.mark.parametrize("command", [("check",), ("add", "acme/alice")])
def test_of_a_refused_dataset_every_bad_row_is_told(lora: LoraHere, tmp_path: Path, command: tuple[str, ...]) -> None:
    """By line on standard output, or as JSON; why it is refused is one line on standard error."""
    path = write_user(tmp_path / "a.jsonl", "hello", count=2)
    path.write_text(path.read_text() + '{"prompt": "x"}\n' * 12)

    told, facts = lora("data", *command, str(path)), lora("data", *command, str(path), "--json")

    refused(told, 1, "12 of 14 rows are wrong, more than 10%", f"the first: {path}:3 completion: is missing")
    assert all(f"{path}:{line} completion: is missing" in told.out for line in range(3, 15))
    assert (facts.code, len(json.loads(facts.out)["problems"])) == (1, 12)


@pytest.mark.parametrize(("named", "revision"), [(None, "v2"), ("default", "v2"), ("other", "main")])
def test_the_revision_of_the_default_base_says_nothing_about_another(
    base_folder: Path, tmp_path: Path, named: str | None, revision: str
) -> None:
    """Which has no such revision, or a wrong one of that name."""
    default, other = str(base_folder), str(tmp_path / "other")
    (tmp_path / "other").symlink_to(base_folder)
    factory = Factory(FactorySettings(base=default, base_revision="v2"))

    assert pin_base(factory, {None: None, "default": default, "other": other}[named]).revision == revision


def test_a_list_that_is_cut_says_so(lora: LoraHere, registry: Engine) -> None:
    """On stderr: what a program reads stays JSON."""
    with transaction(registry) as session:
        for user in ("alice", "bob", "eve"):
            queries.ensure_adapter(session, Reference("acme", user), NOW)

    cut, whole = lora("list", "--limit", "2", "--json"), lora("list", "--limit", "3")

    assert cut.out.count('"adapter"') == 2
    assert cut.err == "... and more; raise --limit\n"
    assert "acme/eve" in whole.out
    assert whole.err == ""


@pytest.mark.usefixtures("published")
def test_whoever_has_no_name_moves_aliases_as_a_number(
    lora: LoraHere, registry: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container that runs under an arbitrary user id."""

    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr(getpass, "getuser", nameless)

    assert lora("promote", "acme/alice:1").code == 0
    with reading(registry) as session:
        tenant = queries.tenant_id(session, "acme")
        adapter = queries.holder(session, tenant, "alice", "default").adapter.id
        assert queries.alias_moves(session, tenant, adapter)[0].actor == f"uid {os.getuid()}"
    assert "production -> 1, moved by uid" in lora("history", "acme/alice").out
