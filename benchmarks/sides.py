"""What benchmarks compare: bases of real shapes with random weights, users to train, and each way of training them.

K slots, T tokens a slot, P numbers a user, I inputs and O outputs of a linear, R rank, N tokens of all users.
"""

import copy
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from benchmarks.measuring import Enough, Floor, Turns
from lora_core.banks.table import make_bank
from lora_core.base_model import BaseModel, freeze
from lora_core.batch import Batch
from lora_core.data.packing import Row, pack
from lora_core.data.rendering import IGNORED, Rendered
from lora_core.forward import token_losses
from lora_core.learner import Learner
from lora_core.memory import predict
from lora_core.methods import LoraSpec
from lora_core.planner import free_bytes
from lora_core.products import QUICK
from lora_core.recipe import Recipe, make_recipe
from lora_core.train import Compute, train

Examples = tuple[Rendered, ...]


@dataclass(frozen=True)
class Shape:
    """The sizes that decide how fast a base is."""

    name: str
    family: type[PreTrainedConfig]
    vocabulary: int
    width: int
    inner: int  # of the MLP
    layers: int
    heads: int
    key_heads: int
    head_width: int
    tied: bool = True

    def config(self) -> PreTrainedConfig:
        """As transformers spells it."""
        return self.family(
            vocab_size=self.vocabulary, hidden_size=self.width, intermediate_size=self.inner,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.key_heads,
            head_dim=self.head_width, max_position_embeddings=32768, tie_word_embeddings=self.tied,
        )  # fmt: skip

    def shrunk(self) -> "Shape":
        """The same architecture, small enough for a processor and a second."""
        return replace(
            self, vocabulary=512, width=64, inner=160, layers=2, heads=4, key_heads=2, head_width=16,
            name=f"{self.name}, shrunk",
        )  # fmt: skip


SHAPES = {  # as their makers publish them
    "8B": Shape("Llama-3.1-8B", LlamaConfig, 128256, 4096, 14336, 32, 32, 8, 128, tied=False),
    "4B": Shape("Qwen3-4B", Qwen3Config, 151936, 2560, 9728, 36, 32, 8, 128),
    "1B": Shape("Llama-3.2-1B", LlamaConfig, 128256, 2048, 8192, 16, 32, 8, 64),
    "0.5B": Shape("Qwen2.5-0.5B", Qwen2Config, 151936, 896, 4864, 24, 14, 2, 64),
    "6M": Shape("Llama of 6M", LlamaConfig, 4096, 256, 704, 6, 8, 8, 32),
}


def chosen_shape(name: str, tiny: bool) -> Shape:
    """A shape by its short name, shrunk for a run that only shows that all works."""
    return SHAPES[name].shrunk() if tiny else SHAPES[name]


def random_base(shape: Shape, device: torch.device, dtype: torch.dtype) -> BaseModel:
    """A base with random weights, made on the device itself: seconds for 8B.  Speed does not depend on them."""
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(shape.config(), dtype=dtype, attn_implementation="sdpa")
    return freeze(model, tokenizer=None)


def twin(base: BaseModel) -> BaseModel:
    """The same weights in the same memory under modules of their own: what is hung on one is not on the other."""
    kept = {id(tensor): tensor for tensor in (*base.model.parameters(), *base.model.buffers())}
    return replace(base, model=copy.deepcopy(base.model, kept))


def stock(base: BaseModel) -> BaseModel:
    """A twin whose linears are torch's and transformers' own again: what anybody else runs."""
    plain = twin(base)
    for module in plain.model.modules():
        if type(module) in QUICK.values():
            module.__class__ = type(module).__base__
    return plain


