"""The demo's base: a small Llama and its tokenizer, really trained, in under a minute on two cores.

It learns to read an appointment and to answer in every style at once, so that a personal adapter has something to decide.
"""

import hashlib
import itertools
import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flows.demo.corpus import Turns, documents

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
CHAT_TEMPLATE = (  # ChatML
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MADE = "made_from.json"
IGNORED = -100


@dataclass(frozen=True)
class Plan:
    """How large the base is and how long it learns; one change and it is made anew."""

    vocabulary: int = 1024
    width: int = 128
    inner: int = 320
    layers: int = 4
    heads: int = 4
    steps: int = 600
    batch: int = 48  # documents a step
    learning_rate: float = 3e-3
    warmup: int = 40  # steps
    vocabulary_documents: int = 3000


def make_base(folder: Path, seed: int = 0, say: Callable[[str], None] | None = None, plan: Plan | None = None) -> Path:
    """A trained base in `folder`: the one already there, if it was made from the same plan, seed and text.

    It is made beside the folder and renamed when complete, so an interrupted call leaves nothing that looks finished.
    """
    plan, say = plan or Plan(), say or (lambda _: None)
    origin = _origin(plan, seed)
    if _is_made_from(folder, origin):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as workshop:
        made = Path(workshop) / folder.name
        tokenizer = train_tokenizer(plan, seed)
        model = train_model(plan, seed, tokenizer, say)
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        (made / MADE).write_text(origin, encoding="utf-8")
        _move_in(made, folder, origin)
    return folder


def train_tokenizer(plan: Plan, seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (as GPT-2's) over the text it will meet, with a ChatML template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=plan.vocabulary,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    reading = itertools.islice(documents(random.Random(f"{seed}/tokenizer")), plan.vocabulary_documents)
    bpe.train_from_iterator((_plain(document) for document in reading), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, pad_token=PAD, chat_template=CHAT_TEMPLATE, model_max_length=512
    )


def train_model(
    plan: Plan, seed: int, tokenizer: PreTrainedTokenizerFast, say: Callable[[str], None]
) -> LlamaForCausalLM:
    """A small Llama that has read `plan.steps` batches of documents, each predicted token by token."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(_config(plan, tokenizer)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, plan))
    started = time.monotonic()

    for step, tokens_BT in enumerate(_batches(plan, seed, tokenizer), start=1):
        loss = _loss(model, tokens_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == plan.steps:
            say(f"base: step {step} of {plan.steps}, loss {loss.item():.3f}, {time.monotonic() - started:.0f} s")
    return model.eval()


def _config(plan: Plan, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=plan.width,
        intermediate_size=plan.inner,
        num_hidden_layers=plan.layers,
        num_attention_heads=plan.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _rate(step: int, plan: Plan) -> float:
    """Linear warm-up, then linear decay to a twentieth."""
    if step < plan.warmup:
        return (step + 1) / plan.warmup
    return max(0.05, (plan.steps - step) / max(1, plan.steps - plan.warmup))


def _loss(model: LlamaForCausalLM, tokens_BT: Tensor) -> Tensor:
    """Mean next-token loss; padding comes last, so causal attention needs no mask."""
    logits_BTV = model(input_ids=tokens_BT.clamp_min(0), use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten(), ignore_index=IGNORED
    )


def _batches(plan: Plan, seed: int, tokenizer: PreTrainedTokenizerFast) -> Iterator[Tensor]:
    """`plan.steps` batches of documents of like lengths, padded with IGNORED."""
    rng = random.Random(f"{seed}/reading")
    reading = documents(rng)
    left = plan.steps
    while left > 0:
        window = [_plain(document) for document in itertools.islice(reading, plan.batch * 20)]
        lines = sorted(tokenizer(window)["input_ids"], key=len)
        batches = [lines[start : start + plan.batch] for start in range(0, len(lines), plan.batch)]
        rng.shuffle(batches)
        yield from (_padded(batch) for batch in batches[:left])
        left -= len(batches)


def _padded(lines: Sequence[Sequence[int]]) -> Tensor:
    rows = [torch.tensor(line) for line in lines]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED)


def _plain(document: Turns | str) -> str:
    """A document as the model reads it: ChatML for a chat, and the end marked either way."""
    if isinstance(document, str):
        return document + END
    return "".join(f"{START}{role}\n{content}{END}\n" for role, content in document)


def _origin(plan: Plan, seed: int) -> str:
    """What a base was made from, as JSON: plan, seed, and a digest of the first of its text."""
    sample = itertools.islice(documents(random.Random(f"{seed}/reading")), 500)
    text = hashlib.sha256("\0".join(map(_plain, sample)).encode()).hexdigest()
    template = hashlib.sha256(CHAT_TEMPLATE.encode()).hexdigest()
    return json.dumps({"plan": asdict(plan), "seed": seed, "text": text, "template": template}, indent=2) + "\n"


def _is_made_from(folder: Path, origin: str) -> bool:
    try:
        return (folder / MADE).read_text(encoding="utf-8") == origin
    except FileNotFoundError:
        return False


def _move_in(made: Path, folder: Path, origin: str) -> None:
    """Put a finished base in its place; one of another plan gives way, an equal one that came first stays."""
    if _is_made_from(folder, origin):
        return
    if folder.exists():
        shutil.rmtree(folder)
    made.rename(folder)
