"""Metrics and health, without a cohort that has run."""

from datetime import timedelta
from pathlib import Path
from unittest.mock import Mock

import pytest
from prometheus_client import generate_latest
from sqlalchemy.engine import Engine

from flows.endpoint import kept
from flows.factory import Factory, now
from flows.metrics import FactoryMetrics
from flows.settings import FactorySettings
from registry import jobs, queries, shares
from registry.errors import DatabaseUnavailable
from registry.session import transaction
from tests.flows.conftest import samples
from tests.registry.conftest import NOW, enqueue


def test_jobs_beyond_a_quota_call_for_no_worker(engine: Engine) -> None:
    """Under Prefect nobody begins a run for them: as jobs that wait for a worker they would ring for hours."""
    metrics = FactoryMetrics(engine, lambda: NOW)
    with transaction(engine) as session:
        enqueue(session, "acme/alice", 1)
        enqueue(session, "globex/eve", 1)
        shares.set_quota(session, queries.tenant_id(session, "acme"), {"max_versions": 0}, NOW)

    metrics.refresh()

    found = samples(generate_latest(metrics.registry).decode())
    assert found["lora_queue_jobs", ("acme",)] == found["lora_queue_jobs", ("globex",)] == 1
    assert found["lora_queue_ready_jobs", ()] == 1


def test_a_registry_that_does_not_answer_is_a_metric(tmp_path: Path) -> None:
    """The exporter lives on, so that somebody hears of it."""
    factory = Factory(FactorySettings(home=tmp_path / "nowhere"))
    metrics = FactoryMetrics(factory.engine, now)

    metrics.refresh()

    assert samples(generate_latest(metrics.registry).decode())["lora_registry_up", ()] == 0


def test_what_happened_is_counted_though_the_database_goes_away_while_it_is_read(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the next look: an event is read once."""
    metrics = FactoryMetrics(engine, lambda: NOW)
    metrics.refresh()
    with transaction(engine) as session:
        enqueue(session, "acme/alice", 1)
        jobs.claim(session, "worker", timedelta(hours=1), 1, NOW)

    with monkeypatch.context() as patched:
        patched.setattr(queries, "tenants", Mock(side_effect=DatabaseUnavailable("postgresql://x", "gone", "wait")))
        metrics.refresh()
    metrics.refresh()

    assert samples(generate_latest(metrics.registry).decode())["lora_jobs_claimed_total", ("acme",)] == 1


def test_the_answer_about_readiness_is_kept_for_a_moment() -> None:
    """Probes of three sides ask the database once."""
    clock, asked = [0.0], list[int]()
    check = kept(lambda: asked.append(1) or {}, 5, lambda: clock[0])  # type: ignore[func-returns-value]  # on purpose

    for clock[0] in (0.0, 1.0, 4.9, 5.1, 9.0, 10.2):
        check()

    assert len(asked) == 3
