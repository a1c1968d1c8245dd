"""Leases of the jobs in a worker's hands."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session

from flows import hands
from flows.factory import Factory
from flows.settings import FactorySettings
from registry import jobs
from registry.jobs import ClaimedJob
from registry.session import transaction
from tests.registry.conftest import NOW, enqueue


def test_a_job_that_is_put_back_and_taken_anew_while_leases_are_renewed_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old lease is over and the new one is good: given up as lost, the job would fail for no reason."""
    factory = Factory(FactorySettings(home=tmp_path / "home"))
    factory.set_up()
    with transaction(factory.engine) as session:
        enqueue(session, "acme/alice", 1)
    (first,) = claimed(factory)
    held = hands.Hands(factory, [first])
    taken: list[ClaimedJob] = []

    @contextmanager
    def meanwhile(engine: Engine) -> Iterator[Session]:
        monkeypatch.undo()
        held.put_back(first)
        taken.extend(claimed(factory))
        held.take(taken)
        with transaction(engine) as session:
            yield session

    monkeypatch.setattr(hands, "transaction", meanwhile)
    held.renew()

    (second,) = taken
    assert (second.id, second.fence > first.fence) == (first.id, True)
    assert held.lost == frozenset()


def claimed(factory: Factory) -> list[ClaimedJob]:
    """The job, in this worker's hands."""
    with transaction(factory.engine) as session:
        return jobs.claim(session, "worker", timedelta(hours=1), 1, NOW)
