"""Text from many adapters in one batch, greedily, and how close it comes to what the user would have written."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sacrebleu.metrics import CHRF

from lora_core.banks.bank import Bank
from lora_core.base_model import BaseModel
from lora_core.cohort import Cohort
from lora_core.evaluate import Trial


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
) -> list[str]:
    """One greedy answer a request (an adapter and a prompt's tokens), `slots` at a time.

    Prompts are padded on the left to the longest of their batch.
    """
    answers: list[str] = []
    for start in range(0, len(requests), slots):
        answers += _generate_batch(base, bank, requests[start : start + slots], max_new_tokens)
    return answers


def task_score(answers: Sequence[str], references: Sequence[str]) -> TaskScore:
    """How close answers come to references; surrounding blanks do not count."""
    pairs = [(a.strip(), r.strip()) for a, r in zip(answers, references, strict=True)]
    if not pairs:
        return TaskScore(0.0, 0.0)
    chrf = CHRF().corpus_score([answer for answer, _ in pairs], [[reference for _, reference in pairs]]).score
    return TaskScore(sum(answer == reference for answer, reference in pairs) / len(pairs), chrf)


def _generate_batch(
    base: BaseModel, bank: Bank, requests: Sequence[tuple[Trial, Sequence[int]]], max_new_tokens: int
) -> list[str]:
    cohort = Cohort(len(requests), bank.width, base.model.device, base.model.dtype)
    for slot, (trial, _) in enumerate(requests):
        if trial.row_P is not None:
            cohort.admit(slot, trial.row_P, trial.scale)
    longest = max(len(prompt) for _, prompt in requests)
    tokens = [[0] * (longest - len(prompt)) + list(prompt) for _, prompt in requests]
    seen = [[0] * (longest - len(prompt)) + [1] * len(prompt) for _, prompt in requests]
    end = base.tokenizer.eos_token_id
    with bank.attached(base, cohort), torch.inference_mode():
        output = base.model.generate(
            input_ids=torch.tensor(tokens, device=base.model.device),
            attention_mask=torch.tensor(seen, device=base.model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end if base.tokenizer.pad_token_id is None else base.tokenizer.pad_token_id,
        )
    return [str(text) for text in base.tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)]
