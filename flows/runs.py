"""Runs of cohorts as the registry records them, and how many are wanted."""

import math
from typing import TYPE_CHECKING

from flows.factory import Factory, now
from flows.finished import computed_on
from registry import jobs
from registry.models import Run
from registry.session import reading, transaction

if TYPE_CHECKING:
    from flows.cohort import Cohort

MOST_RUNS = 16  # cohort runs asked for in one tick: more would only wait in line


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


def close_run(factory: Factory, cohort: "Cohort") -> None:
    """It is over: what became of its users."""
    with transaction(factory.engine) as session:
        run = session.get_one(Run, cohort.run_id)
        run.finished_at = now()
        run.facts = {"published": len(cohort.published), "failed": len(cohort.failed)}


def runs_wanted(factory: Factory) -> int:
    """How many cohort runs the waiting jobs need, at most a few at a time."""
    with reading(factory.engine) as session:
        groups = jobs.waiting(session, now())
    return min(MOST_RUNS, sum(math.ceil(count / factory.settings.slots) for count in groups.values()))
