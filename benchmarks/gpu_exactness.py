"""What exactness costs on a GPU: `python benchmarks/gpu_exactness.py`, one process, at most ten minutes.

The same user, of two rows a step, trains alone, alone again, among full neighbours in several slots, by CUDA graph
instead of kernel by kernel, and in random packs (how many neighbours, their ranks, dropout, schedules, sizes and
order), at one (K, T), in bf16; the SHA-256 of its row must be one and the same.  Packs in torch's default mode, the
rest under `use_deterministic_algorithms` too, with the time of a step in the two modes, in turn.  `:4096:8` is cuBLAS's
workspace in both; it is what torch takes on Hopper anyway.
"""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, when CUDA starts

import argparse
import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TypedDict

import torch
import torch.utils.deterministic as deterministic_mode
from torch import Tensor

from benchmarks import measuring
from benchmarks.measuring import Budget, Samples, Turns, ratios, say, spread
from benchmarks.sides import SHAPES, Load, Shape, chosen_shape, learners, random_base, run_packed, start_row
from lora_core.banks.bank import Bank
from lora_core.banks.table import make_bank
from lora_core.base_model import BaseModel
from lora_core.learner import Learner
from lora_core.methods import LoraSpec
from lora_core.micro_step import Replay
from lora_core.train import Compute, train

RANK = 16
GOAL = 1.05  # most that the deterministic mode may take, as a multiple of the default's time
MODES = {"default": False, "deterministic": True}


class Measured(TypedDict):
    """What is kept of a base."""

    shape: str
    slots: int
    row_tokens: int
    rows: dict[str, dict[str, str]]  # SHA-256 by company, by mode; or why the mode refused
    seconds: Samples  # of `block` steps, by mode
    block: int


@dataclass(frozen=True)
class Setting:
    """K, T, and how long users train."""

    slots: int
    row_tokens: int
    steps: int


def everyone(base: BaseModel, shape: Shape, setting: Setting, steps: int) -> list[Learner]:
    """A user for every slot, each with examples of its own."""
    load = Load(1, setting.row_tokens, setting.row_tokens)
    recipe = load.recipe(RANK, setting.row_tokens)
    users = [load.examples(steps, shape.vocabulary, seed) for seed in range(setting.slots)]
    return learners(recipe, users, start_row(base, recipe))


