"""The Prefect flows.  Each is a table of contents: the steps are in `cohort.py`, their order in `work.py`.

Prefect decides where and when, retries, and shows; what is true is in the registry.  No data is passed as a parameter,
and no result is persisted: the registry is the cache.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

from prefect import flow, get_run_logger, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterName,
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.context import FlowRunContext
from prefect.deployments import run_deployment
from prefect.tasks import exponential_backoff

from flows import artifacts, report
from flows import cohort as steps
from flows.cohort import Cohort
from flows.factory import Factory, pin_base, request_training
from flows.work import enqueue_due, run_cohort, sweep
from lora_core.recipe import make_recipe
from lora_core.train import Pace
from registry import uploads
from registry.names import JobId, Reference
from registry.session import transaction

UPLOADS = uploads.UPLOAD_LEASE / timedelta(seconds=1)

# What each step may do when it fails.  Training is not retried in place: its jobs' leases run out and the next cohort
# takes them.  A time-out cannot stop a computation in C; it ends the waiting, and fencing makes the late result void.
TASKS: dict[Callable[..., Any], Any] = {
    steps.claim: task(name="claim", retries=3, retry_delay_seconds=2, timeout_seconds=60)(steps.claim),
    steps.prepare: task(name="prepare", timeout_seconds=1800)(steps.prepare),
    steps.train: task(name="train", tags=["gpu"])(steps.train),
    steps.judge: task(name="judge", tags=["gpu"], retries=1)(steps.judge),
    steps.publish_all: task(
        name="publish", retries=5, retry_delay_seconds=exponential_backoff(2), timeout_seconds=UPLOADS
    )(steps.publish_all),
    enqueue_due: task(name="due", retries=2)(enqueue_due),
    sweep: task(name="sweep", retries=2)(sweep),
    steps.runs_wanted: task(name="count")(steps.runs_wanted),
}


def as_task(step: Callable[..., Any], *arguments: Any) -> Any:  # whatever the step takes and gives
    """Run a step as its Prefect task, keeping no result."""
    return TASKS[step].with_options(persist_result=False)(*arguments)


@flow(name="adapt-cohort", flow_run_name="cohort", persist_result=False)
def adapt_cohort(jobs: list[str] | None = None) -> dict[str, str]:
    """Take one cohort of waiting jobs (or of these) from raw datasets to published versions; each user's outcome."""
    only = None if jobs is None else [JobId(UUID(job)) for job in jobs]
    cohort = _run_shown(Factory.from_environment(), only)
    return {} if cohort is None else {row["user"]: row["result"] for row in report.rows(cohort)}


@flow(name="adapt-user", flow_run_name="{reference}", persist_result=False)
def adapt_user(reference: str, base: str | None = None, recipe: dict[str, Any] | None = None) -> dict[str, str]:
    """Train one user's newest data now, on a base (LORA_BASE when none is named) with a recipe in any spelling."""
    factory = Factory.from_environment()
    pinned = pin_base(factory, base)
    with transaction(factory.engine) as session:
        job = request_training(session, Reference.parse_adapter(reference), pinned, make_recipe(recipe or {}))
    if job.unchanged:
        return {reference: "unchanged"}
    cohort = _run_shown(factory, [job.job_id], renamed=False)
    if cohort is None:
        return {reference: "another worker has it"}
    return {row["user"]: row["result"] for row in report.rows(cohort)}


def _run_shown(factory: Factory, only: Sequence[JobId] | None, renamed: bool = True) -> Cohort | None:
    """Run one cohort, whose progress, table and curves Prefect's page shows."""
    with artifacts.shown(factory) as progress:

        def do(step: Callable[..., Any], *arguments: Any) -> Any:  # whatever the step takes and gives
            result = as_task(step, *arguments)
            if isinstance(result, Cohort) and result.work:
                progress.key = f"{artifacts.name(result)}-progress"
                if renamed:
                    _name_after(result)
            return result

        cohort = run_cohort(factory, only, _log_pace(), do=do)
        if cohort:
            progress.finish(cohort)
            artifacts.show(cohort)
        return cohort


@flow(name="tick", flow_run_name="tick", persist_result=False)
def tick(deployment: str = "adapt-cohort/adapt-cohort") -> int:
    """Turn due schedules into jobs, and waiting jobs into cohort runs; returns how many runs were asked for."""
    factory = Factory.from_environment()
    for trouble in as_task(enqueue_due, factory):
        get_run_logger().warning("not queued: %s", trouble)
    as_task(sweep, factory)
    runs: int = max(0, as_task(steps.runs_wanted, factory) - _runs_waiting(deployment))
    for _ in range(runs):
        run_deployment(deployment, timeout=0, as_subflow=False)
    return runs


def _runs_waiting(deployment: str) -> int:
    """How many runs were asked for before and have not begun: with every worker busy, more would only pile up."""
    flow_name, _, name = deployment.partition("/")
    not_begun = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED, StateType.PENDING]))
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=[flow_name])),
            deployment_filter=DeploymentFilter(name=DeploymentFilterName(any_=[name])),
            flow_run_filter=FlowRunFilter(state=not_begun),
            limit=steps.MOST_RUNS,
        )
    return len(runs)


def _name_after(cohort: Cohort) -> None:
    """Name the flow run after who is in the cohort."""
    tenants = sorted({job.reference.tenant for job, _ in cohort.work.values()})
    name = f"{'+'.join(tenants)}-{len(cohort.work)}-users-{str(cohort.run_id)[:8]}"
    context = FlowRunContext.get()
    if context and context.flow_run:
        with get_client(sync_client=True) as client:
            client.update_flow_run(context.flow_run.id, name=name)


def _log_pace() -> Callable[[Pace], None]:
    """Progress as log lines: one every fifty micro-steps, and whenever a user finishes."""
    logger, last = get_run_logger(), [0]

    def watch(pace: Pace) -> None:
        if pace.micro_steps % 50 == 0 or pace.finished > last[0]:
            last[0] = pace.finished
            counts = (pace.micro_steps, len(pace.training), pace.waiting, pace.finished, pace.tokens / pace.room)
            logger.info(
                "step %d: %d training, %d waiting, %d finished, %.0f%% of room used", *counts[:4], 100 * counts[4]
            )

    return watch
