"""Many users on a GPU, packed and otherwise: `python benchmarks/gpu_users.py`, one process, at most ten minutes.

64 users with four sequences of about 210 tokens a step, 50 steps.  Each side's seconds for one user's step, measured in
blocks in turn in one process, as a multiple of packed training's (above 1: packed is faster):

peft      one user after another: plain PEFT, one loaded base, fused AdamW, bf16 adapters, padded to one length
compiled  the same with its decoder layers compiled for that one shape
flat      the pattern others use, written by us from its description: tokens of all users in one flat batch, every
          user's A and B stacked on every forward from separate parameters, two grouped products, scale, add

Packed training pays for seating its users, spread over the 50 steps; the others pay nothing for theirs.  As many users
are packed at once as fit; more take their turns.  A sweep goes over tokens a user and step and draws where packing
stops paying; `--sweep none` leaves that out.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TypedDict

import torch

from benchmarks import measuring
from benchmarks.measuring import Budget, Samples, Side, Turns, first_that_fits, ratios, say, spread, timed
from benchmarks.sides import (
    SHAPES,
    Examples,
    Load,
    Shape,
    chosen_shape,
    compile_layers,
    fits,
    flat_twin,
    learners,
    packed_rows,
    peft_twin,
    random_base,
    run_flat,
    run_packed,
    run_peft,
    start_row,
    step_floor,
)
from lora_core.base_model import BaseModel
from lora_core.layers import compiled
from lora_core.learner import Learner

GOALS = {"0.5B": 10.0, "1B": 5.0, "4B": 2.5}  # least packed / PEFT loop
FAR_GOAL = 1.15  # least packed / PEFT loop at 16k tokens a user and step
USERS, STEPS, RANK = 64, 50, 16
OTHERS = ("peft", "compiled", "flat")
FOUR = Load(4, 196, 224)
# Tokens a user and step, in sequences of at most 512; the ends first, in case time runs out.
SWEEP = (16384, 256, 4096, 1024, 8192, 512, 2048)


@dataclass(frozen=True)
class Fit:
    """How much of the work is on the device at once."""

    slots: int
    row_tokens: int
    micro: int  # sequences that the PEFT loop reads at once


class Measured(TypedDict):
    """What is kept of a base and a load."""

    shape: str
    tokens: float  # a user and step, on average
    fit: dict[str, int]
    over: dict[str, list[float]]  # seconds of a user's step by side, as multiples of packed training's
    seconds: Samples  # of a user's step
    seating: float  # seconds a user
    floor: str  # of a step of all slots


def fillings(load: Load) -> list[Fit]:
    """What is tried, the most at once first."""
    sequence = load.longest
    whole = [Fit(64, sequence * n, load.sequences) for n in (4, 2) if n <= load.sequences and sequence * n <= 1024]
    fewer = [Fit(slots, sequence, min(load.sequences, micro)) for slots, micro in ((64, 8), (32, 8), (16, 8), (8, 4))]
    return [*whole, *fewer, Fit(4, sequence, min(load.sequences, 2))]


def measure(
    base: BaseModel, shape: Shape, load: Load, others: Sequence[str], options: argparse.Namespace, budget: Budget,
    fit: Fit,
) -> Measured:  # fmt: skip
    """Blocks of steps, at most as many as asked for: of all slots packed, and of the others, in turn."""
    device, micro_steps = base.model.device, load.rows(fit.row_tokens)
    steps, rounds = max(1, min(options.steps, 4096 // (load.sequences * load.longest))), options.rounds
    count = steps * (rounds + 1) + 1  # one more than is timed: nobody is copied out on the clock
    users = [load.examples(count, shape.vocabulary, seed) for seed in range(fit.slots)]
    recipe = load.recipe(RANK, fit.row_tokens)
    cohort = learners(recipe, users, start_row(base, recipe))
    sides = other_sides(base, load, users, fit, steps, others)

    turns = Turns({"packed": lambda: None}, sides, steps * micro_steps, rounds, device, budget)
    with compiled(base, options.compiled):
        run_packed(base, cohort, fit.row_tokens, turns)

    in_block = {name: steps * (1 if name in ("peft", "compiled") else fit.slots) for name in turns.samples}
    seconds = {name: [s / in_block[name] for s in samples] for name, samples in turns.samples.items()}
    fresh = learners(recipe, users)  # each draws a start of its own, which seating has to pay for
    seating = seating_seconds(base, fresh, fit, budget)
    paid = [s + seating / STEPS for s in seconds["packed"]]
    tokens = sum(len(example.tokens) for user in users for example in user) / len(users) / count
    floor = step_floor(base, shape, tokens * fit.slots, load.longest, fit.slots, RANK)
    return {
        "shape": shape.name, "tokens": tokens, "fit": asdict(fit), "seconds": seconds, "seating": seating,
        "over": {name: ratios(seconds[name], paid) for name in sides}, "floor": floor.show(device),
    }  # fmt: skip


def other_sides(
    base: BaseModel, load: Load, users: Sequence[Examples], fit: Fit, steps: int, wanted: Sequence[str]
) -> dict[str, Side]:
    """What runs between the packed blocks: `steps` steps of one user; for the flat pattern, of all slots."""
    few = users[0][: steps * load.sequences]
    sides: dict[str, Side] = {}
    for name in ("peft", "compiled"):
        if name in wanted:
            model = peft_twin(base, RANK)
            if name == "compiled":
                compile_layers(model, "inductor" if base.model.device.type == "cuda" else "aot_eager")
            sides[name] = partial(run_peft, model, few, load, fit.micro)
    if "flat" in wanted:
        flat = flat_twin(base, fit.slots, RANK)
        optimiser = torch.optim.AdamW([p for p in flat.model.parameters() if p.requires_grad], lr=2e-4, fused=True)
        micro_steps = load.rows(fit.row_tokens)
        sides["flat"] = lambda: run_flat(
            flat, packed_rows(users, load, fit.row_tokens, steps), micro_steps, optimiser
        )  # fmt: skip
    return sides


def seating_seconds(base: BaseModel, cohort: Sequence[Learner], fit: Fit, budget: Budget) -> float:
    """What it costs to let one user sit down: a run of all up to the first micro-step, without what one alone costs."""
    device = base.model.device

    def run(some: Sequence[Learner]) -> float:
        first = Turns({"packed": lambda: None}, {}, 1, 0, device, budget)
        return timed(lambda: run_packed(base, some, fit.row_tokens, first, fit.slots), device)

    run(cohort[:1])  # asks for the memory
    alone, everyone = run(cohort[:1]), run(cohort)
    return max(0.0, everyone - alone) / max(1, len(cohort) - 1)


HEADER = (
    f"{'base':>22} {'tokens':>6} {'K':>3} {'T':>5} {'packed ms':>9} {'seat ms':>8} {'PEFT loop':>20} {'goal':>5} "
    f"{'compiled PEFT':>20} {'flat pattern':>20}  floor of a packed step"
)


def show(result: Measured, goal: float | None) -> str:
    """One line of the table: milliseconds of a user's step, and the others as multiples of it."""
    over = {name: spread(values) for name, values in result["over"].items()}
    return (
        f"{result['shape']:>22} {result['tokens']:>6.0f} {result['fit']['slots']:>3} {result['fit']['row_tokens']:>5} "
        f"{1e3 * median(result['seconds']['packed']):>9.2f} {1e3 * result['seating']:>8.2f} {over.get('peft', ''):>20} "
        f"{goal or '':>5} {over.get('compiled', ''):>20} {over.get('flat', ''):>20}  {result['floor']}"
    )


