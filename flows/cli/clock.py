"""`lora clock`: schedules into jobs and jobs into runs of Prefect's workers, once a minute; without torch."""

import os
import signal
import sys
from contextlib import ExitStack
from typing import Annotated

import typer

from flows.errors import Unready
from flows.factory import Factory
from flows.logs import set_up_logs


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(clock)


def clock(
    deployment: Annotated[
        str, typer.Option(metavar="FLOW/NAME", help="What is run when jobs wait: a deployment of Prefect's.")
    ] = "adapt-cohort/adapt-cohort",
    every: Annotated[float, typer.Option(min=1, max=3600, help="Seconds from tick to tick.")] = 60,
    metrics_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Serve metrics and health; else LORA_METRICS_PORT.")
    ] = None,
) -> None:
    """Ask who is due, and ask Prefect for the runs they need: for workers of a pool, `lora work --pool`.

    One is enough for a factory; two do no harm, and one that was away catches up.  Each tick is a flow run in Prefect.

    lora clock --metrics-port 9466
    """
    flow, _, name = deployment.partition("/")
    if not (flow and name):
        raise typer.BadParameter(f"{deployment} is no FLOW/NAME; `prefect deployment ls` shows those there are")
    if not os.environ.get("PREFECT_API_URL"):
        raise Unready("no Prefect server is named", "set PREFECT_API_URL; `lora work` without --pool needs no clock")
    from flows.clock import Ticks, keep_time
    from flows.endpoint import Endpoint, moving, reachable, served
    from flows.ticking import make_tick

    factory, ticks = Factory.from_environment(metrics_port=metrics_port), Ticks()
    set_up_logs(factory.settings)
    factory.set_up()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # a tick may end anywhere: its batches are transactions
    with ExitStack() as stack:
        if port := factory.settings.metrics_port:
            stack.enter_context(served(Endpoint(ticks.registry, moving(factory), reachable(factory)), port))
        keep_time(factory, make_tick(factory, deployment), ticks, every)
