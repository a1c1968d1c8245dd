"""Peak memory of one optimiser step, full fine-tuning against packed LoRA: `python benchmarks/low_memory.py`.

Without a GPU: a base of GPT-2's size (the real shape, random weights), in fp32, 8 and 4 bits, by the memory events of
torch's profiler.  With one: 1B and 8B shapes in bf16, by torch.cuda.max_memory_allocated.  Full fine-tuning reads one
row at a time, a pack one row of each of K users.  `--tiny` shrinks the bases: it shows that the script runs.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedConfig

from benchmarks.measuring import (
    RESULTS,
    Budget,
    Side,
    first_that_fits,
    gpu_parser,
    machine_facts,
    profiled_peak,
    release,
    save,
    say,
)
from benchmarks.sides import SHAPES
from lora_core.banks.lora import LoraBank, lora_bank
from lora_core.base_model import BaseModel, freeze
from lora_core.cohort import Cohort
from lora_core.data.packing import pack
from lora_core.data.rendering import Rendered
from lora_core.full_tuning import adamw, backward, predict_full, step_all, trainable
from lora_core.layers import checkpointed
from lora_core.learner import Lesson
from lora_core.memory import predict
from lora_core.methods import LoraSpec
from lora_core.micro_step import read_rows
from lora_core.optim import RowStep, gradient_norms, step_rows
from lora_core.quantised import quantisation
from lora_core.recipe import Recipe

RANK = 8


@dataclass(frozen=True)
class Way:
    """One way of training.  K 0 is full fine-tuning."""

    slots: int
    quantised: str = ""
    forgets: bool = False  # layers are checkpointed

    @property
    def words(self) -> str:
        """For a table."""
        how = f"LoRA, {self.slots} packed" if self.slots else "full fine-tuning"
        base = f", base in {self.quantised}" if self.quantised else ""
        return how + base + (", checkpointing" if self.forgets else "")


FULL = (Way(0), Way(0, forgets=True))
PACKED = tuple(Way(k, bits, forget) for k in (1, 8) for bits in ("", "8bit", "4bit") for forget in (False, True))


def config_of(name: str, tiny: bool) -> PreTrainedConfig:
    """A base's shape by its short name."""
    if name != "GPT-2":
        return (SHAPES[name].shrunk() if tiny else SHAPES[name]).config()
    small = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 512, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2Config(**small) if tiny else GPT2Config()


def random_base(config: PreTrainedConfig, quantised: str, device: torch.device) -> BaseModel:
    """A base of random weights; packed ones go by way of a file, as bitsandbytes packs while it loads."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    if not quantised:
        return freeze(model, None)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        release()
        packed = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", device_map={"": str(device)},
            quantization_config=quantisation(quantised, dtype),
        )  # fmt: skip
    return freeze(packed, None, quantised=quantised)


def lesson(row_tokens: int, words: int) -> Lesson:
    """A full row."""
    example = Rendered(tuple(number % words for number in range(row_tokens)), (True,) * row_tokens)
    return Lesson(pack([(0, example)], row_tokens)[0], 1.0, 0.0, 0)


def full_steps(twin: BaseModel, forgets: bool, one: Lesson) -> None:
    """Two optimiser steps of every weight: the second beside the moments of the first."""
    optimiser = adamw(twin)
    with checkpointed(twin, forgets):
        for number in (1, 2):
            backward(twin, one)
            step_all(optimiser, RowStep(number, 1e-5, Recipe()))


def packed_steps(base: BaseModel, bank: LoraBank, way: Way, one: Lesson) -> None:
    """The same of K users' rows."""
    cohort = Cohort(way.slots, bank.width, base.model.device, base.model.dtype)
    with checkpointed(base, way.forgets), bank.attached(base, cohort):
        for number in (1, 2):
            read_rows(base, cohort, [one] * way.slots, len(one.row.tokens))
            norms = gradient_norms(cohort).tolist()
            step_rows(cohort, [RowStep(number, 1e-4, Recipe())] * way.slots, norms)


def peak_of(side: Side, base: BaseModel) -> int:
    """The most bytes that the device holds meanwhile, the base included."""
    if base.model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        side()
        most: int = torch.cuda.max_memory_allocated()
        return most
    storages = {tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in base.frozen}
    return sum(storages.values()) + profiled_peak(side)


def measured(name: str, way: Way, row_tokens: int, tiny: bool, device: torch.device) -> dict[str, object]:
    """One line of the table."""
    base = random_base(config_of(name, tiny), way.quantised, device)
    one = lesson(row_tokens, base.model.config.vocab_size)
    if way.slots:
        bank = lora_bank(base, [LoraSpec(rank=RANK)])
        trained = way.slots * bank.parameters(LoraSpec(rank=RANK))
        predicted = predict(base, bank, way.slots, row_tokens, False, way.forgets, lends=False)
        peak = peak_of(lambda: packed_steps(base, bank, way, one), base)
    else:
        trained, predicted = base.parameters, predict_full(base, row_tokens, way.forgets)
        twin = trainable(base)
        base = replace(twin, name="")  # the frozen one is not needed beside it
        release()
        peak = peak_of(lambda: full_steps(twin, way.forgets, one), base)
    return {
        "base": name, "way": way.words, **asdict(way), "row_tokens": row_tokens, "trained": trained,
        "parameters": base.parameters, "measured": peak, "predicted": predicted,
    }  # fmt: skip


def report(result: Mapping[str, object], full: int | None) -> None:
    """A line for people: MB, share of full fine-tuning's, and what was predicted."""
    peak, predicted = result["measured"], result["predicted"]
    assert isinstance(peak, int)
    assert isinstance(predicted, int)
    share = f"{peak / full:6.1%}" if full else "     -"
    say(f"{result['base']:>6} {peak / 1e6:>10,.1f} MB {share}  predicted {predicted / peak - 1:+.3%}  {result['way']}")


def main() -> None:
    """Print the table and keep the raw figures."""
    parser = gpu_parser(__doc__)
    parser.add_argument("--bases", nargs="+", choices=["GPT-2", *SHAPES])
    parser.add_argument("--row-tokens", type=int, default=512)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not options.tiny else "cpu")
    bases = options.bases or (["1B", "8B"] if device.type == "cuda" or options.tiny else ["GPT-2"])
    budget, results = Budget(options.minutes), list[dict[str, object]]()
    for name in bases:
        full: int | None = None
        for way in (*FULL, *PACKED):
            if budget.spent:
                say(f"{name:>6}   not measured: out of time  {way.words}")
                continue
            run = partial(measured, name, row_tokens=options.row_tokens, tiny=options.tiny, device=device)
            found = first_that_fits([way], run)
            release()
            if found is None:
                say(f"{name:>6}   beyond the device's memory  {way.words}")
                results.append({"base": name, "way": way.words, **asdict(way), "measured": None})
                continue
            _, result = found
            peak = result["measured"]
            full = peak if full is None and not way.slots and isinstance(peak, int) else full
            results.append(result)
            report(result, full)
    folder: Path = options.results or (Path(tempfile.mkdtemp()) if options.tiny else RESULTS)
    save(folder / f"low_memory_{'gpu' if device.type == 'cuda' else 'cpu'}.json", machine_facts(device), results)


if __name__ == "__main__":
    main()
