"""The demo's base: a small Llama and its tokenizer, really trained, in under a minute on two cores.

It learns to read an appointment and to answer in every style at once, so that a personal adapter
has something to decide.
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
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flows.demo.corpus import Document, documents
from flows.errors import Unready

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
CHAT_TEMPLATE = (  # ChatML
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MADE = "made_from.json"


@dataclass(frozen=True)
class Plan:
    """How large the base is and how long it learns; one change and it is made anew."""

    vocabulary: int = 1024
    width: int = 128
    inner: int = 384
    layers: int = 2
    heads: int = 4
    steps: int = 900
    batch: int = 16  # documents a step
    matrix_rate: float = 1e-2  # of Muon
    vector_rate: float = 4e-3  # of AdamW
    warmup: int = 40  # steps
    question_weight: float = 0.05  # what a token of a question counts, beside 1 for one of an answer
    vocabulary_documents: int = 3000


def make_base(folder: Path, seed: int = 0, say: Callable[[str], None] | None = None, plan: Plan | None = None) -> Path:
    """A trained base in `folder`: the one already there, if it was made from the same plan, seed and text.

    It is made beside the folder and renamed when complete, so an interrupted call leaves nothing that looks finished.
    Raises Unready where something else is in its place, such as a base of somebody's own.
    """
    plan, say = plan or Plan(), say or (lambda _: None)
    origin = _origin(plan, seed)
    if _is_made_from(folder, origin):
        return folder
    _check_is_free(folder)
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
    bpe.train_from_iterator(("".join(_as_read(document)) for document in reading), trainer)
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
    optimizers = _optimizers(model, plan)
    schedules = [LambdaLR(optimizer, lambda step: _rate(step, plan)) for optimizer in optimizers]
    started = time.monotonic()

    for step, (tokens_BT, weight_BT) in enumerate(_batches(plan, seed, tokenizer), start=1):
        loss = _loss(model, tokens_BT, weight_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        if step % 100 == 0 or step == plan.steps:
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


def _optimizers(model: LlamaForCausalLM, plan: Plan) -> tuple[torch.optim.Optimizer, ...]:
    """Muon (Jordan et al., 2024) for the layers' matrices, AdamW for the rest: half the steps of AdamW alone here."""
    matrices = [weight for layer in model.model.layers for weight in layer.parameters() if weight.ndim == 2]
    chosen = set(matrices)
    others = [weight for weight in model.parameters() if weight not in chosen]
    return (
        torch.optim.Muon(matrices, lr=plan.matrix_rate, weight_decay=0.01, ns_steps=4),
        torch.optim.AdamW(others, lr=plan.vector_rate, betas=(0.9, 0.98), weight_decay=0.01),
    )


def _rate(step: int, plan: Plan) -> float:
    """Linear warm-up, a plateau, then from three tenths on a linear decay to a twentieth."""
    left = 1.4 * (plan.steps - step) / plan.steps
    return max(0.05, min(1.0, (step + 1) / plan.warmup, left))


def _loss(model: LlamaForCausalLM, tokens_BT: Tensor, weight_BT: Tensor) -> Tensor:
    """Weighted mean next-token loss; padding comes last, so causal attention needs no mask."""
    logits_BTV = model(input_ids=tokens_BT, use_cache=False).logits
    loss_BT = cross_entropy(logits_BTV[:, :-1].mT, tokens_BT[:, 1:], reduction="none")
    return (loss_BT * weight_BT[:, 1:]).sum() / weight_BT[:, 1:].sum()


def _batches(plan: Plan, seed: int, tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[Tensor, Tensor]]:
    """`plan.steps` batches of documents of like lengths: tokens, and what each counts (0 for the padding)."""
    rng = random.Random(f"{seed}/reading")
    reading = documents(rng)
    left = plan.steps
    while left > 0:
        window = [_tokens(document, tokenizer) for document in itertools.islice(reading, plan.batch * 20)]
        window.sort(key=lambda asked_said: sum(map(len, asked_said)))
        batches = [window[start : start + plan.batch] for start in range(0, len(window), plan.batch)]
        rng.shuffle(batches)
        yield from (_padded(batch, plan.question_weight) for batch in batches[:left])
        left -= len(batches)


def _tokens(document: Document, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """The tokens of what is asked and of what is said."""
    asked, said = tokenizer(list(_as_read(document)))["input_ids"]
    return asked, said


def _padded(batch: Sequence[tuple[list[int], list[int]]], question_weight: float) -> tuple[Tensor, Tensor]:
    tokens = [torch.tensor(asked + said) for asked, said in batch]
    weights = [torch.tensor([question_weight] * len(asked) + [1.0] * len(said)) for asked, said in batch]
    return pad_sequence(tokens, batch_first=True), pad_sequence(weights, batch_first=True)


def _as_read(document: Document) -> tuple[str, str]:
    """What is asked and what is said as the model reads it: ChatML for a chat, and the end marked either way."""
    if not document.chat:
        return document.asked, document.said + END
    return f"{START}user\n{document.asked}{END}\n{START}assistant\n", f"{document.said}{END}\n"


def _origin(plan: Plan, seed: int) -> str:
    """What a base was made from, as JSON: plan, seed, and a digest of the first of its text."""
    sample = itertools.islice(documents(random.Random(f"{seed}/reading")), 500)
    text = hashlib.sha256("\0".join(itertools.chain.from_iterable(map(_as_read, sample))).encode()).hexdigest()
    template = hashlib.sha256(CHAT_TEMPLATE.encode()).hexdigest()
    return json.dumps({"plan": asdict(plan), "seed": seed, "text": text, "template": template}, indent=2) + "\n"


def _is_made_from(folder: Path, origin: str) -> bool:
    try:
        return (folder / MADE).read_text(encoding="utf-8") == origin
    except (FileNotFoundError, NotADirectoryError):
        return False


def _check_is_free(folder: Path) -> None:
    """Only what was made here gives way: `lora demo --home .` may find `./base`, which cannot be made again."""
    if (folder / MADE).is_file() or not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    raise Unready(f"{folder} is there, and was not made by the demo", "name another folder with --home")


def _move_in(made: Path, folder: Path, origin: str) -> None:
    """Put a finished base in its place; one of another plan gives way, an equal one that came first stays."""
    if _is_made_from(folder, origin):
        return
    if folder.exists():
        shutil.rmtree(folder)
    made.rename(folder)
