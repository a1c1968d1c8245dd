"""A short, seeded part of the full run in `benchmarks/crash_publish.py`: every kind of fault, on every kind of site."""

from pathlib import Path

import pytest

from tests.faults.trials import Site, count_points, fail_at, kill_at, sample, stop_at

KILLS, ERRORS, STOPS = {"folder": 14, "s3": 7}, {"folder": 8, "s3": 4}, {"folder": 3, "s3": 2}


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
    for number in sample(3, points, STOPS[kind]):
        assert stop_at(site, user, number)
