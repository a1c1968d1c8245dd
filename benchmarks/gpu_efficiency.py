"""What adapters cost on a GPU: `python benchmarks/gpu_efficiency.py`, one process, at most ten minutes.

E is packed tokens a second over those of the same frozen base's forward and input-gradient backward on the same batch,
without adapters; 1 would mean that K users' adapters, clipping and AdamW are free.  Both in bf16, every linear adapted,
one example of T tokens a user and step, blocks of steps in turn in one process while the users train; with `--compiled`
both run compiled layers, with `--forget` both compute them again in the backward pass, for longer rows; `--recorded`
trains by CUDA graphs too, in turn.  The frozen base finds its batches on the device, packed training makes its own.
T is the longest of the tried that fits.  Seating users and copying them out is not in E (see `gpu_users.py`).
"""

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from statistics import median
from typing import Any, TypedDict

import torch

from benchmarks import measuring
from benchmarks.measuring import Budget, Samples, Turns, first_that_fits, ratios, say, spread
from benchmarks.sides import (
    Load,
    Shape,
    adapter_width,
    chosen_shape,
    fits,
    learners,
    packed_batches,
    random_base,
    run_frozen,
    run_packed,
    start_row,
    step_floor,
    twin,
)
from lora_core.base_model import BaseModel
from lora_core.layers import checkpointed, compiled
from lora_core.micro_step import Replay, read_rows
from lora_core.referee import Answers
from lora_core.train import Compute

GOALS = {"8B": 0.93, "4B": 0.90, "1B": 0.87, "0.5B": 0.78}
SAME = 0.03  # how far E at more users may be from E at the fewest
RANK = 16
ROW_TOKENS = (1024, 512, 256, 128, 64, 32)


class Either:
    """Micro-steps kernel by kernel, or as one graph."""

    def __init__(self) -> None:
        self._compute: Compute = read_rows

    def replay(self) -> None:
        """From now on."""
        self._compute = self._replayed

    def launch(self) -> None:
        """From now on."""
        self._compute = read_rows

    @cached_property
    def _replayed(self) -> Compute:
        return Replay()

    def __call__(self, *micro_step: Any) -> Answers:  # passed on as it is
        """What the way at hand answers."""
        return self._compute(*micro_step)


class Measured(TypedDict):
    """What is kept of a base and a number of users."""

    shape: str
    slots: int
    row_tokens: int
    plain_head: bool  # whether the base took the fused head loss
    efficiency: list[float]
    seconds: Samples  # of `block` steps
    block: int
    floor: dict[str, str]  # of a step
    peak_bytes: int


def measure(
    base: BaseModel, shape: Shape, slots: int, row_tokens: int, options: argparse.Namespace, budget: Budget
) -> Measured:
    """Blocks of packed steps and of the frozen base's, in turn."""
    device, load, peak = base.model.device, Load(1, row_tokens, row_tokens), 0
    block, rounds = options.block, options.rounds
    blocks = (1 + options.recorded) * (rounds + 1)
    steps = blocks * block + 1  # one more than is timed: nobody is copied out on the clock
    users = [load.examples(steps, shape.vocabulary, seed) for seed in range(slots)]
    frozen, batches = twin(base), list(packed_batches(base, users, load, row_tokens, block))
    others = {"frozen": partial(run_frozen, frozen, batches)}
    recipe = load.recipe(RANK, row_tokens)
    cohort = learners(recipe, users, start_row(base, recipe))

    compute = Either()
    loop = {"packed": compute.launch} | ({"recorded": compute.replay} if options.recorded else {})
    turns = Turns(loop, others, block, rounds, device, budget)
    with ExitStack() as modes:
        for one in (base, frozen):
            modes.enter_context(compiled(one, options.compiled))
            modes.enter_context(checkpointed(one, options.forget))
        run_packed(base, cohort, row_tokens, turns, compute=compute)

    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    floors = {
        name: step_floor(base, shape, slots * row_tokens, row_tokens, users, RANK).show(device)
        for name, users in (("packed", slots), ("frozen", 0))
    }
    return {
        "shape": shape.name, "slots": slots, "row_tokens": row_tokens, "plain_head": base.plain_head,
        "efficiency": ratios(turns.samples["frozen"], turns.samples["packed"]), "seconds": turns.samples,
        "block": block, "floor": floors, "peak_bytes": peak,
    }  # fmt: skip


