"""The whole job in order: claim, prepare, train, judge, publish.  The same lines with and without Prefect.

`do` says how a step is run: called plainly here, as a Prefect task in `tasks.py`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from flows import cohort as steps
from flows.cohort import Cohort
from flows.factory import Factory
from flows.hands import in_hand
from flows.leaving import Leave
from lora_core.train import Pace
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
    leave: Leave | None = None,
    tick: Callable[[], object] = tuple,
) -> Cohort | None:
    """Take one cohort of waiting jobs from raw datasets to published versions; None when nobody waits.

    Unless it is for some jobs `only`, or for those whose workers died again and again, others that can share it are let
    in while it trains, and `tick` is called before each look for them.  Told to `leave`, it takes nobody more, and puts
    back who is unfinished when the time to train is over.
    """
    leave = leave or Leave(factory.settings.grace)
    claimed = None if leave.asked else do(steps.claim, factory, only)
    if not claimed:
        return None
    look = tick if only is None and not claimed[0].suspect else None
    with in_hand(factory, claimed) as hands, _seen(factory, len(claimed), do) as seen:
        cohort: Cohort = seen(steps.prepare, factory, claimed, hands, leave, look is not None)  # or drops out alone
        seen(steps.train, factory, cohort, watch, look)  # one process, one frozen base, every user
        seen(steps.judge, factory, cohort)  # who was not while others trained: against the base and the live version
        seen(steps.publish_all, factory, cohort)  # bytes first, row second
    return cohort


@contextmanager
def _seen(factory: Factory, users: int, do: Do) -> Iterator[Do]:
    """`do`, and each step that begins is known to whoever looks at this process."""
    factory.pulse.join(users)

    def seen(step: Callable[..., Any], *arguments: Any) -> Any:  # whatever the step takes and gives
        factory.pulse.enter(step.__name__)
        return do(step, *arguments)

    try:
        yield seen
    finally:
        factory.pulse.rest()
