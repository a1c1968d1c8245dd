"""`lora promote --all`, `rollback --all` and `protect`, as an operator uses them."""

from datetime import timedelta
from pathlib import Path

import pytest

from registry import jobs
from registry.publishing import publish
from registry.session import open_database, transaction
from registry.store import FolderStore
from tests.flows.conftest import LoraHere
from tests.registry.conftest import NOW, enqueue, finished


@pytest.fixture(autouse=True)
def _published(home: Path) -> None:
    """Three users of acme with two versions each, in LORA_HOME."""
    store = FolderStore(home / "store")
    store.set_up()
    engine = open_database(f"sqlite:///{home / 'registry.db'}")
    for user in ("ada", "alice", "bob"):
        with transaction(engine) as session:
            asked = enqueue(session, f"acme/{user}", 2)
        for one in asked:
            with transaction(engine) as session:
                (job,) = jobs.claim(session, "worker", timedelta(hours=1), 1, NOW, [one.job_id])
            publish(engine, store, job, finished(str(one.job_id)), NOW)


def test_a_fleet_goes_there_and_back_by_the_command_that_it_was_told(lora_here: LoraHere) -> None:
    """What `promote --all` says at its end takes it back."""
    for user in ("ada", "alice", "bob"):
        assert lora_here("promote", f"acme/{user}:1").code == 0

    there = lora_here("promote", "acme", "--all", "--where", "user=a*", "--reason", "release 7")
    assert (there.code, "production of 2 adapters is now at latest" in there.out) == (0, True), there
    assert "production -> 2 (from 1), moved by" in lora_here("history", "acme/ada").out

    back = lora_here(*there.out.strip().rpartition("back: lora ")[2].split())
    assert (back.code, "production of 2 adapters is back" in back.out) == (0, True), back
    assert "release 7" in lora_here("history", "acme/ada").out


def test_a_fleet_that_makes_an_alias_promises_no_way_back(lora_here: LoraHere) -> None:
    """Before the first move there is no version to go back to."""
    made = lora_here("promote", "acme", "--all", "--alias", "canary", "--where", "user=a*")
    more = lora_here("promote", "acme", "--all", "--alias", "canary", "--from", "latest")
    back = lora_here("rollback", "acme", "--all", "--alias", "canary")

    assert made.out == "acme: canary of 2 adapters is now at latest, 2 of them new, with nothing to go back to\n"
    assert (more.code, "1 of them new" in more.out, "; back:" in more.out) == (0, True, False)
    assert (back.code, "can be taken back: what it made has no version before it" in back.err) == (1, True)


def test_a_protected_alias_is_listed_refused_overridden_and_freed(lora_here: LoraHere) -> None:
    """By one user's move and by a fleet's."""
    assert "audit" in lora_here("protect", "acme", "production", "--reason", "audit").out

    for words in (["promote", "acme/ada:1"], ["promote", "acme", "--all"]):
        said = lora_here(*words)
        assert (said.code, "(audit); pass --override" in said.err) == (1, True), said
    assert lora_here("promote", "acme/ada:1", "--override").code == 0
    assert "no alias is protected" in lora_here("protect", "acme", "production", "--off").out


@pytest.mark.parametrize(
    "words",
    [
        ("list", "--limit", "9" * 20),
        ("rollback", "acme", "--all", "--move", "9" * 20),
        ("search", "acme", "--where", "since=0001-01-01T00:00:00+09:00"),
        ("search", "acme", "--where", "until=9999-12-31T23:59:59-10:00"),
        ("promote", "acme", "--all", "--where", "since=0001-01-01T00:00:00+09:00"),
        ("pull", "acme", "--all", "--where", "until=9999-12-31T23:59:59-10:00"),
    ],
)
def test_what_no_database_can_hold_is_refused(lora_here: LoraHere, words: tuple[str, ...]) -> None:
    """Numbers beyond 64 bits, and moments that are before or after all others in UTC."""
    said = lora_here(*words)

    assert said.code in (1, 2), said
    assert "Invalid value" in said.err or "allowed are" in said.err


def test_the_first_and_the_last_moment_are_moments(lora_here: LoraHere) -> None:
    """Whoever means always writes them."""
    always = ("since=0001-01-02T00:00:00+00:00", "until=9999-12-31")
    assert lora_here("search", "acme", "--where", always[0], "--where", always[1]).out.count("acme/ada:") == 2
    assert lora_here("status", "--since", "0001-01-01").code == 0


def test_conditions_without_all_are_refused(lora_here: LoraHere) -> None:
    """Else one user would move where many were meant."""
    said = lora_here("promote", "acme/ada:1", "--where", "user=a*")

    assert (said.code, "go with --all" in said.err) == (2, True)
