"""A process that trains, seen from outside: what it does stands in the registry while it lives."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import torch

from flows.endpoint import Endpoint, moving, reachable, served
from flows.factory import Factory, now
from flows.pulse import Listener, Look, told
from flows.worker_metrics import WorkerMetrics
from registry import workers
from registry.errors import RegistryError
from registry.session import transaction


@contextmanager
def at_work(factory: Factory, *listeners: Listener) -> Iterator[None]:
    """Say every few seconds what this worker does, to the registry and whoever listens; it leaves in order."""
    settings = factory.settings
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")

    def to_registry(look: Look) -> None:
        with transaction(factory.engine) as session:
            workers.tell(session, settings.worker, device, settings.slots, look.facts(), now())

    try:
        with told(factory.pulse, [to_registry, *listeners]):
            yield
    finally:
        with suppress(RegistryError), transaction(factory.engine) as session:
            workers.leave(session, settings.worker)


@contextmanager
def watched(factory: Factory) -> Iterator[None]:
    """As `at_work`, with metrics and health on LORA_METRICS_PORT, where one is given."""
    with ExitStack() as stack:
        if port := factory.settings.metrics_port:
            metrics = WorkerMetrics(factory.pulse, factory.settings.slots)
            endpoint = Endpoint(metrics.registry, moving(factory), reachable(factory))
            stack.enter_context(served(endpoint, port))
        stack.enter_context(at_work(factory))
        yield
