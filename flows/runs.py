"""Runs of cohorts as the registry records them."""

from typing import TYPE_CHECKING

from flows.costs import NANOSECONDS
from flows.factory import Factory, now
from flows.finished import computed_on
from flows.logs import event
from registry.models import Facts, Run
from registry.session import transaction

if TYPE_CHECKING:
    from flows.cohort import Cohort


def open_run(factory: Factory, cohort: "Cohort") -> None:
    """A cohort has begun."""
    with transaction(factory.engine) as session:
        session.add(
            Run(
                id=cohort.run_id, worker=factory.settings.worker, device=computed_on(cohort.base)["device"],
                slots=cohort.plan.slots, row_tokens=cohort.plan.row_tokens, started_at=cohort.started_at,
                finished_at=None, facts={},
            )
        )  # fmt: skip
    cohort.on_record = True


def close_run(factory: Factory, cohort: "Cohort") -> None:
    """It is over: what became of its users."""
    facts: Facts = {
        "published": len(cohort.versions), "failed": len(cohort.failed), "put_off": len(cohort.put_off),
        "put_back": len(cohort.put_back), "device_seconds": cohort.meter.total / NANOSECONDS,
    }  # fmt: skip
    with transaction(factory.engine) as session:
        run = session.get_one(Run, cohort.run_id)
        run.finished_at, run.facts = now(), facts
    event("cohort finished", run=cohort.run_id, **facts)
