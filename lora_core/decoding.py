"""One batch of answers: K prompts in, what each row says next out, by transformers' own generation with its cache.

Nothing here knows adapters: whoever has attached some gets row k under slot k's.  K slots, T tokens a row, V
vocabulary, N new tokens.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from lora_core.base_model import BaseModel
from lora_core.data.rendering import turn_end

STEP = 16  # prompts are padded to a multiple: batches of about the same length are of one shape


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the likeliest at temperature 0, else one of the nucleus, by the row's own seed."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


GREEDY = Sampling()


@dataclass(frozen=True)
class Line:
    """What one row reads, and how it goes on: at most so many tokens."""

    tokens: Sequence[int]
    most: int
    sampling: Sampling = GREEDY
    said: int = 0  # how many of the tokens are the answer's own: its seed has drawn as often


IDLE = Line((0,), 1)  # what a slot reads when nobody asks


def decode(base: BaseModel, lines: Sequence[Line]) -> list[list[int]]:
    """What each row says next, the token that ends an answer included; done when the last row is.

    A row's logits have the same bits whoever else is in the batch, at the same K and padded T (on a CPU with one
    thread; with more, to within rounding).  So there is always some padding: with none, transformers would leave the
    mask out, and another kernel might run.
    """
    width = -(-max(len(line.tokens) + 1 for line in lines) // STEP) * STEP
    rests = [width - len(line.tokens) for line in lines]
    tokens = [[0] * rest + list(line.tokens) for rest, line in zip(rests, lines, strict=True)]
    seen = [[0] * rest + [1] * len(line.tokens) for rest, line in zip(rests, lines, strict=True)]
    steps, ends, device = max(line.most for line in lines), end_tokens(base), base.model.device
    settings = GenerationConfig(max_new_tokens=steps, eos_token_id=ends, pad_token_id=0)  # the likeliest token, always
    with torch.inference_mode(), unadvised(base.model):
        output_KT = base.model.generate(
            input_ids=torch.tensor(tokens, device=device), attention_mask=torch.tensor(seen, device=device),
            generation_config=settings, stopping_criteria=[_Limits(lines, width, device)],
            logits_processor=[_Draws(lines, width, steps, device)],
        )  # fmt: skip
    said = output_KT[:, width:].tolist()
    return [_until_the_end(tokens, line.most, ends or ()) for tokens, line in zip(said, lines, strict=True)]


@contextmanager
def unadvised(model: PreTrainedModel) -> Iterator[None]:
    """While inside, nothing of what a base's makers advise fills in what is not set: some of it counts the padding."""
    advised, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = advised


def end_tokens(base: BaseModel) -> list[int] | None:
    """Tokens that end an answer: the tokenizer's, its chat template's, and those that the base's makers name.

    None where there are none.
    """
    named = base.model.generation_config.eos_token_id
    own = [named] if isinstance(named, int) else list(named or ())
    if base.tokenizer is not None:
        own += [end for end in (base.tokenizer.eos_token_id, turn_end(base.tokenizer)) if end is not None]
    return sorted(set(own)) or None


def draw(logits_KV: Tensor, temperature_K1: Tensor, top_p_K1: Tensor, uniform_K1: Tensor) -> Tensor:
    """A token for each row, K 1, from its nucleus (Holtzman et al., 2020): where summed odds reach the uniform number.

    The nucleus is the fewest likeliest tokens whose odds reach top_p.  No row's token depends on another row.
    """
    scores_KV, order_KV = (logits_KV / temperature_K1).sort(dim=-1, descending=True, stable=True)
    odds_KV = scores_KV.softmax(-1, dtype=torch.float64)
    sums_KV = odds_KV.cumsum(-1)
    total_K1 = sums_KV.where(sums_KV - odds_KV < top_p_K1, 0).amax(-1, keepdim=True)
    return order_KV.gather(-1, (sums_KV < uniform_K1 * total_K1).sum(-1, keepdim=True))


class _Limits:
    """Stops each row at its own limit, as a stopping criterion of transformers."""

    def __init__(self, lines: Sequence[Line], width: int, device: torch.device) -> None:
        self.until_K = torch.tensor([width + line.most for line in lines], device=device)

    def __call__(self, tokens_KT: Tensor, _: object) -> Tensor:
        return self.until_K <= tokens_KT.shape[1]


class _Draws:
    """Leaves one token to rows that sample, as a logits processor of transformers; greedy rows keep their logits."""

    def __init__(self, lines: Sequence[Line], width: int, steps: int, device: torch.device) -> None:
        self.width = width
        chosen = [line.sampling for line in lines]
        self.draws_K1 = torch.tensor([[one.temperature > 0] for one in chosen], device=device)
        self.temperature_K1 = torch.tensor([[one.temperature or 1.0] for one in chosen], device=device)
        self.top_p_K1 = torch.tensor([[one.top_p] for one in chosen], device=device)
        uniform = [uniform_numbers(line, steps) for line in lines]
        self.uniform_KN = torch.tensor(uniform, dtype=torch.float64, device=device)
        self.needed = any(one.temperature > 0 for one in chosen)

    def __call__(self, tokens_KT: Tensor, logits_KV: Tensor) -> Tensor:
        if not self.needed:
            return logits_KV
        step = tokens_KT.shape[1] - self.width
        drawn_K1 = draw(logits_KV, self.temperature_K1, self.top_p_K1, self.uniform_KN[:, step, None])
        alone_KV = torch.full_like(logits_KV, -torch.inf).scatter_(-1, drawn_K1, 0)
        return torch.where(self.draws_K1, alone_KV, logits_KV)


def uniform_numbers(line: Line, steps: int) -> list[float]:
    """A row's next random numbers: of its own seed and of how often it has drawn, of no generator that is shared."""
    generator = random.Random(line.sampling.seed)
    return [generator.random() for _ in range(line.said + steps)][line.said :]


def _until_the_end(tokens: list[int], most: int, ends: Sequence[int]) -> list[int]:
    last = next((place for place, token in enumerate(tokens[:most]) if token in ends), most)
    return tokens[: min(most, last + 1)]
