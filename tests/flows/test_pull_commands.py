"""`lora pull` of many, and `lora cache`, as an operator uses them."""

import io
import json
import os
import shutil
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from registry import jobs
from registry.publishing import publish
from registry.session import open_database, transaction
from registry.store import FolderStore
from tests.flows.conftest import LoraHere
from tests.registry.conftest import NOW, enqueue, finished

USERS = ("ada", "alice", "bob")


@pytest.fixture(autouse=True)
def _published(home: Path) -> None:
    """A version for each of three users of acme, in LORA_HOME."""
    store = FolderStore(home / "store")
    store.set_up()
    engine = open_database(f"sqlite:///{home / 'registry.db'}")
    for user in USERS:
        with transaction(engine) as session:
            (asked,) = enqueue(session, f"acme/{user}", 1)
        with transaction(engine) as session:
            (job,) = jobs.claim(session, "worker", timedelta(hours=1), 1, NOW, [asked.job_id])
        publish(engine, store, job, finished(user), NOW)
    engine.dispose()


def damage(tmp_path: Path, user: str) -> None:
    """Change what the store holds of a user."""
    for path in (tmp_path / "home" / "store").rglob("weights.bin"):
        if path.read_text() == user:
            path.write_text(user[::-1] + "!")


def test_a_tenant_is_pulled_and_then_from_the_cache(lora_here: LoraHere) -> None:
    """A line for each on stdout, what it came to on stderr."""
    first, second = lora_here("pull", "acme", "--all"), lora_here("pull", "acme", "--all", "--where", "user=a*")

    assert [line.split("@")[0] for line in first.out.splitlines()] == [f"acme/{user}" for user in USERS]
    for user, line in zip(USERS, first.out.splitlines(), strict=True):
        assert (Path(line.split()[-1]) / "weights.bin").read_text() == user
    assert "3 pulled, 0 of them from the cache; 0 failed" in first.err
    assert "2 pulled, 2 of them from the cache; 0 failed; 0 B fetched" in second.err
    assert (first.code, second.code) == (0, 0)


