"""Prometheus metrics of one worker, from its own pulse: what `lora work --metrics-port` serves."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from flows.logs import TALLY
from flows.pulse import WEIGHTS, Pulse

PHASES = ("idle", "prepare", *WEIGHTS)
# Events that dashboard and alarms ask for: a counter that begins at 1 has not grown, as Prometheus sees it.
ASKED_FOR = ("version published", "not published", "lease lost", "job failed")


class WorkerMetrics(Collector):
    """Slots, tokens and steps of this process, now and since it began."""

    def __init__(self, pulse: Pulse, slots: int) -> None:
        self.pulse, self.slots = pulse, slots
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """The pulse as metrics."""
        pulse, look = self.pulse, self.pulse.look
        for name, words, value in (
            ("slots", "Slots there are.", self.slots),
            ("slots_used", "Slots that train somebody.", look.training),
            ("learners_waiting", "Of this cohort, for a slot.", look.waiting),
            ("tokens_per_second", "Tokens read, over the last minute.", look.tokens_per_second),
            ("progress_ratio", "How much of the cohort's way is done.", look.share),
            ("idle_seconds", "Since anything happened here.", pulse.idle_for()),
        ):
            yield GaugeMetricFamily(f"lora_worker_{name}", words, value)
        phase = GaugeMetricFamily("lora_worker_phase", "1 for the step that it is at.", labels=["phase"])
        for one in PHASES:
            phase.add_metric([one], float(one == look.phase))
        yield phase
        for name, words, value in (
            ("tokens", "Tokens of examples read.", pulse.tokens_total),
            ("room_tokens", "Tokens there was room for.", pulse.room_total),
            ("micro_steps", "Forward and backward passes.", pulse.micro_steps_total),
        ):
            yield CounterMetricFamily(f"lora_worker_{name}", words, value)
        events = CounterMetricFamily("lora_worker_events", "What happened, as logs call it.", labels=["event"])
        for event, count in sorted((dict.fromkeys(ASKED_FOR, 0) | TALLY).items()):
            events.add_metric([event], count)
        yield events