@dataclass(frozen=True)
class Load:
    """What a user reads in one optimiser step."""

    sequences: int
    shortest: int  # tokens of a sequence
    longest: int
    prompts: float = 0.0  # share of a sequence that is read and not learnt

    def examples(self, steps: int, vocabulary: int, seed: int = 0) -> Examples:
        """Random ones for so many steps."""
        generator = random.Random(seed)
        lengths = (generator.randint(self.shortest, self.longest) for _ in range(steps * self.sequences))
        return tuple(Rendered(tuple(generator.choices(range(vocabulary), k=n)), self._learnt(n)) for n in lengths)

    def _learnt(self, length: int) -> tuple[bool, ...]:
        prompt = round(self.prompts * length)
        return (False,) * prompt + (True,) * (length - prompt)

    def rows(self, row_tokens: int) -> int:
        """How many rows of T tokens a step of sequences of the longest kind takes."""
        return -(-self.sequences // (row_tokens // self.longest))

    def recipe(self, rank: int, row_tokens: int) -> Recipe:
        """One batch an optimiser step, one epoch, no examination on the way."""
        return make_recipe(
            {"rank": rank, "batch_size": self.sequences, "epochs": 1, "patience": None,
             "row_tokens": row_tokens, "max_length": row_tokens}
        )  # fmt: skip


def start_row(base: BaseModel, recipe: Recipe) -> Tensor:
    """A row to start from, for all users: drawing numbers for each takes a processor seconds at billions of them."""
    return make_bank(base, [recipe.method]).start_row(recipe.method, recipe.seed)


def learners(recipe: Recipe, users: Sequence[Examples], start_P: Tensor | None = None) -> list[Learner]:
    """A learner for each user; each draws its own start where none is given."""
    return [Learner(str(number), recipe, examples, start=start_P) for number, examples in enumerate(users)]


def run_packed(
    base: BaseModel, cohort: Sequence[Learner], row_tokens: int, turns: Turns | None = None, slots: int | None = None,
    compute: Compute | None = None,
) -> None:  # fmt: skip
    """All users at once through the public training loop, until they are done or `turns` has seen enough."""
    try:
        for trained in train(base, cohort, slots or len(cohort), row_tokens, watch=turns, compute=compute):
            assert trained.outcome == "finished", trained.reason
    except Enough:
        pass


def run_frozen(base: BaseModel, batches: Iterable[Batch]) -> None:
    """The base's own forward and input-gradient backward on the packed batches; nothing is trained."""
    embed = base.model.get_input_embeddings()
    for batch in batches:
        hook = embed.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
        try:
            losses_KT, _ = token_losses(base, batch)
        finally:
            hook.remove()
        losses_KT.sum().backward()


def packed_rows(users: Sequence[Examples], load: Load, row_tokens: int, steps: int) -> Iterator[list[Row]]:
    """The batches that packed training reads in its first steps: one row a user, packed on the way, as in the loop."""
    for step in range(steps):
        batch = slice(step * load.sequences, (step + 1) * load.sequences)
        rows = [pack(list(enumerate(examples[batch])), row_tokens) for examples in users]
        yield from ([user[number % len(user)] for user in rows] for number in range(load.rows(row_tokens)))


def packed_batches(
    base: BaseModel, users: Sequence[Examples], load: Load, row_tokens: int, steps: int
) -> Iterator[Batch]:
    """The same, on the device."""
    return (base.stack(rows) for rows in packed_rows(users, load, row_tokens, steps))


def peft_twin(base: BaseModel, rank: int) -> nn.Module:
    """The base under PEFT; adapters keep the base's dtype, which saves PEFT its casts and is its fastest way."""
    targets = sorted({site.name.rpartition(".")[2] for site in base.sites})
    config = LoraConfig(r=rank, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")
    model: nn.Module = get_peft_model(stock(base).model, config, autocast_adapter_dtype=False)
    return model


def run_peft(model: nn.Module, examples: Examples, load: Load, micro: int) -> None:
    """One user: plain PEFT, fused AdamW, clipping; `micro` sequences at a time, padded to the longest that may come."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.0, fused=True)
    for start in range(0, len(examples), load.sequences):
        parts = range(start, start + load.sequences, micro)
        for part in parts:
            ids, labels = _padded(examples[part : part + micro], load.longest, parameters[0].device)
            (model(input_ids=ids, labels=labels, use_cache=False).loss / len(parts)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()


def _padded(examples: Examples, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and labels; what pads comes last, so that causal attention needs no mask."""
    rests = [length - len(example.tokens) for example in examples]
    ids = [(*example.tokens, *[0] * rest) for example, rest in zip(examples, rests, strict=True)]
    labels = [(*_labels(example), *[IGNORED] * rest) for example, rest in zip(examples, rests, strict=True)]
    return torch.tensor(ids).to(device), torch.tensor(labels).to(device)


def _labels(example: Rendered) -> Iterator[int]:
    return (token if trained else IGNORED for token, trained in zip(example.tokens, example.trained, strict=True))


def compile_layers(model: nn.Module, backend: str = "inductor") -> None:
    """Each decoder layer compiled for one shape, in place; the layers share what is compiled."""
    torch.compiler.reset()  # forget bases from before: there is a limit to how often a layer may be compiled
    layers = [module for name, module in model.named_modules() if name.split(".")[-2:-1] == ["layers"]]
    for layer in layers:
        layer.compile(dynamic=False, backend=backend)


class FlatSite(nn.Module):
    """The pattern others use, written by us from its description: one frozen linear for tokens of all users in a row.

    Each user's A (R I) and B (O R) are parameters of their own, stacked on every forward; two grouped products over
    the flat batch, scale, add.  Rows of the batch belong to the users in their order, each as many tokens.
    """

    def __init__(self, frozen: nn.Module, inputs: int, outputs: int, users: int, rank: int) -> None:
        super().__init__()
        self.frozen, self.scale = frozen, 32 / rank
        weight = frozen.weight
        assert isinstance(weight, Tensor)  # nn.Module types its attributes loosely
        make = partial(torch.empty, device=weight.device, dtype=weight.dtype)
        self.downs = nn.ParameterList(nn.Parameter(make(rank, inputs).normal_(std=0.02)) for _ in range(users))
        self.ups = nn.ParameterList(nn.Parameter(make(outputs, rank).zero_()) for _ in range(users))

    def forward(self, x_KTI: Tensor) -> Tensor:
        """The frozen linear plus the users' deltas, one after the other."""
        x_NI = x_KTI.flatten(0, 1)
        users = len(self.downs)
        ends_K = torch.arange(1, users + 1, device=x_NI.device, dtype=torch.int32) * (len(x_NI) // users)
        low_NR = grouped_product(x_NI, torch.stack([*self.downs]).mT, ends_K)
        delta_NO = grouped_product(low_NR, torch.stack([*self.ups]).mT, ends_K)
        y_KTO: Tensor = self.frozen(x_KTI) + (delta_NO * self.scale).unflatten(0, x_KTI.shape[:2])
        return y_KTO


def grouped_product(x_NI: Tensor, weights_KIO: Tensor, ends_K: Tensor) -> Tensor:
    """Each group's tokens times the group's own matrix, by whichever grouped kernel this torch has."""
    kernel = getattr(F, "grouped_mm", None) or (getattr(torch, "_grouped_mm", None) if x_NI.is_cuda else None)
    if kernel is not None:
        y_NO: Tensor = kernel(x_NI, weights_KIO, offs=ends_K)
        return y_NO
    starts = [0, *ends_K.tolist()]
    return torch.cat([x_NI[a:b] @ w_IO for a, b, w_IO in zip(starts, starts[1:], weights_KIO, strict=False)])


def flat_twin(base: BaseModel, users: int, rank: int) -> BaseModel:
    """The base with every user's own parameters at every linear."""
    other = twin(base)
    for site in base.sites:
        frozen = other.model.get_submodule(site.name)
        other.model.set_submodule(site.name, FlatSite(frozen, site.inputs, site.outputs, users, rank))
    return other


def run_flat(base: BaseModel, micro_steps: Iterable[Sequence[Row]], micro: int, optimiser: torch.optim.AdamW) -> None:
    """The flat pattern on the packed batches: our attention and head loss, so that only the adapters differ.

    One clip for all users together, the cheap way (and wrong: it lets users change each other's weights).
    """
    parameters = optimiser.param_groups[0]["params"]
    for number, rows in enumerate(micro_steps, 1):
        losses_KT, _ = token_losses(base, base.stack(rows))
        losses_KT.sum().backward()
        if number % micro == 0:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            optimiser.zero_grad()


def fits(base: BaseModel, rank: int, slots: int, row_tokens: int, forgets: bool = False) -> bool:
    """Whether packed training has room, by the memory law: trying costs a GPU many seconds."""
    free = free_bytes(base.model.device)
    spec = LoraSpec(rank=rank)
    return free is None or predict(base, make_bank(base, [spec]), slots, row_tokens, False, forgets) <= free


def adapter_width(base: BaseModel, rank: int) -> int:
    """P with every linear adapted."""
    return sum(rank * (site.inputs + site.outputs) for site in base.sites)


def step_floor(base: BaseModel, shape: Shape, tokens: float, sequence: int, users: int, rank: int) -> Floor:
    """The least that one optimiser step of so many tokens, in such sequences, costs; without users the frozen base's.

    Products: twice through every frozen weight (forward, input gradient), three times through the adapters, causal
    attention with a backward of twice its forward.  Bytes: weights once a pass; of a user's numbers the bf16 copy read
    twice and written once, the gradient written and read, weights and both moments in fp32 read and written.
    """
    width = adapter_width(base, rank) if users else 0
    frozen = sum(site.inputs * site.outputs for site in base.sites) + shape.vocabulary * shape.width
    attention = 6 * sequence * shape.heads * shape.head_width * shape.layers
    return Floor(tokens * (4 * frozen + 6 * width + attention), 2 * 2 * frozen + users * width * (4 + 4 + 8 + 16 + 2))
