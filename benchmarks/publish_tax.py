"""What publishing adds to training: `python benchmarks/publish_tax.py`.

A cohort of 16 users of 20 to 320 examples trains on a base of six layers of width 256, as a worker trains it: claimed
from a real PostgreSQL, published to a real Ceph RGW on the same machine.  The clock is on the steps that train, judge
and publish; off, everybody is published after it has stopped.  Those who are done are judged eight at a time on both
sides, however long the first of them waits: else the clock itself decides how many are.  In turn, in one process.

    tax = (seconds with publishing on) / (seconds with it off) - 1.
"""

import argparse
import json
import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.command_line import end_when_told, from_one
from benchmarks.measuring import RESULTS, machine_facts, ratios, save, say
from benchmarks.storms.servers import running_site
from flows import cohort as steps
from flows import outgoing
from flows.demo.corpus import QUESTIONS, answer, some_appointment, some_style
from flows.demo.tiny_base import Plan, make_base
from flows.factory import Factory, add_data, pin_base, request_training
from flows.work import run_cohort
from lora_core.recipe import make_recipe
from registry.names import Reference
from registry.session import transaction

USERS, FEWEST = 16, 20  # examples of the smallest; the others have two, three ... sixteen times as many
SETTINGS = {
    "rank": 8, "learning_rate": 1e-3, "epochs": 1, "batch_rows": 1, "row_tokens": 256, "max_length": 256,
    "gate.significance": 1.0,
}  # fmt: skip


def write_data(path: Path, examples: int, seed: int) -> Path:
    """A user's file: questions, answered in the user's own way."""
    rng = random.Random(seed)
    style = some_style(rng)
    appointments = [some_appointment(rng) for _ in range(examples)]
    lines = [
        {"messages": [{"role": "user", "content": f"{about.note} {rng.choice(QUESTIONS)} {number}"},
                      {"role": "assistant", "content": answer(about, style)}]}
        for number, about in enumerate(appointments)
    ]  # fmt: skip
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


def add_users(factory: Factory, folder: Path) -> list[Reference]:
    """Everybody's data, in the registry and the store."""
    users = [Reference("acme", f"user-{number:02}") for number in range(USERS)]
    for number, user in enumerate(users):
        add_data(factory, user, [str(write_data(folder / f"{number}.jsonl", FEWEST * (number + 1), number))])
    return users


@contextmanager
def kept_back(on: bool) -> Iterator[None]:
    """Whoever is done is not published while others train, unless it is on."""
    if on:
        yield
        return
    with patch.object(steps, "publish_some", lambda *_: None):
        yield


def seconds_of(factory: Factory, users: list[Reference], seed: int, on: bool) -> float:
    """How long a cohort of everybody trains; all are published in the end."""
    recipe, base, taken = make_recipe(SETTINGS | {"seed": seed}), pin_base(factory), []
    with transaction(factory.engine) as session:
        for user in users:
            request_training(session, user, base, recipe)

    def do(step: Callable[..., Any], *arguments: Any) -> Any:  # whatever the step takes and gives
        with kept_back(on or step is steps.publish_all):
            start = time.perf_counter()
            found = step(*arguments)
        if step in ((steps.train, steps.judge, steps.publish_all) if on else (steps.train, steps.judge)):
            taken.append(time.perf_counter() - start)
        return found

    cohort = run_cohort(factory, do=do)
    assert cohort is not None
    assert len(cohort.versions) == USERS, cohort.failed
    return sum(taken)


def main() -> None:
    """Measure, say, and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=from_one, default=7)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    end_when_told()
    with tempfile.TemporaryDirectory() as name, ExitStack() as servers:
        servers.enter_context(patch.object(outgoing, "PATIENCE_SECONDS", math.inf))
        folder = Path(name)
        folder.chmod(0o755)  # PostgreSQL runs as another user where this one is root
        site = servers.enter_context(running_site(folder, False, {}, prefect=False))
        plan = Plan(vocabulary=512, width=256, inner=704, layers=6, heads=8, steps=20)
        os.environ.update(site.environment | {"LORA_BASE": str(make_base(folder / "base", plan=plan))})
        factory = Factory.from_environment(slots=USERS)
        users = add_users(factory, folder)
        seconds: dict[str, list[float]] = {"on": [], "off": []}
        for number in range(options.rounds + 1):
            for side in sorted(seconds, reverse=bool(number % 2)):  # who is first changes
                took = seconds_of(factory, users, 2 * number + (side == "on"), side == "on")
                say(f"{'warm-up' if not number else f'round {number}'}, {side}: {took:.2f} s")
                seconds[side] += [took] if number else []  # the first round warms up
    taxes = sorted(ratio - 1 for ratio in ratios(seconds["on"], seconds["off"]))
    say(f"publishing adds {median(taxes):+.2%} ({taxes[0]:+.2%} to {taxes[-1]:+.2%})")
    result = {"users": USERS, "seconds": seconds, "taxes": taxes}
    save(options.results / "publish_tax.json", machine_facts(torch.device("cpu")), [result])


if __name__ == "__main__":
    main()
