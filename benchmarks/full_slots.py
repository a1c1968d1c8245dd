"""How full the slots are and how long anybody waits: `python benchmarks/full_slots.py`.

Five hundred users of 1,000 to 1,000,000 tokens (log-uniform: most are small, most tokens are in few hands), a tenth of
higher priority; four in five are there at the start, the others come while it runs.  The real rows, curricula, seating
and training loop; only the forward and backward pass is left out, since what is counted is tokens and micro-steps.
More users of a few rows than there are slots for them at once have to take turns; who comes later must not wait.
With --held-out, a share of everybody's examples is examined before and after: in micro-steps without a backward pass.
"""

import argparse
import json
import math
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.command_line import from_one
from benchmarks.sides import SHAPES, random_base
from lora_core import seating
from lora_core.banks.lora import LoraBank
from lora_core.base_model import BaseModel
from lora_core.cohort import Cohort
from lora_core.curriculum import Student
from lora_core.data.rendering import Rendered
from lora_core.door import Door
from lora_core.learner import Learner, Lesson, Trained
from lora_core.recipe import Recipe, make_recipe
from lora_core.referee import Answers
from lora_core.train import Pace, train

GOALS = {"useful": 0.97, "makespan": 1.05, "wait": 2}


def trace(users: int, row_tokens: int, seed: int, held_out: float) -> list[Learner]:
    """Users of log-uniform sizes, with examples of 20 to about 600 tokens."""
    generator = random.Random(seed)
    recipe = make_recipe({"rank": 1, "targets": "o_proj", "layers": 0, "epochs": 1, "patience": 1 if held_out else None,
                          "batch_rows": 4, "row_tokens": row_tokens, "max_length": row_tokens})  # fmt: skip
    recipes = (recipe.model_copy(update={"seed": number}) for number in range(users))
    return [_user(generator, number, one, held_out) for number, one in enumerate(recipes)]


def _user(generator: random.Random, number: int, recipe: Recipe, held_out: float) -> Learner:
    left, examples = math.exp(generator.uniform(math.log(1e3), math.log(1e6))), []
    while left > 20:
        length = min(int(left), 600, recipe.max_length, max(20, int(generator.lognormvariate(4.8, 0.7))))
        examples.append(_rendered(length))
        left -= length
    judged = math.ceil(held_out * len(examples))
    halves = tuple(examples[judged:]), tuple(examples[:judged])
    return Learner(f"user{number}", recipe, *halves, priority=int(generator.random() < 0.1))


_LENGTHS: dict[int, Rendered] = {}


def _rendered(length: int) -> Rendered:
    """Any example of that length; equal ones are one object, so that 70 million tokens fit in memory."""
    return _LENGTHS.setdefault(length, Rendered((0,) * length, (True,) * length))


@dataclass
class NoComputing:
    """Every row's loss is 1; micro-steps that only examine are counted."""

    examining: int = 0

    def __call__(self, _: BaseModel, __: Cohort, lessons: Sequence[Lesson | None], ___: int) -> Answers:
        """Each slot's answer."""
        self.examining += not any(lesson and lesson.weight for lesson in lessons)
        return [[1.0] for _ in lessons]


def run(learners: list[Learner], slots: int, row_tokens: int) -> tuple[list[Trained], Pace, int]:
    """Train them without computing; a fifth arrive one by one, every third micro-step from the hundredth on.

    Earlier where all slots are free: else they would find the door closed.  Gives who is done, the last pace, and how
    many micro-steps examined.
    """
    base = random_base(SHAPES["6M"], torch.device("cpu"), torch.float32)
    bank = LoraBank(tuple(site for site in base.sites if site.name.endswith("layers.0.self_attn.o_proj")), 1)
    first, late = learners[: len(learners) * 4 // 5], learners[len(learners) * 4 // 5 :]
    paces: list[Pace] = []
    counted = NoComputing()

    class Trickle(Door):
        def arrivals(self, places: int) -> list[Learner]:
            due = len(paces) >= 100 and len(paces) % 3 == 0
            return [late.pop()] if late and (due or places == slots) else []

    done = list(train(base, first, slots, row_tokens, bank, paces.append, Trickle(), counted))
    return done, paces[-1], counted.examining


def main() -> None:
    """Print the figures against their goals, and keep them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=from_one, default=500)
    parser.add_argument("--slots", type=from_one, default=64)
    parser.add_argument("--row-tokens", type=from_one, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", type=float, default=0.0, metavar="SHARE", help="of everybody's examples")
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    if not 0 <= options.held_out < 1:
        parser.error("the share that is held out is at least 0, and below 1")
    torch.set_num_threads(1)
    learners = trace(options.users, options.row_tokens, options.seed, options.held_out)
    few = {learner.name for learner in learners if _rows(learner, options.row_tokens) <= seating.FEW}
    late = {learner.name for learner in learners[len(learners) * 4 // 5 :]}
    reads = (example for learner in learners for example in (*learner.train, *learner.held_out, *learner.held_out))
    total = sum(len(example.tokens) for example in reads)
    done, last, examining = run(learners, options.slots, options.row_tokens)
    peak = options.slots * options.row_tokens
    figures = {
        "users": len(done), "tokens": total, "slots": options.slots, "row_tokens": options.row_tokens,
        "micro_steps": last.micro_steps, "of_examinations": examining,
        "useful": last.tokens / last.room,
        "makespan": last.micro_steps / (total / peak),
        "few_at_the_start": len(few - late),
        "their_longest_wait": _longest_wait(done, few - late),
        "few_that_came_later": len(few & late),
        "wait": _longest_wait(done, few & late),
        "longest_wait_of_anybody": max(one.waited for one in done),
    }  # fmt: skip
    for name, value in figures.items():
        goal = f"   goal {GOALS[name]}" if name in GOALS else ""
        print(f"{name:<24} {value:,.4g}{goal}" if isinstance(value, float) else f"{name:<24} {value:,}{goal}")  # noqa: T201  a script's report
    if options.save:
        options.save.write_text(json.dumps(figures, indent=1) + "\n")


def _longest_wait(done: Sequence[Trained], names: Collection[str]) -> int:
    """In micro-steps; 0 where there is nobody of these names."""
    return max((one.waited for one in done if one.name in names), default=0)


def _rows(learner: Learner, row_tokens: int) -> int:
    """What a plan of the cohort takes it for."""
    return Student(learner, row_tokens, lambda: torch.zeros(1)).rows_left


if __name__ == "__main__":
    main()