def companies(cohort: Sequence[Learner]) -> dict[str, list[Learner]]:
    """The first learner alone, alone again, and among the others in the first, a middle and the last slot.

    Learners who have as much to read sit down in their order.
    """
    first, others = cohort[0], list(cohort[1:])
    among = {f"slot {slot}": [*others[:slot], first, *others[slot:]] for slot in (0, len(cohort) // 2, len(others))}
    return {"alone": [first], "alone again": [first], **among}


def random_company(base: BaseModel, cohort: Sequence[Learner], number: int) -> list[Learner]:
    """The first learner somewhere among some of the others, who have other ranks, dropout, schedules and sizes."""
    draw = random.Random(number)
    others = draw.sample(cohort[1:], draw.randint(1, len(cohort) - 1))
    place = draw.randint(0, len(others))
    strangers = [strange(base, other, draw) for other in others]
    return [*strangers[:place], cohort[0], *strangers[place:]]


def strange(base: BaseModel, learner: Learner, draw: random.Random) -> Learner:
    """A learner with a recipe and as many examples as the dice say."""
    method = learner.recipe.method.model_copy(update={"rank": draw.choice([1, 4, 8]), "dropout": draw.choice([0, 0.1])})
    changes = {
        "method": method, "schedule": draw.choice(["constant", "linear", "cosine"]), "clip": draw.choice([0.1, 1.0]),
        "learning_rate": draw.choice([1e-4, 1e-2]), "batch_size": draw.randint(1, 3),
    }  # fmt: skip
    recipe = learner.recipe.model_copy(update=changes)
    examples = learner.train[: draw.randint(1, len(learner.train))]
    return replace(learner, recipe=recipe, train=examples, start=start_of(base, method))


@cache
def start_of(base: BaseModel, method: LoraSpec) -> Tensor:
    """A row to start from in the bank of rank RANK."""
    return bank_of(base).start_row(method, 0)


@cache
def bank_of(base: BaseModel) -> Bank:
    """The bank of everybody, whoever trains."""
    return make_bank(base, [LoraSpec(rank=RANK)])


def row_digest(
    base: BaseModel, setting: Setting, name: str, company: Sequence[Learner], compute: Compute | None = None
) -> str:
    """SHA-256 of one learner's row after training in such company."""
    for trained in train(base, company, setting.slots, setting.row_tokens, bank_of(base), compute=compute):
        if trained.name == name:
            assert trained.outcome == "finished", trained.reason
            return hashlib.sha256(trained.row_P.numpy().tobytes()).hexdigest()
    raise AssertionError(f"learner {name} did not come back")


def digests(base: BaseModel, setting: Setting, cohort: Sequence[Learner], packs: int, budget: Budget) -> dict[str, str]:
    """By company; why, where a kernel has no deterministic way."""
    found, two_rows = {}, cohort[0].recipe.model_copy(update={"batch_size": 2})
    cohort = [replace(cohort[0], recipe=two_rows), *cohort[1:]]  # a step: in two slots where others leave one free
    try:
        for where, company in companies(cohort).items():
            found[where] = row_digest(base, setting, cohort[0].name, company)
        found["by CUDA graph"] = row_digest(base, setting, cohort[0].name, cohort, Replay())
        for number in range(packs):
            if not budget.spent:
                company = random_company(base, cohort, number)
                found[f"pack {number}"] = row_digest(base, setting, cohort[0].name, company)
    except RuntimeError as error:
        if "determinis" not in str(error):
            raise
        return {"refused": str(error).splitlines()[0]}
    return found


def measure(base: BaseModel, shape: Shape, setting: Setting, options: argparse.Namespace, budget: Budget) -> Measured:
    """Digests in both modes, then blocks of steps in the two modes in turn."""
    rows: dict[str, dict[str, str]] = {}
    block, rounds = options.block, options.rounds
    setattr(deterministic_mode, "fill_uninitialized_memory", False)  # noqa: B010  torch does not type it
    cohort = everyone(base, shape, setting, setting.steps)
    for mode, deterministic in MODES.items():
        torch.use_deterministic_algorithms(deterministic)
        rows[mode] = digests(base, setting, cohort, 0 if deterministic else options.packs, budget)
        torch.use_deterministic_algorithms(False)
        measuring.release()
    timed = [mode for mode in MODES if "refused" not in rows[mode]]
    modes = {mode: partial(torch.use_deterministic_algorithms, MODES[mode]) for mode in timed}
    turns = Turns(modes, {}, block, rounds, base.model.device, budget)
    run_packed(base, everyone(base, shape, setting, turns.micro_steps + 1), setting.row_tokens, turns)
    torch.use_deterministic_algorithms(False)
    return {
        "shape": shape.name, "slots": setting.slots, "row_tokens": setting.row_tokens, "rows": rows,
        "seconds": turns.samples, "block": block,
    }  # fmt: skip


HEADER = (
    f"{'base':>22} {'K':>4} {'T':>5} {'mode':>14} {'rows that differ from `alone`':<40} "
    f"{'time / default':>20} {'goal':>5}"
)


def show(result: Measured) -> str:
    """A line a mode."""
    lines = []
    for mode, rows in result["rows"].items():
        over = (
            spread(ratios(result["seconds"][mode], result["seconds"]["default"])) if mode in result["seconds"] else ""
        )
        lines.append(
            f"{result['shape']:>22} {result['slots']:>4} {result['row_tokens']:>5} {mode:>14} {verdict(rows):<40} "
            f"{over:>20} {GOAL if MODES[mode] else '':>5}"
        )
    return "\n".join(lines)


def verdict(rows: Mapping[str, str]) -> str:
    """Who differs from the user alone, in words."""
    if "refused" in rows:
        return f"refused: {rows['refused']}"
    return ", ".join(where for where, digest in rows.items() if digest != rows["alone"]) or f"none of {len(rows) - 1}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every base, keep digests and raw samples, print the table last."""
    parser = measuring.gpu_parser(__doc__, rounds=7)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["0.5B", "1B"])
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--row-tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8, help="of the users whose rows are compared")
    parser.add_argument("--packs", type=int, default=20, help="random ones")
    parser.add_argument("--block", type=int, default=5, help="steps in a turn")
    options = parser.parse_args(arguments)
    setting = Setting(options.users, options.row_tokens, options.steps)
    if options.tiny:
        setting, options.block, options.rounds = Setting(4, 16, 3), 1, 2
    (device, folder), budget = measuring.place(options), Budget(options.minutes)
    machine = measuring.machine_facts(device)
    results = []
    for name in options.shapes:
        if budget.spent:
            break
        shape = chosen_shape(name, options.tiny)
        base = random_base(shape, device, torch.bfloat16)
        results.append(measure(base, shape, setting, options, budget))
        measuring.save(folder / "gpu_exactness.json", machine, results)
        del base
        bank_of.cache_clear()
        start_of.cache_clear()
        measuring.release()
    say(machine)
    say(HEADER)
    say(*map(show, results), sep="\n")


if __name__ == "__main__":
    main()
