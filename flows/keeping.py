"""What a cohort keeps on this machine while it trains: progress, and states under the first adapted layer."""

import time
from typing import TYPE_CHECKING

import torch

from flows.factory import Factory
from flows.finished import computed_on
from flows.shelf import StoreShelf
from lora_core.row_store import RowFolder, RowMemory, RowStore
from lora_core.saves import Saves

if TYPE_CHECKING:
    from flows.cohort import Cohort


def saves(factory: Factory, cohort: "Cohort", shelf: StoreShelf) -> Saves:
    """Where the progress of trainings is kept, for whoever claims their jobs after a kill."""
    shape = f"{cohort.base.digest} {computed_on(cohort.base)} {torch.__version__} {cohort.plan.compiled}"
    last = time.monotonic()

    def due() -> bool:
        nonlocal last
        if time.monotonic() - last < factory.settings.save_seconds:
            return False
        last = time.monotonic()
        return True

    return Saves(factory.settings.home_folder / "saves", shape, due, shelf)


def row_store(factory: Factory, cohort: "Cohort") -> RowStore | None:
    """Where states under the first adapted layer are kept, if any row of the cohort comes again over a few layers."""
    memory, disk = factory.settings.states, factory.settings.states_disk
    learners = [learner for candidate in cohort.candidates for learner in candidate.learners]
    if not (memory or disk) or not all(learner.recipe.method.layers for learner in learners):
        return None
    kind = "compiled" if cohort.plan.compiled else "eager"  # which rounds otherwise
    folder = RowFolder(factory.settings.home_folder / "states" / kind, disk) if disk else None
    return RowStore(RowMemory(memory), time.monotonic, folder)
