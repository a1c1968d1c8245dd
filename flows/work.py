"""The whole job in order: who is due, claim, prepare, train, judge, publish.  The same lines with and without Prefect.

`do` says how a step is run: called plainly here, as a Prefect task in `adapt.py`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from flows import cohort as steps
from flows.cohort import Cohort
from flows.errors import FlowError
from flows.factory import Factory, Pinned, now, pin_base, request_training
from flows.logs import event
from lora_core.errors import LoraError
from lora_core.recipe import make_recipe
from lora_core.train import Pace
from registry import schedules, uploads
from registry.errors import RegistryError
from registry.jobs import ClaimedJob
from registry.names import JobId
from registry.session import reading, transaction

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
    with steps.in_hand(factory, claimed), _seen(factory, claimed, do) as seen:
        cohort: Cohort = seen(steps.prepare, factory, claimed)  # a user with bad data drops out alone
        seen(steps.train, factory, cohort, watch)  # one process, one frozen base, every user
        seen(steps.judge, factory, cohort)  # against the base and the live version
        seen(steps.publish_all, factory, cohort)  # bytes first, row second
    return cohort


@contextmanager
def _seen(factory: Factory, claimed: Sequence[ClaimedJob], do: Do) -> Iterator[Do]:
    """`do`, and each step that begins is known to whoever looks at this process."""
    for job in claimed:
        event("job claimed", job, fence=job.fence)

    def seen(step: Callable[..., Any], *arguments: Any) -> Any:  # whatever the step takes and gives
        factory.pulse.enter(step.__name__, len(claimed))
        return do(step, *arguments)

    try:
        yield seen
    finally:
        factory.pulse.rest()


def enqueue_due(factory: Factory) -> list[str]:
    """Turn the schedules that are due into jobs; returns what could not be turned, and why.

    Bases are read before the transaction that takes the schedules, so that no lock waits for a disk.
    """
    with reading(factory.engine) as session:
        bases = schedules.due_bases(session, now())
    pinned: dict[str, Pinned | str] = {name: _pinned(factory, name) for name in bases}
    troubles = []
    with transaction(factory.engine) as session:
        for one in schedules.fire(session, now()):
            base = pinned.get(one.base) or _pinned(factory, one.base)
            try:
                if isinstance(base, str):
                    troubles.append(f"{one.reference.label}: {base}")
                else:
                    request_training(session, one.reference, base, make_recipe(one.recipe))
            except (LoraError, RegistryError) as error:
                troubles.append(f"{one.reference.label}: {error}")
    return troubles


def _pinned(factory: Factory, name: str) -> Pinned | str:
    """A base, or why it cannot be read: one tenant's missing base must not stop another's schedule."""
    try:
        return pin_base(factory, name)
    except (LoraError, FlowError) as error:
        return str(error)


def sweep(factory: Factory) -> list[str]:
    """Clear what uploads left that never became versions."""
    return uploads.sweep(factory.engine, factory.store, now())