def compare(
    name: str, loads: Mapping[int, Load], others: Sequence[str], options: argparse.Namespace, device: torch.device,
    budget: Budget,
) -> dict[int, Measured]:  # fmt: skip
    """One base under every load, by the load's tokens; what does not fit or comes too late is left out."""
    shape = chosen_shape(name, options.tiny)
    base = random_base(shape, device, torch.bfloat16)
    kept: dict[int, Measured] = {}
    for tokens, load in loads.items():
        if budget.spent:
            break
        tried = [replace(fit, slots=min(fit.slots, options.users)) for fit in fillings(load)]
        if options.row_tokens:
            tried = [Fit(options.users, options.row_tokens, min(load.sequences, 8))]
        choices = [fit for fit in tried if fits(base, RANK, fit.slots, fit.row_tokens)] or tried[-1:]
        run = partial(measure, base, shape, load, others, options, budget)
        if fit := first_that_fits(choices, run):
            kept[tokens] = fit[1]
        measuring.release()
    return dict(sorted(kept.items()))


def draw(results: Mapping[int, Measured], path: Path) -> None:
    """The curve: how many times a PEFT loop's speed, by tokens a user and step."""
    import matplotlib.pyplot as plt  # here: nothing else needs it, and samples are saved before

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    over = {tokens: result["over"]["peft"] for tokens, result in results.items()}
    middle = [median(values) for values in over.values()]
    below = [median(values) - min(values) for values in over.values()]
    above = [max(values) - median(values) for values in over.values()]
    axes.errorbar(list(over), middle, yerr=[below, above], marker="o", capsize=3, label="packed / PEFT loop")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.plot([max(SWEEP)], [FAR_GOAL], marker="_", markersize=16, color="tab:red", linestyle="", label="goal")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens a user and step")
    axes.set_ylabel("times as fast")
    axes.set_title(next(iter(results.values()))["shape"])
    axes.legend()
    figure.savefig(path, dpi=150)


