"""Answers for many users in one batch against PEFT and the base alone: `python benchmarks/mixed_generation.py`.

One process, one set of frozen weights, interleaved: in every round each side answers the same users' prompts of mixed
lengths, greedily, with a cache, always to the last token (random weights know no end).  PEFT has all adapters loaded
and either switches from one to the next (`set_adapter`) and answers one user at a time, or gets all prompts in one
batch with `adapter_names`.  The base answers all prompts in one batch, without adapters.  Tokens a second of our mixed
batch over each side's, as medians over the rounds with the lowest and highest; whether we and PEFT say the same is
counted, and what a swap of an adapter into a slot takes is timed.  Absolute times are not for comparing machines.
"""

import argparse
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypedDict

import torch
from peft import LoraConfig, set_peft_model_state_dict
from torch import Tensor

from benchmarks.measuring import RESULTS, Samples, alternate, machine_facts, ratios, save, say, spread, timed
from benchmarks.sides import SHAPES, chosen_shape, peft_twin, random_base, twin
from lora_core.banks.lora import LoraBank
from lora_core.base_model import BaseModel
from lora_core.methods import LoraSpec
from lora_core.serving import Adapter, Request, Server

GOALS = {"peft one by one": 5.0, "peft mixed batch": 1.0, "base alone": 0.75}
ALPHA = 32  # as `peft_twin` sets it
CPU = torch.device("cpu")
Answers = list[list[int]]
Answering = Callable[[], Answers]


@dataclass(frozen=True)
class Setting:
    """Who asks: prompts of `shortest` to `longest` tokens, and so many new ones for each."""

    shape: str
    users: int
    shortest: int
    longest: int
    new_tokens: int
    rank: int

    def prompts(self, vocabulary: int) -> list[tuple[int, ...]]:
        """One a user, the same in every run."""
        generator = random.Random(0)
        lengths = [generator.randint(self.shortest, self.longest) for _ in range(self.users)]
        return [tuple(generator.choices(range(vocabulary), k=length)) for length in lengths]


class Measured(TypedDict):
    """Every raw sample of a setting, and what follows from them."""

    setting: dict[str, Any]  # its fields
    seconds: Samples
    ratios: dict[str, list[float]]
    same_as_peft: int
    swap_seconds: list[float]


def compare(setting: Setting, rounds: int, tiny: bool) -> Measured:
    """Seconds of each side, round by round."""
    shape = chosen_shape(setting.shape, tiny)
    base = random_base(shape, CPU, torch.float32)
    base.model.generation_config.eos_token_id = None
    prompts = setting.prompts(shape.vocabulary)
    bank = LoraBank(base.sites, setting.rank)
    rows = [0.02 * torch.randn(bank.width) for _ in prompts]
    server = Server(twin(base), bank, setting.users, lambda name: Adapter(rows[int(name)], ALPHA / setting.rank))
    peft_model = _peft(base, bank, rows, setting)
    answering = {
        "mixed": partial(_ours, server, prompts, setting.new_tokens),
        "peft one by one": partial(_one_by_one, peft_model, prompts, setting.new_tokens),
        "peft mixed batch": partial(_one_batch, peft_model, prompts, setting.new_tokens, named=True),
        "base alone": partial(_one_batch, base.model, prompts, setting.new_tokens),
    }
    said: dict[str, Answers] = {}
    seconds = alternate({name: partial(_keep, said, name, ask) for name, ask in answering.items()}, rounds, CPU)
    return {
        "setting": asdict(setting),
        "seconds": seconds,
        "ratios": {f"mixed / {name}": ratios(seconds[name], seconds["mixed"]) for name in GOALS},
        "same_as_peft": sum(a == b for a, b in zip(said["mixed"], said["peft one by one"], strict=True)),
        "swap_seconds": [timed(partial(server.cohort.admit, 0, row, 1.0), CPU) for row in rows],
    }


def _keep(said: dict[str, Answers], name: str, ask: Answering) -> None:
    said[name] = ask()


def _ours(server: Server, prompts: list[tuple[int, ...]], new_tokens: int) -> Answers:
    return server.answer([Request(str(user), prompt, new_tokens) for user, prompt in enumerate(prompts)])


def _peft(base: BaseModel, bank: LoraBank, rows: list[Tensor], setting: Setting) -> Any:  # PEFT is untyped
    """One base with every user's adapter loaded, by the user's number."""
    model: Any = peft_twin(base, setting.rank)
    config: LoraConfig = model.peft_config["default"]
    spec = LoraSpec(rank=setting.rank, alpha=ALPHA)
    for user, row_P in enumerate(rows):
        model.add_adapter(str(user), config)
        set_peft_model_state_dict(model, bank.to_tensors(row_P, spec), adapter_name=str(user))
    return model.eval()


@torch.inference_mode()
def _one_by_one(model: Any, prompts: list[tuple[int, ...]], new_tokens: int) -> Answers:  # PEFT is untyped
    answers = []
    for user, prompt in enumerate(prompts):
        model.set_adapter(str(user))
        output = _generated(model, torch.tensor([prompt]), torch.ones(1, len(prompt), dtype=torch.int64), new_tokens)
        answers.append(output[0, len(prompt) :].tolist())
    return answers


@torch.inference_mode()
def _one_batch(model: Any, prompts: list[tuple[int, ...]], new_tokens: int, named: bool = False) -> Answers:
    """All prompts padded on the left to the longest; `named`: each with its own adapter.  PEFT is untyped."""
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    seen = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    more = {"adapter_names": [str(user) for user in range(len(prompts))]} if named else {}
    output = _generated(model, tokens, seen, new_tokens, **more)
    return [row[width:] for row in output.tolist()]


def _generated(model: Any, tokens: Tensor, seen: Tensor, new_tokens: int, **more: Any) -> Tensor:
    output: Tensor = model.generate(
        input_ids=tokens, attention_mask=seen, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, **more
    )
    assert output.shape[1] == tokens.shape[1] + new_tokens  # nobody stopped early
    return output


def show(result: Measured) -> None:
    """The table of one setting: each ratio as median (lowest-highest), and what is wanted."""
    setting = Setting(**result["setting"])
    for name, samples in result["seconds"].items():
        rate = setting.users * setting.new_tokens / median(samples)
        ratio = f"{spread(result['ratios'][f'mixed / {name}'])} [{GOALS[name]}]" if name in GOALS else ""
        say(f"{name:<18} {rate:>9,.0f} tokens/s {ratio:>28}")
    say(f"equal answers      {result['same_as_peft']} of {setting.users} (mixed batch, PEFT one by one)")
    say(f"swap of an adapter {spread([1e3 * s for s in result['swap_seconds']], ' ms')}")


def main() -> None:
    """Print the table and keep the raw samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES], default="6M")
    parser.add_argument("--users", type=int, default=32)
    parser.add_argument("--prompt", type=int, nargs=2, default=[16, 96], metavar=("SHORTEST", "LONGEST"))
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a shrunk base: shows that it runs, not how fast")
    parser.add_argument("--save", type=Path, help=f"where raw samples go, such as {RESULTS.name}/NAME.json")
    options = parser.parse_args()
    machine = machine_facts(CPU)
    say(machine)
    shortest, longest = options.prompt
    setting = Setting(options.shape, options.users, shortest, longest, options.new_tokens, options.rank)
    result = compare(setting, options.rounds, options.tiny)
    show(result)
    if options.save:
        save(options.save, machine, [result])


if __name__ == "__main__":
    main()
