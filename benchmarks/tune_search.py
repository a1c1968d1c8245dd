"""What a search by successive halving finds, and what it costs, over the same grid trained to the end.

For each of the demo's users the grid that `lora tune` searches by default, on the demo's base (--set search.rank and
so on: another grid; --texts: users of plain English): halved, in full with the same slots, and in full by a plain PEFT
loop, one trial after the other, with the same batches, schedule, examinations and early stop.  With --together, all
users' searches in one cohort, as a worker trains those who wait, against the loops of all, in rounds.  Gap: how far the
best held-out loss that halving found lies above the full grid's.  Tokens: of examples trained on, over the full grid's.
Seconds: the three take turns, user by user; a short turn of each warms up.  Processor seconds are kept too: with
OMP_NUM_THREADS=1 they hold beside other work.  Absolute times are not for comparing machines.
"""

import argparse
import json
import math
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics
from textwrap import wrap

import torch

from benchmarks.measuring import Samples, Side, alternate, machine_facts, ratios, save, say, spread, timed
from benchmarks.peft_loop import train_with_peft
from flows.candidates import make_candidate
from flows.demo.people import write_people
from flows.demo.run import recipe as demo_recipe
from flows.demo.tiny_base import make_base
from lora_core.banks.table import make_bank
from lora_core.base_model import BaseModel, load_base
from lora_core.data.snapshot import SkipPolicy, take_snapshot
from lora_core.halving import Halving, around
from lora_core.learner import Learner, Trained
from lora_core.methods import AnyMethod
from lora_core.recipe import Recipe, load_recipe
from lora_core.train import train

CPU = torch.device("cpu")
PASSAGE, PASSAGES = 60, 110  # characters, at most; how many a user has
GOALS = {"gap": 0.005, "tokens": 0.40, "speed": 5.0}


@dataclass
class Measured:
    """What is kept of a user: best held-out losses, tokens trained on, seconds of the clock and of the processor."""

    user: str
    trials: int
    slots: int
    losses: dict[str, float]
    tokens: dict[str, int]
    seconds: dict[str, float]
    processor_seconds: dict[str, float]
    winner: float

    @property
    def gap(self) -> float:
        """How far above the full grid's best loss halving's lies, in its share."""
        return self.losses["halving"] / self.losses["grid"] - 1

    @property
    def share(self) -> float:
        """Of the full grid's tokens."""
        return self.tokens["halving"] / self.tokens["grid"]


def measure(base: BaseModel, user: Learner, slots: int, with_peft: bool) -> Measured:
    """All sides on one user."""
    search = Halving(user, _rank)
    trials = list(search.trials.values())
    plain = [replace(trial, referee=None) for trial in trials]
    trained: dict[str, list[Trained]] = {}
    peft: list[float] = []
    sides: dict[str, Side] = {
        "halving": lambda: trained.update(halving=run(base, trials, slots)),
        "grid": lambda: trained.update(grid=run(base, plain, slots)),
    }
    if with_peft:
        sides["peft"] = lambda: peft.extend(train_with_peft(base, trial) for trial in plain)
    seconds, processor_seconds = {}, {}
    for name, side in sides.items():
        before = time.process_time()
        seconds[name] = timed(side, CPU)
        processor_seconds[name] = time.process_time() - before
    reports = search.reports({one.name: one for one in trained["halving"]})
    losses = {
        "halving": min(report.loss for report in reports if report.ended),
        "grid": min(best(one) for one in trained["grid"] if one.outcome != "retired"),
    }
    if with_peft:
        losses["peft"] = min(peft)
    tokens = {name: sum(one.tokens for one in results) for name, results in trained.items()}
    winner = next(report.loss for report in reports if report.won)
    return Measured(user.name, len(trials), slots, losses, tokens, seconds, processor_seconds, winner)


def measure_together(base: BaseModel, chosen: Sequence[Learner], slots: int, rounds: int) -> Samples:
    """Seconds of the searches of all users in one cohort, and of PEFT's loops over their grids, in turn."""
    grids = [trial for user in chosen for trial in Halving(user, _rank).trials.values()]

    def search() -> None:
        searches = [Halving(user, _rank) for user in chosen]  # anew: what was told once stays told
        run(base, [trial for one in searches for trial in one.trials.values()], slots)

    def peft() -> None:
        for trial in grids:
            train_with_peft(base, trial)

    return alternate({"halving": search, "peft": peft}, rounds, CPU)


def _rank(spec: AnyMethod) -> int:
    return getattr(spec, "rank", 0)


def run(base: BaseModel, learners: Sequence[Learner], slots: int) -> list[Trained]:
    """Trials packed, in the bank that holds them all."""
    bank = make_bank(base, [learner.recipe.method for learner in learners])
    return list(train(base, learners, slots, learners[0].recipe.row_tokens, bank))


