"""What fits into this worker's memory: the base to begin with, then as many slots and users as there is room for."""

import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from flows.candidates import Candidate, plan_training
from flows.factory import Factory
from flows.settings import FactorySettings
from lora_core.base_files import fingerprint, locate
from lora_core.base_model import (
    BaseModel,
    default_device,
    default_dtype,
    load_base,
    outline,
)
from lora_core.budget import Weights, check_base_fits
from lora_core.errors import BaseChanged, BaseModelError, MemoryTooSmall
from lora_core.height import least_height
from lora_core.planner import Plan, free_bytes
from lora_core.recipe import Recipe
from registry.jobs import ClaimedJob
from registry.models import SharedBase

ENOUGH = 1024  # tokens of a micro-step on a CPU: in a larger one a row costs what a row costs, and takes memory


def load_for(factory: Factory, job: ClaimedJob) -> BaseModel:
    """A job's base: the one that this process loaded last, where it is that.

    Raises MemoryTooSmall, BaseModelError, and BaseChanged where its files are others than when the job was made.
    """
    kept = factory.loaded
    if kept is not None and kept.digest == job.base_digest:  # which tells quantised ones apart too
        return kept
    kept = factory.loaded = None  # two at once may be too many
    base = load_within_budget(factory.settings, job)
    if base.digest != job.base_digest:
        raise BaseChanged(job.base_name, "its files have changed since the job was made", "train again")
    factory.loaded = base
    return base


def load_within_budget(settings: FactorySettings, job: ClaimedJob) -> BaseModel:
    """A job's base.  Raises MemoryTooSmall, before it is read, where a stated budget is too small for it alone."""
    device = settings.device or default_device()
    name, revision = _place_of(settings, job.base_name, job.base_revision, job.base_quantised, job.base_digest)
    if settings.memory:
        known = outline(locate(name, revision))
        weights = Weights.of(known, default_dtype(device).itemsize)
        check_base_fits(weights, job.base_quantised or known.quantised, settings.memory)
    return load_base(name, revision, device, quantise=job.base_quantised)


def load_recorded(settings: FactorySettings, made_on: SharedBase) -> BaseModel:
    """The base that a version was trained on, as it is here now: whether it is the same, its digest tells."""
    name, revision = place_recorded(settings, made_on)
    return load_base(name, revision, settings.device or None, quantise=made_on.quantised)


def place_recorded(settings: FactorySettings, made_on: SharedBase) -> tuple[str, str | None]:
    """Where the base is on this machine that a version was trained on, and its revision."""
    return _place_of(settings, made_on.name, made_on.revision, made_on.quantised, made_on.digest)


def _place_of(
    settings: FactorySettings, name: str, revision: str, quantised: str, digest: str
) -> tuple[str, str | None]:
    """Where a base is on this machine: as it was asked for, or where LORA_BASE is the same base elsewhere."""
    if settings.base and settings.base != name and not os.path.isdir(name):
        ours = settings.base_revision or None
        with suppress(BaseModelError):
            if fingerprint(locate(settings.base, ours), quantised) == digest:
                return settings.base, ours
    return name, revision


def usual_plan(settings: FactorySettings, seats: int, recipe: Recipe, quantised: str) -> Plan:
    """As many slots as are of use for so many seats, a power of two where that is below the setting.

    Quantised layers cannot be compiled, and train as they are whatever the setting says.
    """
    slots = min(settings.slots, 1 << math.ceil(math.log2(seats)))
    compiled = settings.compile and not quantised
    return Plan(slots, recipe.row_tokens, compiled=compiled, recorded=settings.cuda_graph)


def seats_of(settings: FactorySettings, base: BaseModel, candidates: Sequence[Candidate]) -> int:
    """How many slots they make good use of: of a search as many as go on to its end; trials take turns before that.

    Where empty slots are not computed it has more, as long as rows are short.
    """
    short = _short_rows(settings, base, candidates[0].recipe)
    return sum(max(one.seats, min(len(one.learners), short)) for one in candidates)


def seats_for_more(settings: FactorySettings, base: BaseModel, seats: int, recipe: Recipe) -> int:
    """How many seats a cohort should have that lets newcomers in.

    On a GPU as many as there may be: empty ones cost little.  On a CPU one to spare, which doubles its slots at most,
    or more of short rows where empty ones are not computed.
    """
    most = settings.slots
    return most if base.model.device.type == "cuda" else max(seats + 1, min(most, _short_rows(settings, base, recipe)))


def _short_rows(settings: FactorySettings, base: BaseModel, recipe: Recipe) -> int:
    """How many rows are quicker together than one after another; 0 where each would be computed, read or not."""
    compiles = settings.compile and not base.quantised
    all_computed = compiles or least_height(base, settings.slots) == settings.slots
    return 0 if all_computed else ENOUGH // recipe.row_tokens


def budget_bytes(settings: FactorySettings, base: BaseModel) -> int | None:
    """What base and cohort may take together: as stated, else what a GPU has; None where nobody can tell."""
    return settings.memory or free_bytes(base.model.device)


def plan_fitting(
    base: BaseModel, candidates: Sequence[Candidate], budget: int, most_slots: int
) -> tuple[Plan | None, dict[str, MemoryTooSmall]]:
    """A plan for as many users as fit, and why the others do not, by label; those of the longest examples go first."""
    try:
        return plan_training(base, candidates, budget, most_slots), {}
    except MemoryTooSmall as error:
        trouble = error
    shorter = sorted((one for one in candidates if one.longest < trouble.row_tokens), key=lambda one: one.longest)
    found, fitting = None, 0
    low, high = 1, len(shorter)
    while low <= high:  # whoever has longer examples needs more
        middle = (low + high) // 2
        try:
            found, fitting = plan_training(base, shorter[:middle], budget, most_slots), middle
            low = middle + 1
        except MemoryTooSmall:
            high = middle - 1
    kept = {candidate.label for candidate in shorter[:fitting]}
    return found, {one.label: trouble for one in candidates if one.label not in kept}


def planned(settings: FactorySettings, base: BaseModel, candidate: Candidate) -> Plan:
    """One user's plan, and that of its search.  Raises MemoryTooSmall."""
    usual = usual_plan(settings, seats_of(settings, base, [candidate]), candidate.recipe, base.quantised)
    budget = budget_bytes(settings, base)
    if budget is None:
        return usual
    found = plan_training(base, [candidate], budget, usual.slots)
    return replace(found, compiled=usual.compiled, recorded=usual.recorded)
