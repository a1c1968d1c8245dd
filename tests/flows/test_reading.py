"""`lora history` while others are at work."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from registry import jobs, queries
from registry.models import AdapterVersion
from registry.publishing import publish
from registry.session import transaction
from registry.store import FolderStore
from tests.conftest import set_up
from tests.flows.conftest import LoraHere
from tests.registry.conftest import NOW, enqueue, finished


def test_history_tells_of_every_move_while_versions_are_published(
    lora_here: LoraHere, postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On PostgreSQL each of its questions is a look of its own: it met a move to a version that it had not seen."""
    engine, store = set_up(postgres_url), FolderStore(tmp_path / "store")
    store.set_up()
    with transaction(engine) as session:
        asked = enqueue(session, "acme/alice", 2)
    work = []
    for one in asked:
        with transaction(engine) as session:
            work += jobs.claim(session, "worker", timedelta(hours=1), 1, NOW, [one.job_id])
    publish(engine, store, work[0], finished("one"), NOW)
    look = queries.versions

    def versions(*asked: Any) -> list[AdapterVersion]:
        found = look(*asked)
        publish(engine, store, work[1], finished("two"), NOW)
        return found

    monkeypatch.setattr(queries, "versions", versions)
    said = lora_here("history", "acme/alice", LORA_DATABASE_URL=engine.url.render_as_string(hide_password=False))
    engine.dispose()

    assert (said.code, "latest -> 1" in said.out) == (0, True), said
