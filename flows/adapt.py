"""The Prefect flows that train.  Each is a table of contents: the steps are in `cohort.py`, their order in `work.py`.

Prefect decides where and when, retries, and shows; what is true is in the registry.  No data is passed as a parameter,
and no result is persisted: the registry is the cache.  What trains is imported late (`tasks.py`), since that takes
longer than everything else does where nobody waits any more.
"""

from typing import Any
from uuid import UUID

from prefect import flow

from flows.due import runs_wanted
from flows.factory import Factory, pin_base, request_training
from lora_core.recipe import make_recipe
from registry.names import JobId, Reference
from registry.session import transaction


@flow(name="adapt-cohort", flow_run_name="cohort", persist_result=False)
def adapt_cohort(jobs: list[str] | None = None) -> dict[str, str]:
    """Take one cohort of waiting jobs (or of these) from raw datasets to published versions; each user's outcome."""
    factory = Factory.from_environment()
    if jobs is None and not runs_wanted(factory):  # another run let them in meanwhile
        return {}
    return _train(factory, None if jobs is None else [JobId(UUID(job)) for job in jobs], renamed=True)


@flow(name="adapt-user", flow_run_name="{reference}", persist_result=False)
def adapt_user(reference: str, base: str | None = None, recipe: dict[str, Any] | None = None) -> dict[str, str]:
    """Train one user's newest data now, on a base (LORA_BASE when none is named) with a recipe in any spelling."""
    factory = Factory.from_environment()
    pinned = pin_base(factory, base)
    with transaction(factory.engine) as session:
        job = request_training(session, Reference.parse_adapter(reference), pinned, make_recipe(recipe or {}))
    if job.unchanged:
        return {reference: "unchanged"}
    return _train(factory, [job.job_id], renamed=False) or {reference: "another worker has it"}


def _train(factory: Factory, only: list[JobId] | None, renamed: bool) -> dict[str, str]:
    """Each user's outcome; nobody's where other workers have them all."""
    from flows.tasks import train_cohort

    return train_cohort(factory, only, renamed)
