"""The usual textbook examples of what LoRA saves, computed from the real shapes instead of remembered."""

from dataclasses import dataclass

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lora_core.artifact import safetensors_bytes
from lora_core.banks.lora import LoraBank
from lora_core.base_model import Site, adaptable, widths
from lora_core.methods import LoraSpec


@dataclass(frozen=True)
class Worked:
    """One example: what is trained of how much, and what that makes on disk, in fp32."""

    what: str
    trained: int
    of: int
    file_bytes: int
    fit: int  # how many such files fit in the space of the whole

    @property
    def share(self) -> float:
        """Trained numbers over all."""
        return self.trained / self.of


def one_matrix(width: int = 768, rank: int = 8) -> Worked:
    """A square weight matrix of d x d: a down of r x d and an up of d x r instead."""
    trained, of = 2 * rank * width, width * width
    return Worked(f"one matrix of {width} x {width} at rank {rank}", trained, of, 4 * trained, of // trained)


def gpt2(rank: int = 8, targets: tuple[str, ...] = ("c_attn", "c_proj")) -> Worked:
    """GPT-2 small with adapters on its attention's and its MLP's projections.  No weights are needed, only shapes."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    linears = {path: linear for path, linear in adaptable(model).items() if path.rpartition(".")[2] in targets}
    bank = LoraBank(tuple(Site(path, *widths(one), n) for n, (path, one) in enumerate(linears.items())), rank)
    spec, parameters = LoraSpec(rank=rank), int(model.num_parameters())
    size = len(safetensors_bytes(bank.to_tensors(torch.zeros(bank.width), spec)))
    what = f"GPT-2, {' and '.join(targets)} at rank {rank}"
    return Worked(what, bank.parameters(spec), parameters, size, 4 * parameters // size)


def remarks() -> list[str]:
    """Where rounded figures mislead."""
    matrix, model = one_matrix(), gpt2()
    attention = gpt2(targets=("c_attn",))
    return [
        f"The {matrix.share:.2%} is of one adapted matrix; of all of GPT-2 it is {model.share:.2%},"
        f" since wider matrices have a smaller share, and embeddings and `c_fc` none.",
        f"`c_proj` names two matrices a layer, the attention's and the MLP's: {model.trained:,} trained numbers;"
        f" with `c_attn` alone {attention.trained:,}.",
        f"A file has {model.file_bytes:,} bytes ({model.file_bytes / 1e6:.1f} MB in fp32, half of it in bf16):"
        f" {model.fit} fit in one model's {4 * model.of / 1e6:.0f} MB.",
    ]
