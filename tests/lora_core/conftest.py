"""Tiny bases of real architectures, and users made of random tokens."""

import random
from collections.abc import Callable, Iterator

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lora_core.base_model import BaseModel, freeze
from lora_core.data.rendering import Rendered, RenderedPair
from lora_core.learner import Learner
from lora_core.methods import LoraSpec
from lora_core.recipe import Recipe, make_recipe

WORDS = 96
T = 48  # tokens a row in these tests


def llama(seed: int = 0) -> LlamaForCausalLM:
    """Two layers, grouped-query attention, gated MLP."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128,
        )
    )  # fmt: skip


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """Two layers, Conv1D with biases, learnt positions, a tied head."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_embd=32, n_layer=2, n_head=4, n_positions=128))


ARCHITECTURES = {"llama": llama, "gpt2": gpt2}


@pytest.fixture(params=["llama", "gpt2"])
def base(request: pytest.FixtureRequest) -> BaseModel:
    """A frozen base of each architecture in turn."""
    return freeze(ARCHITECTURES[request.param](), None, request.param)


@pytest.fixture
def llama_base() -> BaseModel:
    """A frozen Llama."""
    return freeze(llama(), None, "llama")


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Torch computes on so many threads; other tests have as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch computes on one core; other tests have as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def examples(seed: int, count: int = 10, longest: int = 20) -> tuple[Rendered, ...]:
    """Random examples of 6 to `longest` tokens; the first three are a prompt."""
    generator = random.Random(seed)
    lengths = [generator.randrange(6, longest + 1) for _ in range(count)]
    return tuple(
        Rendered(tuple(generator.randrange(WORDS) for _ in range(n)), (False,) * 3 + (True,) * (n - 3)) for n in lengths
    )


def pairs(seed: int, count: int = 16, longest: int = 9) -> tuple[RenderedPair, ...]:
    """A prompt of three tokens and two answers; each kind has words of its own."""
    generator = random.Random(seed)
    return tuple(_pair(generator, longest) for _ in range(count))


def _pair(generator: random.Random, longest: int) -> RenderedPair:
    prompt = [generator.randrange(WORDS) for _ in range(3)]
    lengths = [generator.randrange(3, longest) for _ in range(2)]
    chosen = [generator.randrange(8) for _ in range(lengths[0])]
    rejected = [generator.randrange(8, 16) for _ in range(lengths[1])]
    sides = (Rendered((*prompt, *side), (False,) * 3 + (True,) * len(side)) for side in (chosen, rejected))
    return RenderedPair(*sides)


class LoraRecipe(Recipe):
    """A recipe whose method is LoRA: as `Recipe`, and its type says so."""

    method: LoraSpec = LoraSpec()


def recipe(**settings: object) -> LoraRecipe:
    """A LoRA recipe for these tests: short rows, quick steps, dropout on."""
    defaults: dict[str, object] = {
        "rank": 4, "alpha": 8, "dropout": 0.1, "learning_rate": 5e-3, "epochs": 2, "batch_size": 4, "row_tokens": T,
        "max_length": T, "patience": None,
    }  # fmt: skip
    return LoraRecipe.model_validate(make_recipe({**defaults, **settings}).model_dump())


def lora_of(settings: Recipe) -> LoraSpec:
    """A recipe's method, which is LoRA here."""
    assert isinstance(settings.method, LoraSpec)
    return settings.method


def learner(seed: int, count: int = 10, held_out: int = 0, **settings: object) -> Learner:
    """A user of its own."""
    return Learner(f"user{seed}", recipe(seed=seed, **settings), examples(seed, count), examples(seed + 1000, held_out))


Tokenise = Callable[[], PreTrainedTokenizerFast]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a ChatML template."""
    return make_tokenizer(CHATML)


def make_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a given chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["the quick brown fox says hello to the lazy dog, and the dog answers"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", chat_template=template)
