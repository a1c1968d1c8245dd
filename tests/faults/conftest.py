"""A job in a worker's hands, on whichever registry and store a test file brings."""

import pytest
from sqlalchemy.engine import Engine

from registry.jobs import ClaimedJob
from registry.store import ObjectStore
from tests.registry.conftest import Claim, claim

__all__ = ["claim"]


@pytest.fixture
def job(engine: Engine, store: ObjectStore, claim: Claim) -> ClaimedJob:
    """Alice's job, claimed, with its data in the store."""
    (claimed,) = claim()
    store.put_new(claimed.dataset_key, b"data")
    return claimed
