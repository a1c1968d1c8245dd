"""How benchmarks are timed and what is kept: turns, spread, floors, the machine, files.

What runs is in `sides.py`.  Sides take turns (A-B-A-B) in one process; a first round warms up and is not kept, every
later sample is.
"""

import argparse
import gc
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import TypeVar

import peft
import torch
import transformers
from torch.profiler import ProfilerActivity, profile

from lora_core.train import Pace

Samples = dict[str, list[float]]  # seconds of every kept block, by side
Side = Callable[[], None]
Choice = TypeVar("Choice")
Result = TypeVar("Result")

RESULTS = Path(__file__).parent / "results"
# Dense bf16 FLOP/s and bytes/s from the data sheets; no program reaches them.
PEAKS = {"H200": (989e12, 4.8e12), "H100": (989e12, 3.35e12), "A100": (312e12, 2.0e12)}


class Enough(Exception):
    """All rounds are measured: the training loop need not go on."""


class Budget:
    """The minutes that a script may take."""

    def __init__(self, minutes: float) -> None:
        self._until = time.monotonic() + 60 * minutes

    @property
    def spent(self) -> bool:
        """Whether nothing new should begin."""
        return time.monotonic() > self._until


def settle(device: torch.device) -> None:
    """Wait until the device has done everything it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(side: Side, device: torch.device) -> float:
    """Seconds of one call, with nothing left over from before or behind."""
    settle(device)
    start = time.perf_counter()
    side()
    settle(device)
    return time.perf_counter() - start


def alternate(sides: Mapping[str, Side], rounds: int, device: torch.device) -> Samples:
    """Every side once a round, one after the other."""
    samples: Samples = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            seconds = timed(side, device)
            if number:  # the first round warms up
                samples[name].append(seconds)
    return samples


class Turns:
    """Blocks of the training loop's own micro-steps in turn with other sides: `train` takes it as its `watch`.

    `loop` names the blocks, each with what to do before it; `others` run between them.  Raises Enough after the last
    round, or after any kept one once the budget is spent.
    """

    def __init__(
        self, loop: Mapping[str, Side], others: Mapping[str, Side], block: int, rounds: int, device: torch.device,
        budget: Budget,
    ) -> None:  # fmt: skip
        self.loop, self.others, self.block, self.rounds = loop, others, block, rounds
        self.device, self.budget = device, budget
        self.samples: Samples = {name: [] for name in (*loop, *others)}
        self._play = self._rounds()
        next(self._play)

    def __call__(self, pace: Pace) -> None:
        """Go on after a micro-step."""
        next(self._play)

    @property
    def micro_steps(self) -> int:
        """How many the loop must be able to take."""
        return self.block * len(self.loop) * (self.rounds + 1)

    def _rounds(self) -> Iterator[None]:
        for number in range(self.rounds + 1):
            for name, prepare in self.loop.items():
                prepare()
                settle(self.device)
                start = time.perf_counter()
                for _ in range(self.block):
                    yield
                settle(self.device)
                self._keep(number, name, time.perf_counter() - start)
            for name, side in self.others.items():
                self._keep(number, name, timed(side, self.device))
            if number and self.budget.spent:
                break
        raise Enough

    def _keep(self, number: int, name: str, seconds: float) -> None:
        if number:  # the first round warms up
            self.samples[name].append(seconds)


def first_that_fits(choices: Sequence[Choice], run: Callable[[Choice], Result]) -> tuple[Choice, Result] | None:
    """The first choice that the device has memory for, and what it gave; None when all are too large."""
    for choice in choices:
        try:
            return choice, run(choice)
        except torch.OutOfMemoryError:
            pass
        release()
    return None


def release() -> None:
    """Give memory back, so that what comes next finds the device as if it were first."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def profiled_peak(side: Side) -> int:
    """The most bytes that one call holds on the CPU beyond what was there, by the memory events of torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
        side()
    now = peak = 0
    results = events.profiler.kineto_results if events.profiler else None
    for event in results.events() if results else ():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """One ratio a round."""
    return [a / b for a, b in zip(over, under, strict=True)]


def spread(values: Sequence[float], unit: str = "x") -> str:
    """Median (lowest-highest)."""
    return f"{median(values):5.2f}{unit} ({min(values):.2f}-{max(values):.2f})"


@dataclass(frozen=True)
class Floor:
    """The least that a step must compute and move, whatever the program."""

    flops: float
    bytes: float

    def seconds(self, device: torch.device) -> float | None:
        """What both cost at the device's peak, the longer of the two; None where the peak is not known."""
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        peak = next((peak for part, peak in PEAKS.items() if part in name), None)
        return max(self.flops / peak[0], self.bytes / peak[1]) if peak else None

    def show(self, device: torch.device) -> str:
        """For a table: TFLOP, GB, and milliseconds where the peak is known."""
        seconds = self.seconds(device)
        least = "peak unknown" if seconds is None else f"{1e3 * seconds:.1f} ms"
        return f"{least} ({self.flops / 1e12:.3g} TFLOP, {self.bytes / 1e9:.3g} GB)"


def processor() -> str:
    """The processor's own name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def machine_facts(device: torch.device) -> dict[str, str]:
    """What a figure was measured on."""
    if device.type == "cuda":
        machine = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    else:
        machine = f"{processor()}, {torch.get_num_threads()} threads"
    return {
        "date": datetime.now(UTC).date().isoformat(), "machine": machine, "python": platform.python_version(),
        "torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__,
    }  # fmt: skip


def gpu_parser(doc: str | None, rounds: int | None = None) -> argparse.ArgumentParser:
    """The command line that scripts for a GPU share; one that times nothing has no rounds."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if rounds:
        parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--minutes", type=float, default=8, help="nothing new begins after that")
    parser.add_argument("--results", type=Path, help="folder for raw samples")
    parser.add_argument("--tiny", action="store_true", help="shrunk bases on the CPU: shows that it runs, not how fast")
    return parser


def place(options: argparse.Namespace) -> tuple[torch.device, Path]:
    """Where a GPU script computes, and where its results go; those of a tiny run go where nobody looks."""
    if options.tiny:
        return torch.device("cpu"), options.results or Path(tempfile.mkdtemp())
    if not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU here; --tiny shows on the CPU that the script runs")
    return torch.device("cuda"), options.results or RESULTS


def save(path: Path, machine: Mapping[str, str], results: Sequence[object]) -> None:
    """Every raw sample, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n", encoding="utf-8")


def say(*words: object, sep: str = " ") -> None:
    """A line of a script's report."""
    print(*words, sep=sep, flush=True)  # noqa: T201  scripts report here and nowhere else
