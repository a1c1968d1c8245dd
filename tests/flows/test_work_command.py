"""`lora work` in this process: what it tells, and what it does besides training."""

import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from flows.factory import Factory, now, pin_base
from flows.logs import LOG
from flows.settings import FactorySettings
from registry import queries, schedules
from registry.names import Reference
from registry.session import transaction
from registry.timing import Timing
from tests.flows.conftest import LoraHere


@pytest.fixture(autouse=True)
def _no_logs_afterwards() -> Iterator[None]:
    """Other tests begin without logs."""
    kept = LOG.handlers, LOG.level, LOG.propagate
    yield
    LOG.handlers, LOG.level, LOG.propagate = kept


@pytest.fixture
def factory(tmp_path: Path) -> Factory:
    """A factory in LORA_HOME."""
    made = Factory(FactorySettings(home=tmp_path / "home"))
    made.set_up()
    return made


def test_who_cannot_be_queued_is_told_as_an_event_without_a_name(
    lora_here: LoraHere, factory: Factory, base_folder: Path
) -> None:
    """A schedule of somebody who has no data: one JSON line, by the opaque id."""
    with transaction(factory.engine) as session:
        whose, before = Reference.parse("acme/eve-smith"), now() - timedelta(hours=2)
        holder = queries.ensure_adapter(session, whose, before)
        base = pin_base(factory, str(base_folder)).name
        schedules.put(session, holder.tenant_id, holder, Timing.every("1h"), base, {}, before)
        opaque = holder.user.opaque

    said = lora_here("work", "--once", "--json")

    lines = [json.loads(line) for line in said.err.splitlines()]
    (told,) = [line for line in lines if line["event"] == "not queued"]
    assert {key: told[key] for key in ("level", "tenant", "user", "adapter")} == {
        "level": "warning", "tenant": "acme", "user": opaque, "adapter": "default",
    }  # fmt: skip
    assert "no dataset" in told["reason"]
    assert "eve-smith" not in said.err
