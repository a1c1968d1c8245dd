"""The whole job in order: who is due, claim, prepare, train, judge, publish.  The same lines with and without Prefect.

`do` says how a step is run: called plainly here, as a Prefect task in `adapt.py`.
"""

from collections.abc import Callable, Sequence
from typing import Any

from flows import cohort as steps
from flows.cohort import Cohort
from flows.factory import Factory, now, pin_base, request_training
from lora_core.recipe import make_recipe
from lora_core.train import Pace
from registry import publishing, schedules
from registry.names import JobId
from registry.session import transaction

Do = Callable[..., Any]  # runs a step: do(step, *arguments) returns what the step returns


def plainly(step: Callable[..., Any], *arguments: Any) -> Any:  # whatever the step takes and gives
    """Run a step by calling it."""
    return step(*arguments)


def run_cohort(
    factory: Factory,
    only: Sequence[JobId] | None = None,
    watch: Callable[[Pace], None] | None = None,
    do: Do = plainly,
) -> Cohort | None:
    """Take one cohort of waiting jobs from raw datasets to published versions; None when nobody waits."""
    claimed = do(steps.claim, factory, only)
    if not claimed:
        return None
    cohort: Cohort = do(steps.prepare, factory, claimed)  # a user with bad data drops out alone
    do(steps.train, factory, cohort, watch)  # one process, one frozen base, every user
    do(steps.judge, factory, cohort)  # against the base and the live version
    do(steps.publish_all, factory, cohort)  # bytes first, row second
    return cohort


def enqueue_due(factory: Factory) -> int:
    """Turn the schedules that are due into jobs, in one transaction; returns how many are new work."""
    with transaction(factory.engine) as session:
        due = schedules.fire(session, now())
        enqueued = [
            request_training(session, one.reference, pin_base(factory, one.base), make_recipe(one.recipe))
            for one in due
        ]
    return sum(not job.unchanged for job in enqueued)


def sweep(factory: Factory) -> list[str]:
    """Clear what uploads left that never became versions."""
    return publishing.sweep(factory.engine, factory.store, now())