def best(trained: Trained) -> float:
    """Its lowest held-out loss: that of the row that is kept."""
    return min(loss for _, loss in trained.held_out)


def users(base: BaseModel, recipe: Recipe, files: Mapping[str, Path]) -> list[Learner]:
    """As a cohort would make them from these files."""
    snapshots = {name: take_snapshot([str(file)], SkipPolicy(0.1))[0] for name, file in files.items()}
    return [make_candidate(name, recipe, snapshot, base).learner for name, snapshot in snapshots.items()]


def write_habits(home: Path, seed: int) -> dict[str, Path]:
    """The demo's users; another seed is other examples of the same habits."""
    return {one.user: one.file for one in write_people(home, seed)}


def write_texts(home: Path, seed: int) -> dict[str, Path]:
    """Eight users of plain English: passages of Python's own help, a long topic each; file by topic.

    What such text says next is open, unlike the demo's answers: losses are nats, not hundredths of one.
    """
    home.mkdir()
    files = {}
    for topic in sorted(topics, key=lambda name: -len(topics[name]))[:8]:
        passages = [passage for passage in wrap(topics[topic], PASSAGE) if len(passage) > PASSAGE // 2]
        chosen = random.Random(f"{seed}/{topic}").sample(passages, PASSAGES)
        files[topic] = home / f"{topic}.jsonl"
        files[topic].write_text("".join(json.dumps({"text": passage}) + "\n" for passage in chosen))
    return files


def show(result: Measured) -> str:
    """One line of the table."""
    losses = " ".join(f"{result.losses.get(name, math.nan):>8.5f}" for name in ("grid", "halving", "peft"))
    times = " ".join(f"{name} {seconds:.1f} s" for name, seconds in result.seconds.items())
    return f"{result.user:>15} {losses} {result.gap:>7.2%} {result.share:>7.1%}   {times}"


def summary(results: Sequence[Measured]) -> str:
    """The worst gap and share, and the ratios of times, with what is wanted."""
    lines = [
        f"gap at most {max(one.gap for one in results):.2%} [{GOALS['gap']:.1%}], "
        f"{sum(one.gap <= GOALS['gap'] for one in results)} of {len(results)} users within",
        f"tokens at most {max(one.share for one in results):.1%} [{GOALS['tokens']:.0%}]",
    ]
    for kind in ("seconds", "processor_seconds"):
        times = [getattr(one, kind) for one in results]
        for other in times[0].keys() - {"halving"}:
            over = ratios([one[other] for one in times], [one["halving"] for one in times])
            wanted = f" [{GOALS['speed']:g}x]" if other == "peft" else ""
            lines.append(f"{kind}, {other} / halving: {spread(over)}{wanted}")
    return "\n".join(lines)


def main() -> None:
    """Print the table and keep the raw samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="the demo's base where it is made already")
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--together", type=int, metavar="ROUNDS", default=0, help="all users in one cohort")
    parser.add_argument("--texts", action="store_true", help="users of plain English instead of the demo's")
    parser.add_argument("--seed", type=int, default=0, help="of the users' examples")
    parser.add_argument("--without-peft", action="store_true", help="only what is found and what it reads")
    parser.add_argument("--set", nargs="*", default=[], help="recipe keys other than the demo's")
    parser.add_argument("--save", type=Path, help="write raw samples as JSON")
    options = parser.parse_args()
    machine = machine_facts(CPU)
    say(machine)
    with tempfile.TemporaryDirectory() as home:
        base = load_base(str(options.base or make_base(Path(home) / "base")), None, "cpu")
        asked = load_recipe(None, options.set).model_dump(exclude_unset=True)
        recipe = around(Recipe.model_validate(demo_recipe().model_dump() | asked))
        files = (write_texts if options.texts else write_habits)(Path(home) / "people", options.seed)
        chosen = users(base, recipe, files)[: options.users]
    if options.together:
        seconds = measure_together(base, chosen, options.slots, options.together)
        over = ratios(seconds["peft"], seconds["halving"])
        say(f"{len(chosen)} users together, peft / halving: {spread(over)} [{GOALS['speed']:g}x]")
        if options.save:
            save(options.save, machine, [{"users": len(chosen), "slots": options.slots, "seconds": seconds}])
        return
    short = chosen[0].recipe.model_copy(update={"epochs": 1, "max_steps": 8})
    measure(base, replace(chosen[0], recipe=short), options.slots, not options.without_peft)  # warms up
    say(f"{'user':>15} {'grid':>8} {'halving':>8} {'peft':>8} {'gap':>7} {'tokens':>7}")
    results = []
    for user in chosen:
        results.append(measure(base, user, options.slots, not options.without_peft))
        say(show(results[-1]))
    say(summary(results))
    if options.save:
        save(options.save, machine, [asdict(one) for one in results])


if __name__ == "__main__":
    main()