def sweep_loads(points: Sequence[int], tiny: bool) -> dict[int, Load]:
    """By tokens a user and step: sequences of at most 512 tokens."""
    longest, points = (8, (32, 8, 16)) if tiny else (512, points)
    return {n: Load(max(1, n // longest), min(n, longest), min(n, longest)) for n in points}


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; `--tiny` makes everything small."""
    parser = measuring.gpu_parser(__doc__, rounds=4)
    parser.add_argument("--shapes", nargs="*", choices=list(GOALS), default=list(GOALS))
    parser.add_argument("--sweep", choices=[*SHAPES, "none"], default="4B", help="base of the sweep")
    parser.add_argument("--others", nargs="+", choices=OTHERS, default=OTHERS)
    parser.add_argument("--users", type=int, default=USERS)
    parser.add_argument("--compiled", action="store_true", help="packed training with compiled layers too")
    parser.add_argument("--row-tokens", type=int, help="T; otherwise what fits, tried from the most downwards")
    parser.add_argument("--points", type=int, nargs="+", default=SWEEP, help="of the sweep: tokens a user and step")
    parser.add_argument("--steps", type=int, default=4, help="steps in a turn, fewer where a step has many tokens")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.users, options.steps, options.rounds = 4, 1, 2
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Every base, then the sweep; raw samples and curve are kept, the table comes last."""
    options = read_options(arguments)
    (device, folder), budget = measuring.place(options), Budget(options.minutes)
    machine = measuring.machine_facts(device)
    four = Load(4, 12, 16) if options.tiny else FOUR
    lines, results = [], []
    for name in options.shapes:
        kept = compare(name, {840: four}, options.others, options, device, budget)
        lines += [show(result, GOALS[name]) for result in kept.values()] or [f"{name:>22} not measured"]
        results += list(kept.values())
        measuring.save(folder / f"gpu_users{'_compiled' * options.compiled}.json", machine, results)
        measuring.release()
    if options.sweep != "none":
        points = sweep_loads(options.points, options.tiny)
        kept = compare(options.sweep, points, ("peft",), options, device, budget)
        lines += [show(result, FAR_GOAL if tokens == max(SWEEP) else None) for tokens, result in kept.items()]
        lines += [f"{options.sweep:>22} {tokens:>6} not measured" for tokens in points if tokens not in kept]
        measuring.save(folder / "gpu_users_sweep.json", machine, list(kept.values()))
        if kept:
            draw(kept, folder / "gpu_users_sweep.png")
    say(machine)
    say(HEADER)
    say(*lines, sep="\n")


if __name__ == "__main__":
    main()
