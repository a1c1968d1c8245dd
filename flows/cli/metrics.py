"""`lora metrics`: what Prometheus asks about the whole factory; without torch or Prefect."""

import signal
import sys
import threading
from typing import Annotated

import typer

from flows.cli.printing import remark
from flows.factory import Factory, now
from flows.logs import set_up_logs


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(metrics)


def metrics(
    port: Annotated[int, typer.Option(min=0, max=65535, help="To listen on; 0 takes a free one.")] = 9465,
    host: Annotated[str, typer.Option(help="Address to listen on; empty for all.")] = "",
    once: Annotated[
        bool, typer.Option("--once", help="Print them once instead, as Prometheus would read them.")
    ] = False,
) -> None:
    """Serve /metrics, /healthz and /readyz: queue, workers, versions and failures of all tenants, from the registry.

    One such process is enough for a factory, however many workers there are and however long they live.

    lora metrics --port 9465
    """
    from prometheus_client import generate_latest

    from flows.endpoint import Endpoint, reachable, served
    from flows.metrics import FactoryMetrics

    factory = Factory.from_environment()
    set_up_logs(factory.settings)
    found = FactoryMetrics(factory.engine, now)
    found.refresh()
    if once:
        typer.echo(generate_latest(found.registry).decode(), nl=False)
        return
    endpoint = Endpoint(found.registry, dict, reachable(factory), found.refresh)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # else the first process of a container would not hear it
    with served(endpoint, port, host) as listening:
        remark(f"serving /metrics, /healthz and /readyz on port {listening}")
        threading.Event().wait()
