"""What an alias points to, and how it got there."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.engine import Engine

from registry import aliases, queries
from registry.errors import AliasMoved, NameRefused, NotFound, PromotionRefused
from registry.names import Reference
from registry.publishing import publish
from registry.session import reading, transaction
from registry.store import FolderStore
from tests.registry.conftest import NOW, Claim, finished

Move = Callable[..., int]


@pytest.fixture
def three(engine: Engine, claim: Claim, tmp_path: Path) -> None:
    """Alice has versions 1 and 3 accepted, and 2 refused."""
    for job, accepted in zip(claim(3), (True, False, True), strict=True):
        publish(engine, FolderStore(tmp_path), job, finished(str(job.id), accepted), NOW)


@pytest.fixture
def move(engine: Engine) -> Move:
    """Promote or roll back, and say which version it gave."""

    def moved(reference: str, alias: str = "production", back: bool = False, reason: str = "test", **more: Any) -> int:
        wanted = Reference.parse(reference)
        with transaction(engine) as session:
            tenant = queries.tenant_id(session, wanted.tenant)
            act = aliases.rollback if back else aliases.promote
            return act(session, tenant, wanted, alias, actor="me", reason=reason, now=NOW, **more).number

    return moved


@pytest.mark.usefixtures("three")
def test_an_alias_is_made_and_moved(move: Move, engine: Engine) -> None:
    """And every move is remembered, with who and why."""
    assert [move("acme/alice:1"), move("acme/alice:3"), move("acme/alice@production", "canary")] == [1, 3, 3]

    with reading(engine) as session:
        tenant = queries.tenant_id(session, "acme")
        adapter = queries.holder(session, tenant, "alice", "default").adapter.id
        assert queries.aliases(session, tenant, adapter) == {"canary": 3, "latest": 3, "production": 3}
        moves = [step for step in queries.alias_moves(session, tenant, adapter) if step.name == "production"]
    assert [(step.actor, step.reason, step.from_id is None) for step in moves] == [
        ("me", "test", False),
        ("me", "test", True),
    ]


@pytest.mark.usefixtures("three")
def test_going_back_goes_back_step_by_step(move: Move) -> None:
    """Twice back is two versions back, not to and fro."""
    for reference in ("acme/alice:1", "acme/alice:3", "acme/alice:1"):
        move(reference)

    assert [move("acme/alice", back=True), move("acme/alice", back=True)] == [3, 1]
    with pytest.raises(PromotionRefused, match="no earlier version"):
        move("acme/alice", back=True)


@pytest.mark.usefixtures("three")
def test_going_back_goes_by_what_was_done_and_not_by_the_words_that_were_said(move: Move, engine: Engine) -> None:
    """A reason is the user's own: it may begin with anything, and it is kept as it is."""
    move("acme/alice:1")
    move("acme/alice:3", reason="rolled back the other one")

    assert move("acme/alice", back=True, reason="by hand") == 1
    with reading(engine) as session:
        tenant = queries.tenant_id(session, "acme")
        adapter = queries.holder(session, tenant, "alice", "default").adapter.id
        last = queries.alias_moves(session, tenant, adapter)[0]
    assert (last.kind, last.reason) == ("rolled back", "by hand")


@pytest.mark.usefixtures("three")
def test_what_the_gate_refused_needs_force(move: Move) -> None:
    """And the message says why it was refused."""
    with pytest.raises(PromotionRefused, match="because.*--force"):
        move("acme/alice:2")

    assert move("acme/alice:2", force=True) == 2


@pytest.mark.usefixtures("three")
def test_latest_rolls_back_to_the_accepted_version_before(move: Move) -> None:
    """The quick way out of a bad night."""
    assert move("acme/alice", "latest", back=True) == 1


@pytest.mark.usefixtures("three")
@pytest.mark.parametrize(
    "reference", ["acme/alice:4", "acme/alice@nowhere", "acme/bob", "acme/alice/notes", "globex/alice"]
)
def test_what_does_not_exist_is_named(move: Move, reference: str) -> None:
    """With where to look."""
    with pytest.raises(NotFound):
        move(reference)


@pytest.mark.usefixtures("three")
@pytest.mark.parametrize("back", [False, True])
def test_an_aliases_name_is_checked(move: Move, back: bool) -> None:
    """It stands in references, so it must be able to."""
    with pytest.raises(NameRefused):
        move("acme/alice:1", "a:b", back=back)


@pytest.mark.usefixtures("three")
def test_a_move_is_made_only_from_where_it_was_expected(engine: Engine, move: Move) -> None:
    """Compare-and-set: who looked before somebody else moved it is told, and nothing happens."""
    assert move("acme/alice:1", expected=0) == 1
    assert move("acme/alice:3", expected=1) == 3

    with pytest.raises(AliasMoved, match="points at version 3, not at version 1"):
        move("acme/alice:1", expected=1)
    with pytest.raises(AliasMoved, match="not at version 1"):
        move("acme/alice", back=True, expected=1)
    with pytest.raises(AliasMoved, match="nowhere yet"):
        move("acme/alice:1", "canary", expected=1)

    assert move("acme/alice", back=True, expected=3) == 1
    with reading(engine) as session:
        tenant = queries.tenant_id(session, "acme")
        adapter = queries.holder(session, tenant, "alice", "default").adapter.id
        assert queries.aliases(session, tenant, adapter) == {"latest": 3, "production": 1}


@pytest.mark.usefixtures("three")
def test_of_two_moves_at_once_the_second_sees_the_first(engine: Engine, move: Move) -> None:
    """Going back reads the history only once nobody else can add to it: each of many takes one step."""
    for _ in range(8):
        move("acme/alice:1")
        move("acme/alice:3")

    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(lambda _: move("acme/alice", back=True), range(8)))

    assert sorted(seen) == [1, 1, 1, 1, 3, 3, 3, 3]
    with pytest.raises(PromotionRefused):
        for _ in range(8):
            move("acme/alice", back=True)


@pytest.mark.usefixtures("three")
def test_of_many_that_expect_the_same_one_moves(engine: Engine, move: Move) -> None:
    """The database decides who was first, also where the alias is new."""

    def race(number: int) -> int | None:
        try:
            return move(f"acme/alice:{number}", expected=0)
        except AliasMoved:
            return None

    with ThreadPoolExecutor(8) as pool:
        moved = list(pool.map(race, [1, 3] * 4))

    assert len([number for number in moved if number]) == 1
