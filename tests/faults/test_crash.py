"""A short, seeded part of the full run in `benchmarks/crash_publish.py`: every kind of fault, on every kind of site."""

from itertools import cycle
from pathlib import Path

import pytest

from tests.faults.trials import PARTS, Site, count_points, fail_at, kill_at, sample, stop_at

KILLS, ERRORS, STOPS = {"folder": 9, "s3": 4}, {"folder": 5, "s3": 3}, {"folder": 3, "s3": 1}


@pytest.fixture(params=["folder", "s3"])
def kind(request: pytest.FixtureRequest) -> str:
    """The kind of store, each in turn."""
    return str(request.param)


@pytest.fixture
def site(database_url: str, kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> Site:
    """An empty registry and an empty store, of each kind in turn."""
    store = str(tmp_path / "store") if kind == "folder" else request.getfixturevalue("s3_url")
    return Site(database_url, store, tmp_path)


def test_whatever_is_killed_failed_or_stopped_there_is_one_version_and_no_debris(site: Site, kind: str) -> None:
    """None lost, none twice, none visible before it is whole, no gap, no orphan: see `invariants.py`."""
    user = "acme/alice"
    count_points(site, user)
    points = count_points(site, user)  # of a version that is not the first
    for number in sample(1, points, KILLS[kind]):
        assert kill_at(site, user, number, resume=bool(number % 2))
    for number in sample(2, points, ERRORS[kind]):
        assert fail_at(site, user, number)
    for number, meanwhile in zip(sample(3, points, STOPS[kind]), cycle(PARTS), strict=False):
        assert stop_at(site, user, number, meanwhile)
