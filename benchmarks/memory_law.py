"""The memory law: predicted against measured peaks of random packs: `python benchmarks/memory_law.py`.

Each configuration (architecture, size, slots, row length, rank, targets, dropout, checkpointing) is predicted from
shapes, then really run for two micro-steps and an optimiser step.  On a GPU the measure is
torch.cuda.max_memory_allocated, on a CPU the memory events of torch's profiler: neither knows of the prediction.
`--packs N` also plans N random packs at 95 % of a random limit, and counts those that went beyond it.
"""

import argparse
import json
import os
import platform
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Literal

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from benchmarks.measuring import profiled_peak
from lora_core.allocators import release, tighten
from lora_core.banks.bank import Bank
from lora_core.banks.lora import LoraBank, lora_bank
from lora_core.base_model import BaseModel, freeze
from lora_core.cohort import Cohort
from lora_core.data.packing import pack
from lora_core.data.rendering import Rendered
from lora_core.errors import MemoryTooSmall
from lora_core.layers import checkpointed
from lora_core.learner import Lesson
from lora_core.memory import predict, workspace_bytes
from lora_core.methods import LoraSpec
from lora_core.micro_step import read_rows
from lora_core.optim import RowStep, gradient_norms, step_rows
from lora_core.planner import SHARE, Plan, plan
from lora_core.recipe import Recipe

VOCABULARY = 512

Targets = Literal["all-linear"] | tuple[str, ...]


@dataclass(frozen=True)
class Setting:
    """One configuration.  `heads` also says how wide the base is: 32 numbers a head on a CPU, 128 on a GPU."""

    architecture: str
    layers: int
    heads: int
    slots: int
    row_tokens: int
    rank: int
    targets: Targets
    dropout: float
    checkpointed: bool
    lends: bool = True  # one user reads in all slots, as it may where the others wait to be examined

    @property
    def spec(self) -> LoraSpec:
        """Its method."""
        return LoraSpec(rank=self.rank, dropout=self.dropout, targets=self.targets)


TARGETS: dict[str, tuple[Targets, ...]] = {
    "llama": ("all-linear", ("q_proj", "v_proj"), ("down_proj",)),
    "gpt2": ("all-linear", ("c_attn",)),
}


def random_setting(generator: random.Random, layers: int = 4) -> Setting:
    """A configuration of two layers up to `layers`."""
    choose = generator.choice
    architecture = choose(["llama", "gpt2"])
    return Setting(
        architecture, generator.randint(2, layers), choose([2, 4, 8]), choose([1, 2, 3, 4, 8, 16]),
        choose([16, 32, 48, 64, 100, 128]), choose([1, 4, 8, 16, 32]), choose(TARGETS[architecture]),
        choose([0.0, 0.1]), choose([False, True]),
    )  # fmt: skip


def make_base(setting: Setting, device: str) -> BaseModel:
    """A base of random weights: memory does not depend on what they are."""
    width = setting.heads * (128 if device == "cuda" else 32)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    if setting.architecture == "llama":
        model: transformers.PreTrainedModel = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=width, intermediate_size=width * 11 // 4,
                num_hidden_layers=setting.layers, num_attention_heads=setting.heads,
                num_key_value_heads=setting.heads // 2, max_position_embeddings=4096,
                bos_token_id=1, eos_token_id=2,
            )
        )  # fmt: skip
    else:
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY, n_embd=width, n_layer=setting.layers, n_head=setting.heads, n_positions=4096,
                bos_token_id=1, eos_token_id=2,
            )
        )  # fmt: skip
    return freeze(model.to(device, dtype), None)


def measured(base: BaseModel, bank: Bank, setting: Setting) -> int:
    """The real peak in bytes, base included."""
    device = base.model.device
    release(device)
    if device.type == "cuda":
        workspace_bytes(device, base.model.dtype)  # else the first configuration alone would make them
        torch.cuda.reset_peak_memory_stats(device)
        train_twice(base, bank, setting)
        most: int = torch.cuda.max_memory_allocated(device)
        return most
    peak = profiled_peak(lambda: train_twice(base, bank, setting))
    storages = {tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in base.frozen}
    total: int = sum(storages.values()) + peak
    return total


