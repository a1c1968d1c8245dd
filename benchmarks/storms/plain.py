"""The training itself: the same users in as many processes and slots, and nothing around it.

Each process has its share of the users from the start; whoever is done leaves the slot to the next, as in a worker.  No
queue, no database, no store, no Prefect: snapshots come from local files, adapters go to local files.
"""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.crew import crew
from benchmarks.storms.crowd import RECIPE, Crowd
from flows.candidates import Candidate, judge_candidates, make_candidate, training_bank
from flows.guests import train_candidates
from lora_core.artifact import write_artifact
from lora_core.base_model import BaseModel, load_base
from lora_core.data.snapshot import load_snapshot
from lora_core.planner import Plan
from lora_core.recipe import make_recipe


@dataclass(frozen=True)
class Plain:
    """What the training itself takes: wall from the first step, and CPU of all processes."""

    users: int
    wall_seconds: float
    cpu_seconds: float
    by_step: dict[str, float]  # seconds in each step, summed over processes


def train_plainly(crowd: Crowd, folder: Path, users: int, processes: int, slots: int) -> Plain:
    """Train, judge and write the first users; data are prepared and bases loaded before the clock starts."""
    folder.mkdir(parents=True)
    for number in range(users):
        snapshot = crowd.snapshot(number, folder)
        (folder / f"{number}.{snapshot.digest}").write_bytes(snapshot.content)
    files = sorted(folder.iterdir())
    shares = [files[number::processes] for number in range(processes)]
    with crew(processes, _load, (str(crowd.base),)) as pool:
        start = time.monotonic()
        found = list(pool.map(_train, shares, [slots] * processes))
        wall = time.monotonic() - start
    steps = {name: round(sum(one[name] for one in found), 2) for name in found[0]}
    return Plain(users, wall, steps.pop("cpu"), steps)


_base: BaseModel | None = None  # of this process


def _load(folder: str) -> None:
    global _base
    _base = load_base(folder, None, "cpu")


def _train(files: Sequence[Path], slots: int) -> dict[str, float]:
    """One process's share; seconds by step."""
    assert _base  # loaded when the process began
    marks = [time.monotonic()]
    cpu = time.process_time()
    candidates = [_candidate(_base, file) for file in files]
    marks.append(time.monotonic())
    plan = Plan(slots, candidates[0].recipe.row_tokens, compiled=False)
    assert len(list(train_candidates(_base, candidates, plan))) == len(candidates)
    marks.append(time.monotonic())
    judge_candidates(_base, candidates, plan.slots, plan.row_tokens)
    marks.append(time.monotonic())
    _write(_base, candidates, files)
    marks.append(time.monotonic())
    names = ("prepare", "train", "judge", "write")
    spans = dict(zip(names, (end - start for start, end in itertools.pairwise(marks)), strict=True))
    return spans | {"cpu": time.process_time() - cpu}


def _candidate(base: BaseModel, file: Path) -> Candidate:
    snapshot = load_snapshot(file.read_bytes(), file.suffix.removeprefix("."))
    return make_candidate(file.stem, make_recipe(RECIPE), snapshot, base)


def _write(base: BaseModel, candidates: Sequence[Candidate], files: Sequence[Path]) -> None:
    bank = training_bank(base, candidates)
    for candidate, file in zip(candidates, files, strict=True):
        assert candidate.trained
        spec = candidate.recipe.method
        scores = {name: figures.summary() for name, figures in candidate.scores.items()}
        tensors = bank.to_tensors(candidate.trained.row_P, spec)
        folder = file.with_suffix(".adapter")
        folder.mkdir()
        for name, data in write_artifact(base, spec, tensors, {"scores": scores}).items():
            (folder / name).write_bytes(data)
