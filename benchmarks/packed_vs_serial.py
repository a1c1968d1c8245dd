"""Packed training against a PEFT loop and against the frozen base alone: `python benchmarks/packed_vs_serial.py`.

One process, interleaved: in every round each side runs the same users, examples and steps, one after the other.  Tokens
a second of packed training over the PEFT loop's (above 1 is faster) and over the frozen base's own forward and
input-gradient backward on the same batch, both as they are and with the base's layers compiled.  The frozen base runs
as torch runs it, and with the quick products that packed training has (`lora_core/products.py`): there 1 would mean
that adapters, clipping and AdamW are free.  Medians over the rounds with the lowest and highest; absolute times are not
for comparing machines.
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
    stock,
    twin,
)
from lora_core.base_model import BaseModel
from lora_core.layers import compiled

# What is compared, over what: the least that is wanted, by tokens a user and step where it depends on them.
GOALS = {
    ("packed", "peft"): {32: 3.0, 64: 3.0, 128: 1.8, 256: 1.3},
    ("compiled", "peft"): {32: 5.0, 64: 5.0, 128: 2.5, 256: 1.8},
    ("packed", "frozen"): 0.75,
    ("compiled", "frozen"): 0.95,
    ("compiled", "frozen compiled"): 0.85,
    ("packed", "quick"): None,
    ("compiled", "quick"): None,
    ("compiled", "quick compiled"): None,
}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Setting:
    """One point of the comparison."""

    users: int
    tokens: int  # a user and step
    steps: int
    rank: int
    prompts: float  # share of them that is not learnt


class Measured(TypedDict):
    """What is kept of a setting: every raw time, and ratios of tokens a second by what is compared."""

    tokens: int
    steps: int
    prompts: float
    seconds: Samples
    ratios: dict[str, list[float]]


def compare(setting: Setting, rounds: int) -> Measured:
    """Interleaved rounds of all sides.

    One example of exactly `tokens` tokens a step for each user: all sides read the same and nothing is padding.
    """
    base = random_base(SHAPES["6M"], CPU, torch.float32)
    peft_model = peft_twin(base, setting.rank)
    load = Load(1, setting.tokens, setting.tokens, setting.prompts)
    recipe = load.recipe(setting.rank, setting.tokens)
    users = [load.examples(setting.steps, SHAPES["6M"].vocabulary, seed) for seed in range(setting.users)]

    def packed(base: BaseModel) -> Side:
        return lambda: run_packed(base, learners(recipe, users), setting.tokens)

    def frozen(base: BaseModel) -> Side:
        return lambda: run_frozen(base, packed_batches(base, users, load, setting.tokens, setting.steps))

    def peft_loop() -> None:
        for examples in users:
            run_peft(peft_model, examples, load, micro=1)

    for_packed, for_quick, for_frozen = twin(base), twin(base), stock(base)
    with compiled(for_packed), compiled(for_quick), compiled(for_frozen):
        sides = {
            "packed": packed(base), "peft": peft_loop, "frozen": frozen(stock(base)), "quick": frozen(base),
            "compiled": packed(for_packed), "frozen compiled": frozen(for_frozen), "quick compiled": frozen(for_quick),
        }  # fmt: skip
        seconds = alternate(sides, rounds, CPU)
    found = {f"{one} / {other}": ratios(seconds[other], seconds[one]) for one, other in GOALS}
    return {
        "tokens": setting.tokens, "steps": setting.steps, "prompts": setting.prompts,
        "seconds": seconds, "ratios": found,
    }  # fmt: skip


def show(result: Measured) -> str:
    """One line of the table: each ratio as median (lowest-highest), and what is wanted."""
    cells = []
    for (one, other), goal in GOALS.items():
        wanted = goal.get(result["tokens"]) if isinstance(goal, dict) else goal
        cells.append(f"{spread(result['ratios'][f'{one} / {other}'])} [{wanted or '-'}]")
    return f"{result['tokens']:>6} " + " ".join(f"{cell:>26}" for cell in cells)


def main() -> None:
    """Print the table and keep the raw samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--prompts", type=float, default=0.0, help="share of an example that is not learnt")
    parser.add_argument("--save", type=Path, help="write raw samples as JSON")
    options = parser.parse_args()
    if not 0 <= options.prompts < 1:
        parser.error(f"--prompts {options.prompts} leaves nothing to learn; give a share from 0 to below 1")
    machine = machine_facts(CPU)
    say(machine)
    say(f"{'tokens':>6} " + " ".join(f"{one + ' / ' + other:>26}" for one, other in GOALS))
    results = []
    for tokens in options.tokens:
        setting = Setting(options.users, tokens, options.steps, options.rank, options.prompts)
        results.append(compare(setting, options.rounds))
        say(show(results[-1]))
    if options.save:
        save(options.save, machine, results)


if __name__ == "__main__":
    main()
