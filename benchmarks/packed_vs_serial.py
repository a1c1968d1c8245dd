"""Packed training against a PEFT loop and against the frozen base alone: `python benchmarks/packed_vs_serial.py`.

One process, interleaved: in every round each side runs the same users, examples and steps, one after the other.  Tokens
a second of packed training over the PEFT loop's (above 1 is faster) and over the frozen base's own forward and
input-gradient backward on the same batch (1 would mean that adapters, clipping and AdamW are free).  Medians over the
rounds with the lowest and highest; absolute times are not for comparing machines.
"""

import argparse
import json
import platform
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from lora_core.base_model import BaseModel, freeze
from lora_core.curriculum import Learner
from lora_core.data.packing import Row, pack
from lora_core.data.rendering import Rendered
from lora_core.forward import stack, token_losses
from lora_core.recipe import Recipe, make_recipe
from lora_core.train import train

GOALS = {32: 3.0, 64: 3.0, 128: 1.8, 256: 1.3}  # least packed / PEFT, by tokens a user and step
FROZEN_GOAL = 0.75


@dataclass(frozen=True)
class Setting:
    """One point of the comparison."""

    users: int
    tokens: int  # a user and step
    steps: int
    rank: int


def small_base() -> BaseModel:
    """A Llama of about 6M parameters with random weights: speed does not depend on what they are."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=1024, tie_word_embeddings=True,
    )  # fmt: skip
    return freeze(LlamaForCausalLM(config), tokenizer=None)


def users_examples(setting: Setting) -> list[tuple[Rendered, ...]]:
    """One example of exactly `tokens` tokens a step for each user: both sides read the same and nothing is padding."""
    generator = random.Random(0)
    return [tuple(_example(generator, setting.tokens) for _ in range(setting.steps)) for _ in range(setting.users)]


def _example(generator: random.Random, tokens: int) -> Rendered:
    return Rendered(tuple(generator.randrange(4096) for _ in range(tokens)), (True,) * tokens, False)


def recipe(setting: Setting) -> Recipe:
    """One example an optimiser step, no examination on the way."""
    return make_recipe(
        {"rank": setting.rank, "batch_size": 1, "epochs": 1, "patience": None,
         "row_tokens": setting.tokens, "max_length": setting.tokens}
    )  # fmt: skip


def run_packed(base: BaseModel, setting: Setting, users: list[tuple[Rendered, ...]]) -> None:
    """All users at once through the public training loop."""
    learners = [Learner(str(number), recipe(setting), examples) for number, examples in enumerate(users)]
    for trained in train(base, learners, setting.users, setting.tokens):
        assert trained.steps == setting.steps


def run_peft(model: torch.nn.Module, setting: Setting, users: list[tuple[Rendered, ...]]) -> None:
    """One user after another: plain PEFT, one loaded base, fused AdamW, clipping."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for examples in users:
        optimiser = torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.0, fused=True)
        for example in examples:
            ids = torch.tensor([example.tokens])
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            optimiser.zero_grad()


def run_frozen(base: BaseModel, setting: Setting, users: list[tuple[Rendered, ...]]) -> None:
    """The base's own forward and input-gradient backward on the packed batches; nothing is trained."""
    embed = base.model.get_input_embeddings()
    for step in range(setting.steps):
        rows: list[Row] = [pack([(0, examples[step])], setting.tokens)[0] for examples in users]
        batch = stack(rows, base.model)
        hook = embed.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
        try:
            losses_KT, _ = token_losses(base, batch)
        finally:
            hook.remove()
        losses_KT.sum().backward()


def compare(setting: Setting, rounds: int) -> dict[str, object]:
    """Interleaved rounds of the three sides; ratios of tokens a second and every raw time."""
    base, other = small_base(), small_base()
    targets = sorted({site.name.rpartition(".")[2] for site in base.sites})
    config = LoraConfig(r=setting.rank, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")
    peft_model = get_peft_model(other.model, config)
    users = users_examples(setting)
    sides: dict[str, Callable[[], None]] = {
        "packed": lambda: run_packed(base, setting, users),
        "peft": lambda: run_peft(peft_model, setting, users),
        "frozen": lambda: run_frozen(base, setting, users),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    over_peft = [peft / packed for peft, packed in zip(seconds["peft"], seconds["packed"], strict=True)]
    over_frozen = [frozen / packed for frozen, packed in zip(seconds["frozen"], seconds["packed"], strict=True)]
    return {"tokens": setting.tokens, "over_peft": over_peft, "over_frozen": over_frozen, "seconds": seconds}


def show(result: dict[str, object]) -> str:
    """One line of the table: both ratios as median (lowest-highest)."""
    spread = [
        f"{median(ratios):5.2f}x ({min(ratios):.2f}-{max(ratios):.2f})"
        for ratios in (result["over_peft"], result["over_frozen"])
        if isinstance(ratios, list)
    ]
    tokens = result["tokens"]
    assert isinstance(tokens, int)
    return f"{tokens:>6} {spread[0]:>22} {GOALS.get(tokens, 0):>6} {spread[1]:>22} {FROZEN_GOAL:>6}"


def processor() -> str:
    """The processor's own name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


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
    machine = {
        "date": datetime.now(UTC).date().isoformat(), "machine": f"{processor()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        "peft": peft.__version__,
    }  # fmt: skip
    print(machine)  # noqa: T201  a script's report
    print(f"{'tokens':>6} {'packed / PEFT loop':>22} {'goal':>6} {'packed / frozen base':>22} {'goal':>6}")  # noqa: T201
    results = []
    for tokens in options.tokens:
        results.append(compare(Setting(options.users, tokens, options.steps, options.rank), options.rounds))
        print(show(results[-1]), flush=True)  # noqa: T201
    if options.save:
        options.save.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
