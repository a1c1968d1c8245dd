"""One cohort at work: each claimed job as a candidate on its way from raw examples to files ready to publish.

Pure of databases and stores: `cohort.py` brings snapshots and earlier versions in and carries files out.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from lora_core.banks.lora import LoraBank, lora_bank
from lora_core.base_model import BaseModel
from lora_core.curriculum import Learner, Trained, newest
from lora_core.data.examples import Example, Preference
from lora_core.data.rendering import AnyRendered, render, render_prompt
from lora_core.data.snapshot import Snapshot
from lora_core.data.splits import split
from lora_core.errors import TemplateRefused, TrainingError
from lora_core.evaluate import Scores, Trial, evaluate
from lora_core.gate import Verdict, judge
from lora_core.generate import TaskScore, generate, task_score
from lora_core.intake import LoraFiles
from lora_core.lower_layers import LowerLayers
from lora_core.objectives import ObjectiveSpec
from lora_core.pair_scores import as_judged
from lora_core.planner import Plan, plan, train_planned
from lora_core.recipe import Recipe
from lora_core.row_store import RowStore
from lora_core.saves import Saves
from lora_core.train import Pace

ANSWERS_JUDGED = 8  # held-out prompts a user that are answered and compared: generation is the slow part
ANSWER_TOKENS = 48

Shown = TypeVar("Shown")


@dataclass
class Candidate:
    """One user's adapter in the making.  Fields fill up as it passes through the steps."""

    label: str  # tenant/user/adapter, for people
    recipe: Recipe
    learner: Learner
    held_out: tuple[Example, ...]
    cut: int  # examples that were longer than max_length
    dropped: int  # examples that had nothing to learn in that length, or that the base's template refuses
    live: LoraFiles | None = None  # the version that `latest` points to now
    live_number: int | None = None
    trained: Trained | None = None
    plan: Plan | None = None  # by which it was trained
    scores: dict[str, Scores] = field(default_factory=dict)  # base, previous, candidate
    tasks: dict[str, TaskScore] = field(default_factory=dict)  # base, candidate
    verdict: Verdict | None = None


def make_candidate(label: str, recipe: Recipe, snapshot: Snapshot, base: BaseModel) -> Candidate:
    """Split and render one user's examples.  Raises TrainingError where nothing is left to learn from."""
    _check_kind(label, snapshot.examples, recipe.objective)
    halves = split(snapshot.examples, recipe.holdout.share, recipe.holdout.by, recipe.holdout.minimum)
    learned = _rendered(halves.train, base, recipe)
    judged = _rendered(halves.held_out, base, recipe)
    if not learned or not judged:
        raise TrainingError(
            label, f"{len(learned)} examples to learn from and {len(judged)} to judge by", "add examples"
        )
    cut = sum(rendered.truncated for rendered in (*learned, *judged))
    dropped = len(snapshot.examples) - len(learned) - len(judged)
    learner = Learner(label, recipe, newest(learned, recipe.max_tokens), judged)
    return Candidate(label, recipe, learner, halves.held_out, cut, dropped)


def _check_kind(label: str, examples: Sequence[Example], objective: ObjectiveSpec) -> None:
    """Refuse pairs where answers are learnt, and answers where pairs are: neither says what the other asks."""
    pairs = sum(isinstance(example, Preference) for example in examples)
    if pairs and not objective.paired:
        why = f"{pairs} of {len(examples)} examples are preference pairs, which objective {objective.name} cannot learn"
        raise TrainingError(label, why, "set objective=dpo, or keep pairs in a dataset of their own")
    if objective.paired and pairs < len(examples):
        why = f"{len(examples) - pairs} of {len(examples)} examples have no chosen and rejected answer"
        raise TrainingError(
            label, f"{why}, which objective {objective.name} learns from", "add them, or set objective=sft"
        )


def train_candidates(
    base: BaseModel,
    candidates: Sequence[Candidate],
    planned: Plan,
    watch: Callable[[Pace], None] | None = None,
    saves: Saves | None = None,
    states: RowStore | None = None,
) -> Plan:
    """Train a cohort packed, and tell by which plan it ended: a smaller one where memory ran out.

    Its recipes share base, row length and bank, so neighbours change nobody's bytes.
    """
    by_label = {candidate.label: candidate for candidate in candidates}
    bank = training_bank(base, candidates)
    learners = [candidate.learner for candidate in candidates]
    compute = LowerLayers(base, bank, states).read_rows if states else None
    for trained, used in train_planned(base, learners, planned, bank, watch, compute, saves):
        by_label[trained.name].trained, by_label[trained.name].plan = trained, used
        planned = used
    return planned


def plan_training(base: BaseModel, candidates: Sequence[Candidate], budget_bytes: int, most_slots: int) -> Plan:
    """As many slots as fit into memory.  Rows are shortened at need if no recipe counts its batch in rows."""
    row_tokens = candidates[0].recipe.row_tokens
    recipes = [candidate.recipe for candidate in candidates]
    examples = [one for c in candidates for one in (*c.learner.train, *c.learner.held_out)]
    fixed = any(recipe.batch_rows for recipe in recipes)
    shortest_row = None if fixed else max(len(rendered.tokens) for rendered in examples)
    drops = any(recipe.method.dropout for recipe in recipes)
    return plan(base, training_bank(base, candidates), budget_bytes, row_tokens, most_slots, drops, shortest_row)


