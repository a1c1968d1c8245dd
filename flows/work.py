"""The whole job in order: claim, prepare, train, judge, publish.  The same lines with and without Prefect.

`do` says how a step is run: called plainly here, as a Prefect task in `adapt.py`.
"""

from collections.abc import Callable, Sequence
from typing import Any

from flows import cohort as steps
from flows.cohort import Cohort
from flows.factory import Factory, now
from lora_core.train import Pace
from registry import uploads
from registry.names import JobId

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
    with steps.in_hand(factory, claimed) as lost:
        cohort: Cohort = do(steps.prepare, factory, claimed)  # a user with bad data drops out alone
        cohort.lost = lost
        do(steps.train, factory, cohort, watch)  # one process, one frozen base, every user
        do(steps.judge, factory, cohort)  # against the base and the live version
        do(steps.publish_all, factory, cohort)  # bytes first, row second
    return cohort


def sweep(factory: Factory) -> list[str]:
    """Clear what uploads left that never became versions."""
    return uploads.sweep(factory.engine, factory.store, now())