def test_a_list_is_pulled_and_a_bad_one_stops_no_other(
    lora_here: LoraHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a file, or from stdin; exit code 4 says that some failed, 1 that all did."""
    damage(tmp_path, "alice")
    listed = tmp_path / "list"
    listed.write_text("# tonight's\n\nacme/ada\n  acme/alice:1\nacme/eve\nacme/bob@latest\n")

    said = lora_here("pull", "--list", str(listed), "--json")
    rows = json.loads(said.out)
    assert (said.code, [bool(row["error"]) for row in rows]) == (4, [False, True, True, False])
    assert "2 pulled, 0 of them from the cache; 2 failed" in said.err
    assert "acme/alice:1: object" in said.err
    assert "acme/eve: there is no version" in said.err or "acme/eve@latest: there is no version" in said.err

    monkeypatch.setattr(sys, "stdin", io.StringIO("acme/alice\n"))
    assert lora_here("pull", "--list", "-").code == 1


def test_a_list_may_begin_with_the_mark_that_some_editors_write(
    lora_here: LoraHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And end its lines as they do: the first reference was refused."""
    (tmp_path / "list").write_text("\ufeffacme/ada\r\nacme/bob\r\n", encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeffacme/ada\n"))

    assert lora_here("pull", "--list", str(tmp_path / "list")).code == 0
    assert lora_here("pull", "--list", "-").code == 0


def test_a_copy_is_whole_or_not_there(lora_here: LoraHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk leaves nothing that an engine could take for an adapter, and the name is free to try again."""

    def fill(source: Path, to: Path) -> Path:
        to.mkdir()
        (to / "manifest.json").write_bytes(b"{")
        raise shutil.Error([(str(source), str(to), "[Errno 28] No space left on device")])

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copytree", fill)
        said = lora_here("pull", "acme/ada", "--to", str(tmp_path / "models" / "ada"))
    assert (said.code, os.listdir(tmp_path / "models")) == (1, [])
    assert "models/ada cannot be written ([Errno 28] No space left on device)" in said.err

    assert lora_here("pull", "acme/ada", "--to", str(tmp_path / "models" / "ada")).code == 0
    assert os.listdir(tmp_path / "models") == ["ada"]
    assert "manifest.json" in os.listdir(tmp_path / "models" / "ada")


NONSENSE = [
    (["pull"], 2, "give references"),
    (["pull", "--all"], 2, "--all takes one tenant"),
    (["pull", "acme", "globex", "--all"], 2, "--all takes one tenant"),
    (["pull", "acme", "--all", "--list", "x"], 2, "--all takes one tenant"),
    (["pull", "acme", "--all", "--to", "x"], 2, "--to takes one version"),
    (["pull", "acme/ada", "acme/bob", "--to", "x"], 2, "--to takes one version"),
    (["pull", "acme/ada", "--alias", "production"], 2, "go with --all"),
    (["pull", "acme/ada", "--where", "user=a"], 2, "go with --all"),
    (["pull", "acme", "--all", "--where", "colour=red"], 1, "not a valid condition"),
    (["pull", "acme", "--all", "--alias", "No Alias"], 1, "not a valid alias"),
    (["pull", "acme", "--all", "--alias", "production"], 3, "there is no version"),
    (["pull", "globex", "--all"], 3, "there is no tenant"),
    (["pull", "a/../b", "--all"], 1, "not a valid tenant"),
    (["pull", "--list", "/nowhere/list"], 1, "/nowhere/list"),
    (["pull", "--list", "\0"], 1, "lists no references"),
    (["pull", "--list", "/dev/null"], 3, "there is no version"),
    (["pull", "acme/ada", "\x1b[31m"], 4, "not a valid reference"),
    (["cache"], 2, ""),
    (["cache", "clear", "--keep", "much"], 2, "is no size"),
    (["cache", "clear", "--keep", "-5"], 2, "is no size"),
    (["cache", "clear", "--keep", "\x1b[31m"], 2, "is no size"),
]


def test_what_makes_no_sense_is_refused(lora_here: LoraHere) -> None:
    """What, why and what to do; no traceback, nothing that steers a terminal."""
    for words, code, told in NONSENSE:
        said = lora_here(*words)

        assert (said.code, told in " ".join((said.err + said.out).replace("│", " ").split())) == (code, True), said
        assert "Traceback" not in said.err
        assert not set(said.err + said.out) & set("\x00\x07\x1b"), said


def test_the_cache_is_listed_and_emptied(lora_here: LoraHere, tmp_path: Path) -> None:
    """What was asked for last stays longest."""
    assert "nothing has been pulled yet" in lora_here("cache", "list").out
    lora_here("pull", "acme", "--all")
    newest = lora_here("pull", "acme/ada").out.strip()

    rows = json.loads(lora_here("cache", "list", "--json").out)
    assert len(rows) == 3
    assert rows[-1]["folder"] == newest
    kept = lora_here("cache", "clear", "--keep", str(rows[-1]["size"]))
    assert "removed 2 of 3 versions" in kept.out
    assert Path(newest).is_dir()
    assert "removed 1 of 1 versions" in lora_here("cache", "clear").out
    assert list((tmp_path / "home" / "pulled").glob("[!.]*")) == []


def test_the_limit_of_the_cache_is_a_setting(lora_here: LoraHere) -> None:
    """A wrong one is refused by name."""
    assert "of 20.0 MiB" in lora_here("cache", "list", LORA_CACHE_SIZE="20MiB").err
    said = lora_here("pull", "acme/ada", LORA_CACHE_SIZE="lots")

    assert (said.code, "LORA_CACHE_SIZE" in said.err) == (1, True), said
    assert lora_here("pull", "acme/ada", LORA_CACHE_SIZE="-1").code == 1
