"""`lora work`: a worker without a Prefect server, or of a Prefect work pool, until it is told to go."""

import logging
import math
import os
import time
from contextlib import suppress
from functools import partial
from typing import Annotated

import typer

from flows.cli.printing import AsJson, remark
from flows.cli.training import MemoryOption, cohorts, exit_as, show
from flows.errors import FlowError, Unready
from flows.factory import Factory
from flows.leaving import Leave, on_signals
from flows.logs import event, set_up_logs
from lora_core.errors import LoraError
from registry import queries
from registry.errors import NotFound, RegistryError
from registry.names import Reference
from registry.session import reading

TROUBLES = (RegistryError, LoraError, FlowError)  # of database, store or data, not of this program
UPKEEP_SECONDS = 60.0  # at least between two rounds of upkeep of a worker that goes on


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(work)


def work(
    once: Annotated[bool, typer.Option("--once", help="Stop when nobody waits; else go on for ever.")] = False,
    memory: MemoryOption = None,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between looks when nobody waits.")] = 5.0,
    grace: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="From SIGTERM or Ctrl-C to the end, such as 30s; else LORA_GRACE."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="The GPU to train on, such as cuda:1, or cpu; else LORA_DEVICE.")
    ] = None,
    pool: Annotated[
        str | None, typer.Option(metavar="NAME", help="Take runs of this Prefect work pool; needs a Prefect server.")
    ] = None,
    metrics_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Serve metrics and health; else LORA_METRICS_PORT.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Do what is due: fire schedules, train waiting jobs in cohorts, sweep up.  No Prefect server is needed.

    Start one for each GPU, on any number of machines.  Told to go, it saves who is unfinished for another worker.
    With --pool Prefect's server decides what it runs, and shows it.

    lora work --once

    lora work --device cuda:1 --grace 2m

    lora work --pool gpu --device cuda:1
    """
    if pool and (once or as_json):
        raise typer.BadParameter("--pool goes on for ever and reports to Prefect; leave out --once and --json")
    if pool and metrics_port is not None:
        raise typer.BadParameter("runs of a pool are in the figures of `lora metrics`; leave out --metrics-port")
    from flows.presence import watched

    factory = Factory.from_environment(memory=memory, grace=grace, device=device, metrics_port=metrics_port)
    leave = Leave(factory.settings.grace)
    if pool:
        raise typer.Exit(serve_pool(factory, leave, pool))
    set_up_logs(factory.settings)
    factory.set_up()
    with on_signals(leave, remark), watched(factory):
        if once:
            work_once(factory, leave, as_json)
        else:
            work_on(factory, leave, every, as_json)


def serve_pool(factory: Factory, leave: Leave, pool: str) -> int:
    """Be the worker of a Prefect work pool; its exit code.  Raises Unready, DeviceMissing."""
    from flows.pool import check_server, health_port, serve
    from lora_core.base_model import check_device

    if not os.environ.get("PREFECT_API_URL"):
        raise Unready("no Prefect server is named", "set PREFECT_API_URL, or leave out --pool to work without one")
    settings = factory.settings
    check_device(settings.device or "cpu")
    check_server()
    given = {"LORA_GRACE": f"{settings.grace:g}s", "LORA_DEVICE": settings.device}
    given |= {"LORA_MEMORY": str(int(settings.memory))} if settings.memory else {}
    ports = {"PREFECT_WORKER_WEBSERVER_PORT": health_port(settings.device)}
    return serve(pool, leave, {**ports, **os.environ, **given}, remark)


def work_once(factory: Factory, leave: Leave, as_json: bool) -> None:
    """Train all who wait, show them, then keep up; exit codes are those of `lora train`."""
    rows: list[dict[str, str]] = []
    try:
        tick(factory)
        for trained in cohorts(factory, None, as_json, leave, partial(tick, factory)):
            rows += trained
    except TROUBLES:  # with a later cohort: what became of the earlier ones is known
        if rows:
            show(rows, as_json)
        raise
    if rows or not leave.asked:
        show(rows, as_json)
    if not leave.asked:
        tidy_up(factory)
        exit_as(rows)


def work_on(factory: Factory, leave: Leave, every: float, as_json: bool) -> None:
    """Cohort after cohort until told to leave.  Each is shown when it ends; upkeep has its turn however many wait."""
    tidied = -math.inf
    while not leave.asked:
        rows = next_cohort(factory, leave, every, as_json)
        if rows:
            show(rows, as_json)
        if not leave.asked and time.monotonic() - tidied >= UPKEEP_SECONDS:
            tidy_up(factory)
            tidied = time.monotonic()
        pause = every if rows is None else 0.0
        factory.pulse.rest(pause)
        leave.idle(pause)


def next_cohort(factory: Factory, leave: Leave, every: float, quiet: bool) -> list[dict[str, str]] | None:
    """Fire schedules, and train one cohort; None when nobody waits, or with database or store away, which is told."""
    try:
        tick(factory)
        return next(cohorts(factory, None, quiet, leave, partial(tick, factory)), None)
    except TROUBLES as error:
        event("look failed", level=logging.WARNING, reason=str(error), next_look=f"in {every:g} s")
        return None


def tidy_up(factory: Factory) -> None:
    """Keep up; what fails is told, and does not hold up the training."""
    from flows.upkeep import keep_up

    try:
        troubles = keep_up(factory)
    except TROUBLES as error:
        troubles = [str(error)]
    for trouble in troubles:
        event("not kept up", level=logging.WARNING, reason=trouble)


def tick(factory: Factory) -> None:
    """Turn everybody who is due into jobs; who could not be is told."""
    from flows.due import fire_due

    for one in fire_due(factory):
        if one.result == "not queued":
            whose = Reference.parse(one.label)
            with suppress(NotFound), reading(factory.engine) as session:  # of a user who was forgotten just now
                tenant = queries.tenant_id(session, whose.tenant)
                user = queries.holder(session, tenant, whose.user, whose.adapter).user
                event("not queued", level=logging.WARNING, whose=(whose, user.opaque), reason=one.why)
