"""The steps of a cohort as Prefect tasks, and one cohort made of them."""

import math
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from traceback import walk_tb
from typing import Any

from httpx import HTTPError
from prefect import get_run_logger, task
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.exceptions import PrefectException
from prefect.tasks import exponential_backoff

from flows import artifacts, report
from flows import cohort as steps
from flows.cohort import Cohort
from flows.errors import OrchestratorAway
from flows.factory import Factory
from flows.leaving import Leave, on_signals
from flows.work import run_cohort
from lora_core.train import Pace
from registry import uploads
from registry.names import JobId

LOG_SECONDS = 10.0  # between lines of progress
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
}


def as_task(step: Callable[..., Any], *arguments: Any) -> Any:  # whatever the step takes and gives
    """Run a step as its Prefect task, keeping no result.  Raises OrchestratorAway for what is Prefect's own trouble."""
    try:
        return TASKS[step].with_options(persist_result=False)(*arguments)
    except Exception as error:
        if any(frame.f_code is step.__code__ for frame, _ in walk_tb(error.__traceback__)):
            raise  # the step's own
        raise OrchestratorAway(step.__name__, f"{type(error).__name__}: {error}") from error


def train_cohort(factory: Factory, only: list[JobId] | None, renamed: bool) -> dict[str, str]:
    """One cohort, whose progress, table and curves Prefect's page shows; each user's outcome, nobody's where none came.

    It is told to leave by a signal, as Kubernetes sends it to the flow itself, or by a worker's note.
    """
    leave = Leave(factory.settings.grace, note=factory.settings.leave_note)
    with on_signals(leave, get_run_logger().warning), artifacts.shown(factory) as progress:

        def do(step: Callable[..., Any], *arguments: Any) -> Any:  # whatever the step takes and gives
            result = as_task(step, *arguments)
            if isinstance(result, Cohort) and result.work:
                progress.key = f"{artifacts.name(result)}-progress"
                if renamed:
                    _name_after(result)
            return result

        cohort = run_cohort(factory, only, _log_pace(), do, leave)
        if cohort is None:
            return {}
        with suppress(HTTPError, PrefectException):  # a page that is not drawn undoes nothing
            progress.finish(cohort)
            artifacts.show(cohort)
        return {row["user"]: row["result"] for row in report.rows(cohort)}


def _name_after(cohort: Cohort) -> None:
    """Name the flow run after who is in the cohort; without Prefect's server it keeps the name that it has."""
    tenants = sorted({job.reference.tenant for job, _ in cohort.work.values()})
    name = f"{'+'.join(tenants)}-{len(cohort.work)}-users-{str(cohort.run_id)[:8]}"
    context = FlowRunContext.get()
    if context and context.flow_run:
        with suppress(HTTPError, PrefectException), get_client(sync_client=True) as client:
            client.update_flow_run(context.flow_run.id, name=name)


def _log_pace() -> Callable[[Pace], None]:
    """Progress as log lines, one in ten seconds at most: Prefect's server writes each of them to its database."""
    logger, last = get_run_logger(), [-math.inf]

    def watch(pace: Pace) -> None:
        if time.monotonic() - last[0] >= LOG_SECONDS:
            last[0] = time.monotonic()
            counts = (pace.micro_steps, len(pace.training), pace.waiting, pace.finished, pace.tokens / pace.room)
            logger.info(
                "step %d: %d training, %d waiting, %d finished, %.0f%% of room used", *counts[:4], 100 * counts[4]
            )

    return watch
