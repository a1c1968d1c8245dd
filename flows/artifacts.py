"""What Prefect's page shows of a cohort: how far it is while it trains, everybody's row and curve at its end.

No text of a user's data, and keys of a-z, 0-9 and dashes only.  A thread of its own tells the progress: a Prefect
server that hangs holds up no training, and no heartbeat.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from uuid import UUID

from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.context import FlowRunContext
from prefect.logging.handlers import APILogHandler

from flows import report
from flows.cohort import Cohort
from flows.factory import Factory
from flows.logs import LOG, Words, set_up_logs
from flows.presence import at_work
from flows.pulse import EVERY, Look, told


class Progress:
    """A cohort's progress artifact: made once it is known whose cohort it is, then written over."""

    def __init__(self, flow_run: UUID | None) -> None:
        self.key: str | None = None
        self._artifact: UUID | None = None
        self._flow_run, self._told = flow_run, (-1.0, "")

    def __call__(self, look: Look) -> None:
        """Show a look, where it says something new."""
        if self.key and look.phase != "idle":
            self._show(100 * look.share, _words(look))

    def finish(self, cohort: Cohort) -> None:
        """The cohort has ended."""
        if self.key:
            counts = (len(cohort.versions), len(cohort.failed), len(cohort.put_off), len(cohort.put_back))
            self._show(100.0, "{} published, {} failed, {} put off, {} put back".format(*counts))

    def _show(self, percent: float, words: str) -> None:
        new = (round(percent, 1), words)
        if new == self._told:
            return
        self._told = new
        with get_client(sync_client=True) as client:
            if self._artifact is None:
                made = ArtifactCreate(
                    type="progress", key=self.key, data=new[0], description=words, flow_run_id=self._flow_run
                )
                self._artifact = client.create_artifact(made).id
            else:
                client.update_artifact(self._artifact, ArtifactUpdate(data=new[0], description=words))


@contextmanager
def shown(factory: Factory) -> Iterator[Progress]:
    """In a flow run: events go to its log as well, and what the worker does to the registry and to Prefect's page."""
    set_up_logs(factory.settings)
    context = FlowRunContext.get()
    flow_run = context.flow_run.id if context and context.flow_run else None
    to_run = APILogHandler()
    to_run.setFormatter(Words())
    to_run.addFilter(partial(_of_run, flow_run))
    LOG.addHandler(to_run)
    LOG.setLevel(logging.INFO)
    progress = Progress(flow_run)
    try:
        with at_work(factory), told(factory.pulse, [progress], every=2 * EVERY):
            yield progress
    finally:
        LOG.removeHandler(to_run)


def _of_run(flow_run: UUID | None, record: logging.LogRecord) -> bool:
    """Say whose log an event belongs in: Prefect does not know the threads that publish and prepare."""
    record.flow_run_id = flow_run
    return flow_run is not None


def name(cohort: Cohort) -> str:
    """What the artifacts' keys of a cohort begin with."""
    return f"cohort-{str(cohort.run_id)[:8]}"


def show(cohort: Cohort) -> None:
    """Leave the cohort's table and curves where Prefect's page shows them."""
    table = report.rows(cohort)
    create_table_artifact(table=table, key=name(cohort), description="Every user of the cohort")
    curves = [{"user": row["user"], "held-out loss": row.get("curve", "")} for row in table]
    create_markdown_artifact(report.markdown(curves), key=f"{name(cohort)}-curves", description="Loss curves")


def _words(look: Look) -> str:
    if look.phase != "train" or not look.micro_steps:
        return f"{look.phase}, {look.users} users"
    left = "" if look.seconds_left is None else f", about {look.seconds_left / 60:.0f} min of training left"
    seats = f"{look.training} in slots, {look.waiting} waiting, {look.finished} finished"
    return f"step {look.micro_steps}: {seats}, {look.tokens_per_second:,.0f} tokens/s{left}"
