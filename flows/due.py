"""What a clock does: who is due, what is left to sweep, how many cohorts are wanted.

Nothing here needs torch until somebody is due: a tick a minute in a process of its own must cost little.
"""

import math

from flows.errors import FlowError
from flows.factory import Factory, Pinned, now, pin_base, request_training
from lora_core.errors import LoraError
from lora_core.recipe import make_recipe
from registry import jobs, schedules, uploads
from registry.errors import RegistryError
from registry.session import reading, transaction

MOST_RUNS = 16  # cohort runs asked for in one tick: more would only wait in line


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


def runs_wanted(factory: Factory) -> int:
    """How many cohort runs the waiting jobs need, at most a few at a time."""
    with reading(factory.engine) as session:
        groups = jobs.waiting(session, now())
    return min(MOST_RUNS, sum(math.ceil(count / factory.settings.slots) for count in groups.values()))
