"""Forgetting, where others are at work with the registry meanwhile; what is left of a user: tests/flows."""

from datetime import timedelta

import pytest
from sqlalchemy import select
from sqlalchemy.engine import Engine

from registry import queries
from registry.errors import NamesakeLeft, NotYetForgotten
from registry.models import User
from registry.names import Reference
from registry.publishing import declare
from registry.session import transaction
from registry.store import FolderStore
from tests.conftest import looking
from tests.registry.conftest import NOW, Claim, forget

LATER = NOW + timedelta(hours=1)


def test_who_came_under_the_name_of_somebody_being_forgotten_is_asked_about_apart(
    engine: Engine, store: FolderStore, claim: Claim
) -> None:
    """A receipt for the one is none for the other, and going on with the one forgets nobody else."""
    declare(engine, claim()[0], "d" * 64, NOW)
    with pytest.raises(NotYetForgotten):
        forget(engine, store, "alice")
    with transaction(engine) as session:
        queries.ensure_adapter(session, Reference.parse("acme/alice"), NOW)

    with pytest.raises(NamesakeLeft, match="run it again"):
        forget(engine, store, "alice", LATER)

    assert users(engine) == ["alice"]
    assert forget(engine, store, "alice", LATER).deleted["users"] == {"count": 1}
    assert users(engine) == []


def users(engine: Engine) -> list[str]:
    """Everybody there is."""
    with looking(engine) as session:
        return list(session.scalars(select(User.name)))