def training_bank(base: BaseModel, candidates: Iterable[Candidate]) -> LoraBank:
    """The bank that holds every user of the cohort."""
    return lora_bank(base, [candidate.recipe.method for candidate in candidates])


def judge_candidates(base: BaseModel, candidates: Sequence[Candidate], slots: int, row_tokens: int) -> None:
    """Score base, live version and candidate on each user's held-out examples, packed together, and pass the gate."""
    bank = _judging_bank(base, candidates)
    named = [
        (candidate, name, trial)
        for candidate, row_P in zip(candidates, _rows(base, bank, candidates), strict=True)
        for name, trial in _rivals(candidate, row_P, bank).items()
    ]
    scored = evaluate(base, bank, [trial for *_, trial in named], slots, row_tokens)
    for (candidate, name, _), scores in zip(named, scored, strict=True):
        candidate.scores[name] = scores
    for candidate in candidates:
        found = as_judged(list(candidate.scores.values()), candidate.recipe.objective)
        candidate.scores = dict(zip(candidate.scores, found, strict=True))
        candidate.verdict = _verdict(candidate)
    _score_answers(base, bank, [(c, name, trial) for c, name, trial in named if name != "previous"], slots)


def _judging_bank(base: BaseModel, candidates: Sequence[Candidate]) -> LoraBank:
    """A bank wide enough for the live versions too, whatever their recipes were."""
    ranks = [candidate.recipe.method.rank for candidate in candidates]
    return LoraBank(base.sites, max(ranks + [candidate.live.rank for candidate in candidates if candidate.live]))


def _rows(base: BaseModel, bank: LoraBank, candidates: Sequence[Candidate]) -> list[Tensor]:
    """Each candidate's trained row, in another bank's layout."""
    trained_in = training_bank(base, candidates)
    found = []
    for candidate in candidates:
        assert candidate.trained  # judged only after it was trained
        found.append(bank.from_tensors(trained_in.to_tensors(candidate.trained.row_P, candidate.recipe.method)))
    return found


def _rendered(examples: Iterable[Example], base: BaseModel, recipe: Recipe) -> tuple[AnyRendered, ...]:
    longest = min(recipe.max_length, base.longest)
    found: list[AnyRendered] = []
    for example in examples:
        with suppress(TemplateRefused):  # that one teaches nothing
            rendered = render(example, base.tokenizer, longest)
            found += [rendered] if rendered else []
    return tuple(found)


def _rivals(candidate: Candidate, row_P: Tensor, bank: LoraBank) -> Mapping[str, Trial]:
    held_out, live = candidate.learner.held_out, candidate.live
    rivals = {"base": Trial(None, 0.0, held_out)}
    if live:
        rivals["previous"] = Trial(bank.from_tensors(live.tensors), live.scale, held_out)
    return {**rivals, "candidate": Trial(row_P, candidate.recipe.method.scale, held_out)}


def _verdict(candidate: Candidate) -> Verdict:
    rival, name = candidate.scores["base"], "the base"
    if "previous" in candidate.scores and candidate.scores["previous"].loss < rival.loss:
        rival, name = candidate.scores["previous"], f"version {candidate.live_number}"
    return judge(candidate.scores["candidate"], rival, name, candidate.recipe.gate)


def _score_answers(base: BaseModel, bank: LoraBank, named: Sequence[tuple[Candidate, str, Trial]], slots: int) -> None:
    """Answer some held-out prompts as the base and as the candidate, and compare with what the user wrote."""
    asked = [
        (candidate, name, trial, prompt) for candidate, name, trial in named for prompt in _prompts(candidate, base)
    ]
    answers = generate(base, bank, [(trial, tokens) for _, _, trial, (tokens, _) in asked], slots, ANSWER_TOKENS)
    collected: dict[tuple[str, str], list[tuple[str, str]]] = {}
    owners = {candidate.label: candidate for candidate, *_ in asked}
    for (candidate, name, _, (_, reference)), answer in zip(asked, answers, strict=True):
        collected.setdefault((candidate.label, name), []).append((answer, reference))
    for (label, name), pairs in collected.items():
        owners[label].tasks[name] = task_score([a for a, _ in pairs], [r for _, r in pairs])


def _prompts(candidate: Candidate, base: BaseModel) -> list[tuple[list[int], str]]:
    limit = min(candidate.recipe.max_length, base.longest - ANSWER_TOKENS)
    prompts = (_shown(render_prompt, example, base.tokenizer) for example in candidate.held_out)
    return list(islice((prompt for prompt in prompts if prompt and len(prompt[0]) <= limit), ANSWERS_JUDGED))


def _shown(way: Callable[..., Shown | None], *arguments: Any) -> Shown | None:  # whatever the way takes
    """An example as the base reads it; None where its template refuses it: that one teaches and tells nothing."""
    try:
        return way(*arguments)
    except TemplateRefused:
        return None


def finite(row_P: Tensor) -> bool:
    """Whether a row may be published at all."""
    return bool(torch.isfinite(row_P).all())