def train_twice(base: BaseModel, bank: Bank, setting: Setting) -> None:
    """Two micro-steps of every slot, the second perhaps one user's, and an optimiser step of everybody."""
    cohort = Cohort(setting.slots, bank.width, base.model.device, base.model.dtype)
    lessons = [_lesson(setting, slot) for slot in range(setting.slots)]
    with checkpointed(base, setting.checkpointed), bank.attached(base, cohort):
        read_rows(base, cohort, lessons, setting.row_tokens)
        for lane in range(1, setting.slots if setting.lends else 1):
            cohort.borrow(0, lane)
        read_rows(base, cohort, lessons, setting.row_tokens)
        cohort.give_back()
        norms = gradient_norms(cohort).tolist()
        step_rows(cohort, [RowStep(1, 1e-3, Recipe())] * setting.slots, norms)


def _lesson(setting: Setting, slot: int) -> Lesson:
    """A row of one random example: no row has more predictions that count, and prompts and filling take less memory."""
    (row,) = pack([(0, _example(random.Random(slot), setting.row_tokens))], setting.row_tokens)
    return Lesson(row, 1.0, setting.dropout, slot)


def _example(generator: random.Random, tokens: int) -> Rendered:
    return Rendered(tuple(generator.randrange(VOCABULARY) for _ in range(tokens)), (True,) * tokens)


def compare(setting: Setting, device: str) -> dict[str, object]:
    """One line of the table."""
    base = make_base(setting, device)
    bank = lora_bank(base, [setting.spec])
    start = time.perf_counter()
    predicted = predict(
        base, bank, setting.slots, setting.row_tokens, setting.dropout > 0, setting.checkpointed, setting.lends
    )  # fmt: skip
    seconds = time.perf_counter() - start
    real = measured(base, bank, setting)
    return {
        "setting": asdict(setting), "predicted": predicted, "measured": real, "error": predicted / real - 1,
        "seconds": seconds,
    }  # fmt: skip


def error_of(result: dict[str, object]) -> float:
    """Predicted over measured, less 1."""
    error = result["error"]
    assert isinstance(error, float)
    return error


def run_pack(setting: Setting, limit: int, device: str) -> dict[str, object]:
    """Plan a pack at 95 % of a limit and run it: what was planned, and whether the limit held."""
    base = make_base(setting, device)
    bank = lora_bank(base, [setting.spec])
    with limited(limit, base):
        try:
            chosen = plan(base, bank, int(SHARE * limit), setting.row_tokens, 64, setting.dropout > 0)
        except MemoryTooSmall:
            return {"limit": limit, "plan": None, "held": True}
        real, held = _tried(base, bank, setting, chosen)
    return {"limit": limit, "plan": asdict(chosen), "measured": real, "held": held and real <= limit}


def _tried(base: BaseModel, bank: LoraBank, setting: Setting, chosen: Plan) -> tuple[int, bool]:
    planned = {**asdict(setting), "slots": chosen.slots, "checkpointed": chosen.checkpointed, "lends": True}
    try:
        return measured(base, bank, Setting(**planned)), True
    except torch.OutOfMemoryError:
        return 0, False


@contextmanager
def limited(limit: int, base: BaseModel) -> Iterator[None]:
    """On a GPU the allocator refuses more than the limit; on a CPU the measure alone tells."""
    device = base.model.device
    if device.type != "cuda":
        yield
        return
    release(device)
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info(device)[1], device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def main() -> None:
    """Print the tables and keep the raw figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configurations", type=int, default=40)
    parser.add_argument("--packs", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, help="write the raw figures as JSON")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tighten(torch.device(device))
    generator = random.Random(options.seed)
    print(f"{'predicted':>14} {'measured':>14} {'error':>9}  configuration")  # noqa: T201  a script's report
    results = []
    for number in range(options.configurations):
        results.append(compare(replace(random_setting(generator), lends=number % 2 == 1), device))
        result = results[-1]
        print(f"{result['predicted']:>14,} {result['measured']:>14,} {error_of(result):>+9.4%}  {result['setting']}")  # noqa: T201
    errors = [abs(error_of(result)) for result in results]
    print(f"error: median {median(errors):.4%}, maximum {max(errors):.4%}")  # noqa: T201
    unit = 2**26 if device == "cuda" else 2**20
    packs = [
        run_pack(random_setting(generator), generator.randrange(8 * unit, 128 * unit), device)
        for _ in range(options.packs)
    ]
    broken = sum(not one["held"] for one in packs)
    ran = sum(one["plan"] is not None for one in packs)
    print(f"packs: {ran} planned at {SHARE:.0%} and run, {broken} beyond their limit")  # noqa: T201
    if options.save:
        machine = {
            "date": datetime.now(UTC).date().isoformat(), "device": _device_name(device),
            "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__,
        }  # fmt: skip
        kept = {"machine": machine, "results": results, "packs": packs}
        options.save.write_text(json.dumps(kept, indent=1) + "\n")


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