def row_needs(base: BaseModel, slots: int) -> str:
    """Why a cohort has no room, in words."""
    needed = 16 * slots * adapter_width(base, RANK) / 1e9
    return f"does not fit: {slots} rows and their moments take {needed:.0f} GB beside base and activations"


HEADER = (
    f"{'base':>22} {'K':>4} {'T':>5} {'E':>18} {'goal':>5} {'of fewest K':>11} {'packed ms':>10} {'frozen ms':>10}  "
    "floor of a packed step"
)


def show(result: Measured, goal: float, fewest: Measured) -> str:
    """One line of the table; `fewest` is the same base and T at the fewest users."""
    packed, frozen = (1e3 * median(result["seconds"][name]) / result["block"] for name in ("packed", "frozen"))
    recorded = result["seconds"].get("recorded")
    over = f"; as a graph {spread(ratios(result['seconds']['packed'], recorded))} as fast" if recorded else ""
    against = median(result["efficiency"]) / median(fewest["efficiency"]) - 1
    return (
        f"{result['shape']:>22} {result['slots']:>4} {result['row_tokens']:>5} {spread(result['efficiency'], ''):>18} "
        f"{goal:>5} {against:>+10.1%}{' ' if abs(against) <= SAME else '!'} {packed:>10.1f} {frozen:>10.1f}  "
        f"{result['floor']['packed']}{'' if result['plain_head'] else '; head loss not fused'}{over}"
    )


def compare(name: str, options: argparse.Namespace, device: torch.device, budget: Budget) -> tuple[list[Measured], str]:
    """One base at every number of users; what is kept, and its lines of the table.

    Where more users leave room for shorter rows only, the fewest are measured at those too: E is compared at one T.
    """
    shape = chosen_shape(name, options.tiny)
    base = random_base(shape, device, torch.bfloat16)
    fewest: dict[int, Measured] = {}  # by T
    kept: list[Measured] = []
    lines = []

    def measured(slots: int, row_tokens: int) -> Measured:
        return measure(base, shape, slots, row_tokens, options, budget)

    def keep(result: Measured) -> None:
        kept.append(result)
        fewest.setdefault(result["row_tokens"], result)
        lines.append(show(result, GOALS[name], fewest[result["row_tokens"]]))
        measuring.release()

    for slots in options.users:
        if budget.spent:
            lines.append(f"{shape.name:>22} {slots:>4} not measured: out of time")
            continue
        choices = [tokens for tokens in options.row_tokens if fits(base, RANK, slots, tokens, options.forget)]
        fit = first_that_fits(choices, partial(measured, slots))
        if fit is None:
            lines.append(f"{shape.name:>22} {slots:>4} {row_needs(base, slots)}")
            continue
        row_tokens, result = fit
        if kept and row_tokens not in fewest:
            keep(measured(options.users[0], row_tokens))
        keep(result)
    return kept, "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every base, keep the raw samples, print the table last."""
    parser = measuring.gpu_parser(__doc__, rounds=7)
    parser.add_argument("--shapes", nargs="+", choices=list(GOALS), default=list(GOALS))
    parser.add_argument("--users", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--row-tokens", type=int, nargs="+", default=ROW_TOKENS, help="tried in this order")
    parser.add_argument("--block", type=int, default=5, help="steps in a turn")
    parser.add_argument("--compiled", action="store_true", help="both sides with compiled layers")
    parser.add_argument("--recorded", action="store_true", help="also by CUDA graphs, in turn")
    parser.add_argument("--forget", action="store_true", help="both sides with checkpointed layers")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.users, options.row_tokens, options.block, options.rounds = [4, 8], [16], 1, 2
    (device, folder), budget = measuring.place(options), Budget(options.minutes)
    machine = measuring.machine_facts(device)
    file = f"gpu_efficiency{'_compiled' * options.compiled}{'_forget' * options.forget}.json"
    results: list[Measured] = []
    table = []
    for name in options.shapes:
        kept, lines = compare(name, options, device, budget)
        results += kept
        table.append(lines)
        measuring.release()
        measuring.save(folder / file, machine, results)
    say(machine)
    say(HEADER)
    say(*table, sep="\n")


if __name__ == "__main__":
    main()
