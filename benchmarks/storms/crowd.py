"""Who is due: users with a few examples each in several tenants, added as anybody's data are, all due at one moment."""

import json
import os
import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path

from flows.demo.corpus import QUESTIONS, answer, some_appointment, some_style
from flows.demo.tiny_base import Plan, make_base
from flows.factory import Factory, now
from lora_core.data.snapshot import Snapshot, take_snapshot
from lora_core.recipe import make_recipe
from registry import queries, schedules
from registry.datasets import Content, add_dataset
from registry.names import Reference
from registry.session import transaction
from registry.timing import Timing

TENANTS = ("acme", "globex", "initech", "umbrella", "hooli")
RECIPE: Mapping[str, object] = {
    "rank": 4, "learning_rate": 5e-3, "epochs": 4, "batch_size": 4, "row_tokens": 256, "max_length": 256,
    "warmup": 0.1, "holdout.minimum": 4, "gate.significance": 1.0,
}  # fmt: skip
_CHUNK = 50  # users added by one process in one go


@dataclass(frozen=True)
class Crowd:
    """So many users, the same ones whenever the seed is the same."""

    users: int
    seed: int
    base: Path

    def reference(self, number: int) -> Reference:
        """Whose adapter it is: users are dealt out to the tenants in turn."""
        return Reference(TENANTS[number % len(TENANTS)], f"user-{number:06}")

    def rows(self, number: int) -> bytes:
        """A user's file: 12 to 20 questions, answered in the user's own way."""
        rng = random.Random(f"{self.seed}/{number}")
        style = some_style(rng)
        appointments = [some_appointment(rng) for _ in range(rng.randint(12, 20))]
        lines = [
            json.dumps({"messages": [
                {"role": "user", "content": f"{about.note} {rng.choice(QUESTIONS)}"},
                {"role": "assistant", "content": answer(about, style)},
            ]})
            for about in appointments
        ]  # fmt: skip
        return "".join(f"{line}\n" for line in lines).encode()

    def snapshot(self, number: int, folder: Path) -> Snapshot:
        """The same as data are read: from a file, checked and deduplicated."""
        file = folder / f"{number}.jsonl"
        file.write_bytes(self.rows(number))
        found, _ = take_snapshot([str(file)])
        file.unlink()
        return found


def make_crowd(users: int, seed: int, folder: Path, width: int = 64, layers: int = 2) -> Crowd:
    """The base that they share, trained for a few seconds, and the users."""
    plan = Plan(vocabulary=512, width=width, inner=3 * width, layers=layers, steps=150)
    return Crowd(users, seed, make_base(folder / "base", seed=seed, plan=plan))


def add_everybody(crowd: Crowd, environment: Mapping[str, str]) -> None:
    """Add everybody's data, and a daily schedule of which today's moment has just come."""
    chunks = [range(start, min(start + _CHUNK, crowd.users)) for start in range(0, crowd.users, _CHUNK)]
    workers = os.cpu_count() or 1
    with ProcessPoolExecutor(workers, get_context("spawn"), _settle, (dict(environment),)) as pool:
        for _ in pool.map(_add, [crowd] * len(chunks), chunks):
            pass


def _settle(environment: Mapping[str, str]) -> None:
    os.environ.update(environment)


_connected: Factory | None = None  # of this process


def _factory() -> Factory:
    global _connected
    _connected = _connected or Factory.from_environment()
    return _connected


def _add(crowd: Crowd, numbers: Sequence[int]) -> None:
    factory = _factory()
    factory.settings.home_folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        snapshot = crowd.snapshot(number, factory.settings.home_folder)
        content = Content(snapshot.digest, snapshot.content, len(snapshot.examples))
        add_dataset(factory.engine, factory.store, crowd.reference(number), content, now())
    yesterday = now() - timedelta(days=1)
    recipe, timing = make_recipe(RECIPE).model_dump(mode="json"), Timing.every("1d")
    with transaction(factory.engine) as session:
        for number in numbers:
            holder = queries.ensure_adapter(session, crowd.reference(number), yesterday)
            schedules.put(session, holder.tenant_id, holder, timing, str(crowd.base), recipe, yesterday)
