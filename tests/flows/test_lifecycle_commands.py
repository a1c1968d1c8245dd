"""`lora retain`, `pin`, `hold`, `gc`, `forget` and `forgotten`, as an operator uses them."""

import json
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
    """Alice of acme with three versions, in LORA_HOME."""
    store = FolderStore(home / "store")
    store.set_up()
    engine = open_database(f"sqlite:///{home / 'registry.db'}")
    with transaction(engine) as session:
        asked = enqueue(session, "acme/alice", 3)
    for one in asked:
        with transaction(engine) as session:
            (job,) = jobs.claim(session, "worker", timedelta(hours=1), 1, NOW, [one.job_id])
        publish(engine, store, job, finished(str(one.job_id)), NOW)


def test_a_dry_run_tells_what_a_collection_then_does(lora_here: LoraHere) -> None:
    """Pinned versions are not in it, and history tells which went."""
    assert "the newest 1" in lora_here("retain", "acme", "--newest", "1", "--reason", "cost").out
    assert "acme/alice:1" in lora_here("pin", "acme/alice:1", "--reason", "audit").out

    planned = json.loads(lora_here("gc", "--dry-run", "--json").out)
    done = json.loads(lora_here("gc", "acme", "--json").out)

    assert planned == done
    assert [row["what"] for row in done] == ["version", "dataset"]  # the data of the pinned one and the newest stay
    assert done[0]["whose"] == "acme/alice:2"
    states = {row["version"]: row["state"] for row in json.loads(lora_here("history", "acme/alice", "--json").out)}
    assert states == {3: "accepted", 2: "removed", 1: "accepted"}
    told = lora_here("pull", "acme/alice:2")
    assert (told.code, "acme/alice:2 was removed on" in told.err) == (3, True), told


def test_a_user_is_forgotten_once_nothing_holds_them(lora_here: LoraHere) -> None:
    """With a receipt that whoever knows the name can ask for."""
    lora_here("hold", "acme/alice", "--reason", "case 17")
    held = lora_here("forget", "acme/alice", "--yes")
    assert (held.code, "case 17" in held.err) == (1, True), held
    assert lora_here("forgotten", "acme/alice").code == 3
    lora_here("hold", "acme/alice", "--off", "--reason", "closed")

    done = lora_here("forget", "acme/alice", "--yes", "--reason", "request 4711")

    receipt = json.loads(done.out)
    assert (done.code, receipt["deleted"]["versions"]["count"], receipt["why"]) == (0, 3, "request 4711")
    assert json.loads(lora_here("forgotten", "acme/alice", "--json").out) == [receipt]
    assert lora_here("latest", "acme/alice").code == 3
    assert lora_here("forget", "acme/bob", "--yes").code == 3


UGLY = [
    ("retain", "acme", "--newest", "0"),
    ("retain", "acme", "--everything", "--days", "3"),
    ("retain", "../x"),
    ("pin", "acme/alice:99"),
    ("pin", "acme", "--off"),
    ("hold", "acme/zed", "--reason", "x"),
    ("hold", "acme/alice", "--off"),
    ("hold", "acme/alice", "--off", "--reason", "x"),
    ("hold", "acme/a/b", "--reason", "x"),
    ("gc", "nobody"),
    ("forget", "acme", "--yes"),
    ("forget", "acme/alice:3", "--yes"),
    ("forget", "acme/alice", "--yes", "--reason", "for Alice-Smith"),
    ("forget", "acme/alice", "--yes", "--reason", "two\nlines"),
    ("forgotten", "acme/\u202ealice"),
]


@pytest.mark.parametrize("words", UGLY)
def test_what_cannot_be_meant_is_refused_and_changes_nothing(lora_here: LoraHere, words: tuple[str, ...]) -> None:
    """In plain words, without a traceback."""
    said = lora_here(*words)

    assert (said.code > 0, "Traceback" in said.err, bool(said.err)) == (True, False, True), said
    assert lora_here("latest", "acme/alice").code == 0
