"""What commands make of a version is of that version, though its alias moves while they work."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from unittest.mock import Mock

import pytest

from flows import matrix, reproduce
from flows.errors import Unready
from flows.factory import Factory
from flows.settings import FactorySettings
from registry import jobs
from registry.publishing import publish
from registry.session import transaction
from tests.registry.conftest import NOW, enqueue, finished

READERS: dict[str, Callable[[Factory], object]] = {
    "reproduce": lambda factory: reproduce.reproduce(factory, "acme/ada"),
    "matrix": lambda factory: matrix.pull_all(factory, ["acme/ada"]),
}


@pytest.mark.parametrize("reader", READERS)
def test_the_version_that_was_looked_up_is_the_one_that_is_pulled(
    reader: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else one version's files would meet another's data and recipe."""
    factory = Factory(FactorySettings(home=home))
    factory.set_up()
    with transaction(factory.engine) as session:
        enqueue(session, "acme/ada", 1)
        (job,) = jobs.claim(session, "worker", timedelta(hours=1), 1, NOW)
    publish(factory.engine, factory.store, job, finished("ada"), NOW)
    pull = Mock(side_effect=Unready("far enough", "stop"))
    monkeypatch.setattr(factory.client, "pull_living", pull)
    monkeypatch.setattr(matrix, "load_recorded", lambda _, made_on: made_on)

    with pytest.raises(Unready, match="far enough"):
        READERS[reader](factory)

    pull.assert_called_once_with("acme/ada:1")
