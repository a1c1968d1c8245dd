"""What keeping the lower layers' states saves: `python benchmarks/lower_layers.py`.

A Llama of 8 layers with adapters on the top 2, 8 users, rows of 128 tokens without padding.  The vocabulary decides
what share of the arithmetic the head has, which nothing here saves: 512 words give it that of a Llama 2 7B, 2048 that
of a Llama 3 8B.  One process; in every round each side trains the same users one after the other: without keeping,
where the backward pass stops at the first adapted layer by itself; with a backward pass through all layers, as where
the embeddings ask for a gradient; keeping, from nothing; keeping, with what an earlier version of the same data left
in memory; and the same from disk.  Ratios of seconds to the keeping side's (above 1, keeping is faster): medians over
the rounds with the lowest and highest; absolute times are not for comparing machines.

What to expect, in forward passes an epoch and without the head: 1.25 without keeping, 2 with a whole backward, 0.5
kept, 1.25 in the first epoch.  Over 3 and 10 epochs: 1.67 and 2.17 against the first, 2.67 and 3.48 against the second,
2.5 and 4 where an earlier version left everything.  So the goals, which are set against the same training without
keeping (the first column), are out of reach there at this depth but for 3 epochs of a later version.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measuring import Samples, machine_facts, ratios, save, say, spread
from lora_core.banks.table import make_bank
from lora_core.base_model import BaseModel, freeze
from lora_core.cohort import Cohort
from lora_core.data.rendering import Rendered
from lora_core.learner import Learner, Lesson
from lora_core.lower_layers import LowerLayers
from lora_core.micro_step import read_rows
from lora_core.recipe import make_recipe
from lora_core.referee import Answers
from lora_core.row_store import RowFolder, RowMemory, RowStore
from lora_core.train import Compute, train

LAYERS, ADAPTED = 8, (6, 7)
SLOTS, T, RANK = 8, 128, 8
GOALS = {3: 2.4, 10: 3.2}  # least ratio to the same training without keeping, by epochs
MEMORY = 1 << 30  # bytes
KEPT = {"kept": "from nothing", "later": "a later version", "disk": "a later version, from disk"}


@dataclass(frozen=True)
class Setting:
    """One point of the comparison."""

    words: int  # of the vocabulary
    epochs: int
    rows: int  # a user


def tall_base(words: int) -> BaseModel:
    """A Llama with random weights: speed does not depend on what they are."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=words, hidden_size=256, intermediate_size=704, num_hidden_layers=LAYERS, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=1024, tie_word_embeddings=True,
    )  # fmt: skip
    return freeze(LlamaForCausalLM(config), tokenizer=None, digest="0" * 64)


def users(setting: Setting) -> list[Learner]:
    """As many as there are slots, each with full rows that come again every epoch, one a step."""
    generator = random.Random(0)
    recipe = make_recipe(
        {"rank": RANK, "layers": ADAPTED, "batch_rows": 1, "epochs": setting.epochs, "patience": None,
         "row_tokens": T, "max_length": T}
    )  # fmt: skip
    return [
        Learner(str(number), recipe, tuple(_example(generator, setting.words) for _ in range(setting.rows)))
        for number in range(SLOTS)
    ]


def _example(generator: random.Random, words: int) -> Rendered:
    return Rendered(tuple(generator.randrange(words) for _ in range(T)), (True,) * T)


def read_with_whole_backward(
    base: BaseModel, cohort: Cohort, lessons: Sequence[Lesson | None], row_tokens: int
) -> Answers:
    """`read_rows` whose gradient goes down to the embeddings: nothing below is trained by it."""
    hook = base.model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_())
    try:
        return read_rows(base, cohort, lessons, row_tokens)
    finally:
        hook.remove()


def keeping(base: BaseModel, learners: Sequence[Learner], folder: Path | None = None) -> LowerLayers:
    """Lower layers with an empty memory, and the folder if one is given."""
    bank = make_bank(base, [learner.recipe.method for learner in learners])
    disk = RowFolder(folder, MEMORY) if folder else None
    return LowerLayers(base, bank, RowStore(RowMemory(MEMORY), time.perf_counter, disk))


def run(base: BaseModel, learners: Sequence[Learner], compute: Compute) -> float:
    """Seconds of one whole training."""
    start = time.perf_counter()
    for trained in train(base, learners, SLOTS, T, compute=compute):
        assert trained.outcome == "finished"
    return time.perf_counter() - start


def compare(setting: Setting, rounds: int, folder: Path) -> Samples:
    """Interleaved rounds of all sides; a side's making is not timed."""
    base, learners = tall_base(setting.words), users(setting)
    earlier = keeping(base, learners, folder)
    run(base, learners, earlier.read_rows)
    later = LowerLayers(base, make_bank(base, [learners[0].recipe.method]), earlier.store)
    later.store.folder = None
    sides: dict[str, Callable[[], Compute]] = {
        "without": lambda: read_rows,
        "whole": lambda: read_with_whole_backward,
        "kept": lambda: keeping(base, learners).read_rows,
        "later": lambda: later.read_rows,
        "disk": lambda: keeping(base, learners, folder).read_rows,
    }
    seconds: Samples = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            took = run(base, learners, side())
            if number:  # the first round warms up
                seconds[name].append(took)
    return seconds


def show(setting: Setting, seconds: Samples) -> str:
    """One line of the table for each way of keeping: seconds of both rivals over its own."""
    lines = []
    for side, title in KEPT.items():
        without, whole = (spread(ratios(seconds[rival], seconds[side])) for rival in ("without", "whole"))
        place = f"{setting.words:>5} {setting.epochs:>6}  {title:<26}"
        lines.append(f"{place} {without:>20} {whole:>22} {GOALS[setting.epochs]:>6}")
    return "\n".join(lines)


def main() -> None:
    """Print the table and keep the raw samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=3, help="rows a user")
    parser.add_argument("--words", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--save", type=Path, help="write raw samples as JSON")
    options = parser.parse_args()
    machine = machine_facts(torch.device("cpu"))
    say(machine)
    say(f"words epochs  {'kept':<26} {'without keeping':>20} {'whole backward':>22} {'goal':>6}")
    results = []
    for setting in (Setting(words, epochs, options.rows) for words in options.words for epochs in GOALS):
        with tempfile.TemporaryDirectory() as folder:
            seconds = compare(setting, options.rounds, Path(folder))
        results.append({**asdict(setting), "seconds": seconds})
        say(show(setting, seconds))
    if options.save:
        save(options.save, machine, results)


if __name__ == "__main__":
    main()
