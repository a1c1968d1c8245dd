"""The Prefect flow that the clock runs, apart from those that train: nothing here needs torch."""

from datetime import timedelta

from prefect import Flow, flow, get_run_logger, task
from prefect.artifacts import create_table_artifact
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
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.deployments import run_deployment

from flows import due, upkeep
from flows.factory import Factory, now

_MOST_READ = 200  # runs in one answer of Prefect's server
_BEGINNING = timedelta(minutes=3)  # a run that has been beginning for longer died with its worker

_fire_due = task(name="due", retries=2, persist_result=False)(due.fire_due)
_keep_up = task(name="keep-up", retries=2, persist_result=False)(upkeep.keep_up)
_runs_wanted = task(name="count", persist_result=False)(due.runs_wanted)


def make_tick(factory: Factory, deployment: str) -> Flow[[], int]:
    """The flow that turns due schedules into jobs, and waiting jobs into runs of a deployment; it returns how many."""

    @flow(name="tick", flow_run_name="tick", persist_result=False)
    def tick() -> int:
        asked = 0

        def ask() -> None:
            nonlocal asked
            asked += _ask_for_runs(factory, deployment)

        _show(_fire_due(factory, ask))
        ask()
        for trouble in _keep_up(factory):
            get_run_logger().warning("not kept up: %s", trouble)
        return asked

    return tick


def _ask_for_runs(factory: Factory, deployment: str) -> int:
    """Ask Prefect for the cohort runs that are wanted and were not asked for yet; returns how many."""
    wanted: int = max(0, _runs_wanted(factory) - _runs_waiting(deployment))
    for _ in range(wanted):
        run_deployment(deployment, timeout=0, as_subflow=False)
    return wanted


def _show(ticked: list[due.Ticked]) -> None:
    """Leave what a tick claimed where Prefect's page shows it, and log who could not be queued."""
    for one in ticked:
        if one.result == "not queued":
            get_run_logger().warning("not queued: %s: %s", one.label, one.why)
    if ticked:
        table, words = due.table(ticked)
        create_table_artifact(table=table, key="tick", description=words)


def _runs_waiting(deployment: str) -> int:
    """How many runs were asked for before and have not begun: with every worker busy, more would only pile up."""
    flow_name, _, name = deployment.partition("/")
    not_begun = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED, StateType.PENDING]))
    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=[flow_name])),
            deployment_filter=DeploymentFilter(name=DeploymentFilterName(any_=[name])),
            flow_run_filter=FlowRunFilter(state=not_begun),
            sort=FlowRunSort.EXPECTED_START_TIME_DESC,
            limit=_MOST_READ,
        )
    return sum(map(may_begin, found))


def may_begin(run: FlowRun) -> bool:
    """Whether a run that has not begun still will.

    A worker that is killed after it took a run leaves it pending for ever: counted, such runs would in time keep every
    new one from being asked for.
    """
    return run.state_type == StateType.SCHEDULED or (run.state is not None and run.state.timestamp > now() - _BEGINNING)
