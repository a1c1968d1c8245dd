"""Packed training against a PEFT loop and against the frozen base alone: `python benchmarks/packed_vs_serial.py`.

One process, interleaved: in every round each side runs the same users, examples and steps, one after the other.  Tokens
a second of packed training over the PEFT loop's (above 1 is faster) and over the frozen base's own forward and
input-gradient backward on the same batch (1 would mean that adapters, clipping and AdamW are free).  Medians over the
rounds with the lowest and highest; absolute times are not for comparing machines.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch

from benchmarks.measuring import Samples, Side, alternate, machine_facts, ratios, save, say, spread
from benchmarks.sides import (
    SHAPES,
    Load,
    learners,
    packed_batches,
    peft_twin,
    random_base,
    run_frozen,
    run_packed,
    run_peft,
)

GOALS = {32: 3.0, 64: 3.0, 128: 1.8, 256: 1.3}  # least packed / PEFT, by tokens a user and step
FROZEN_GOAL = 0.75
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Setting:
    """One point of the comparison."""

    users: int
    tokens: int  # a user and step
    steps: int
    rank: int


class Measured(TypedDict):
    """What is kept of a setting."""

    tokens: int
    over_peft: list[float]
    over_frozen: list[float]
    seconds: Samples


def compare(setting: Setting, rounds: int) -> Measured:
    """Interleaved rounds of the three sides; ratios of tokens a second and every raw time.

    One example of exactly `tokens` tokens a step for each user: all sides read the same and nothing is padding.
    """
    base = random_base(SHAPES["6M"], CPU, torch.float32)
    peft_model = peft_twin(base, setting.rank)
    load = Load(1, setting.tokens, setting.tokens)
    recipe = load.recipe(setting.rank, setting.tokens)
    users = [load.examples(setting.steps, SHAPES["6M"].vocabulary, seed) for seed in range(setting.users)]

    def peft_loop() -> None:
        for examples in users:
            run_peft(peft_model, examples, load, micro=1)

    sides: dict[str, Side] = {
        "packed": lambda: run_packed(base, learners(recipe, users), setting.tokens),
        "peft": peft_loop,
        "frozen": lambda: run_frozen(base, packed_batches(base, users, load, setting.tokens, setting.steps)),
    }
    seconds = alternate(sides, rounds, CPU)
    return {
        "tokens": setting.tokens, "over_peft": ratios(seconds["peft"], seconds["packed"]),
        "over_frozen": ratios(seconds["frozen"], seconds["packed"]), "seconds": seconds,
    }  # fmt: skip


def show(result: Measured) -> str:
    """One line of the table: both ratios as median (lowest-highest)."""
    tokens, over_peft, over_frozen = result["tokens"], spread(result["over_peft"]), spread(result["over_frozen"])
    return f"{tokens:>6} {over_peft:>22} {GOALS.get(tokens, 0):>6} {over_frozen:>22} {FROZEN_GOAL:>6}"


def main() -> None:
    """Print the table and keep the raw samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--save", type=Path, help="write raw samples as JSON")
    options = parser.parse_args()
    machine = machine_facts(CPU)
    say(machine)
    say(f"{'tokens':>6} {'packed / PEFT loop':>22} {'goal':>6} {'packed / frozen base':>22} {'goal':>6}")
    results = []
    for tokens in options.tokens:
        results.append(compare(Setting(options.users, tokens, options.steps, options.rank), options.rounds))
        say(show(results[-1]))
    if options.save:
        save(options.save, machine, results)


if __name__ == "__main__":
    main()
