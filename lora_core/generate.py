"""Text from many adapters in one batch, and how close it comes to what the user would have written."""

from collections.abc import Sequence
from dataclasses import dataclass

from sacrebleu.metrics import CHRF

from lora_core.banks.bank import Bank
from lora_core.base_model import BaseModel
from lora_core.decoding import GREEDY, Sampling
from lora_core.evaluate import Trial
from lora_core.serving import Adapter, Request, Server


@dataclass(frozen=True)
class TaskScore:
    """Generated answers against references: share that match exactly, and chrF from 0 to 100 (Popovic, 2015)."""

    exact: float
    chrf: float


def generate(
    base: BaseModel,
    bank: Bank,
    requests: Sequence[tuple[Trial, Sequence[int]]],
    slots: int,
    max_new_tokens: int = 64,
    sampling: Sampling = GREEDY,
) -> list[str]:
    """One answer a request (an adapter and a prompt's tokens), `slots` at a time, in the order given.

    An answer is the one that its request alone would get.  Raises PromptRefused.
    """
    trials = {str(id(trial)): trial for trial, _ in requests}

    def load(name: str) -> Adapter:
        row_P = trials[name].row_P
        assert row_P is not None  # that is the base, which nobody loads
        return Adapter(row_P, trials[name].scale)

    names = [None if trial.row_P is None else str(id(trial)) for trial, _ in requests]
    asked = [Request(name, prompt, max_new_tokens, sampling) for name, (_, prompt) in zip(names, requests, strict=True)]
    answers = Server(base, bank, slots, load).answer(asked)
    return [str(text) for text in base.tokenizer.batch_decode(answers, skip_special_tokens=True)]


def task_score(answers: Sequence[str], references: Sequence[str]) -> TaskScore:
    """How close answers come to references; surrounding blanks do not count."""
    pairs = [(a.strip(), r.strip()) for a, r in zip(answers, references, strict=True)]
    if not pairs:
        return TaskScore(0.0, 0.0)
    chrf = CHRF().corpus_score([answer for answer, _ in pairs], [[reference for _, reference in pairs]]).score
    return TaskScore(sum(answer == reference for answer, reference in pairs) / len(pairs), chrf)
