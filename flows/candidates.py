"""One cohort at work: each claimed job as a candidate on its way from raw examples to files ready to publish.

Pure of databases and stores: `cohort.py` brings snapshots and earlier versions in and carries files out.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from flows.lessons import read_lessons
from lora_core.banks.bank import Bank
from lora_core.banks.table import make_bank
from lora_core.base_model import BaseModel
from lora_core.data.examples import Example, Preference
from lora_core.data.rendering import render_prompt
from lora_core.data.snapshot import Snapshot
from lora_core.errors import TemplateRefused, TrainingError
from lora_core.evaluate import Asked, Scores, Trial, evaluate_all
from lora_core.gate import Verdict, judge
from lora_core.generate import TaskScore, generate, task_score
from lora_core.halving import Halving, Report
from lora_core.intake import AdapterFiles
from lora_core.learner import Learner, Trained
from lora_core.methods import AnyMethod
from lora_core.objectives import ObjectiveSpec
from lora_core.pair_scores import as_judged
from lora_core.planner import Plan, plan
from lora_core.recipe import Recipe

ANSWERS_JUDGED = 8  # held-out prompts a user that are answered and compared: generation is the slow part
ANSWER_TOKENS = 48

Shown = TypeVar("Shown")


@dataclass
class Candidate:
    """One user's adapter in the making.  Fields fill up as it passes through the steps."""

    label: str  # tenant/user/adapter, for people
    recipe: Recipe  # a search's winner's, once it is found
    learner: Learner
    held_out: tuple[Example, ...]
    cut: int  # examples that were longer than max_length
    dropped: int  # examples that teach nothing, as `Lessons` counts them
    live: AdapterFiles | None = None  # the version that `latest` points to now
    live_number: int | None = None
    search: Halving | None = None  # where its recipe asks for one
    trials: list[Report] = field(default_factory=list)  # what became of the search's
    trained: Trained | None = None
    trouble: str = "was not trained"  # why it was not
    plan: Plan | None = None  # by which it was trained
    scores: dict[str, Scores] = field(default_factory=dict)  # base, previous, candidate
    tasks: dict[str, TaskScore] = field(default_factory=dict)  # base, candidate
    verdict: Verdict | None = None

    @property
    def longest(self) -> int:
        """Tokens of its longest example."""
        return max(len(rendered.tokens) for rendered in (*self.learner.train, *self.learner.held_out))

    @property
    def judged_tokens(self) -> int:
        """Tokens of its held-out examples."""
        return sum(len(rendered.tokens) for rendered in self.learner.held_out)

    @property
    def learners(self) -> list[Learner]:
        """Who is trained for it: one, or its search's trials."""
        return list(self.search.trials.values()) if self.search else [self.learner]

    @property
    def names(self) -> set[str]:
        """Under which the device works for it: as itself, and as its trials."""
        return {self.label, *(learner.name for learner in self.learners)}

    @property
    def seats(self) -> int:
        """How many slots it makes good use of: as many as go on to a search's end; before that, trials take turns."""
        return self.search.spec.last if self.search else 1

    @property
    def senseless(self) -> str:
        """Why there is nothing to say about it once it was judged: whose loss is no number.  Empty where it is one."""
        for name, fix in (("base", "look for odd rows in the data"), ("candidate", "lower learning_rate")):
            if name in self.scores and not math.isfinite(loss := self.scores[name].loss):
                return f"the {name}'s loss on held-out examples is not finite ({loss}); {fix}"
        return ""

    def slim(self) -> None:
        """Forget examples and weights: what it came to is safe elsewhere, and many come after it."""
        self.learner, self.held_out, self.live, self.search = _slim(self.learner), (), None, None
        self.trials = [
            replace(one, learner=_slim(one.learner), trained=replace(one.trained, row_P=one.trained.row_P[:0]))
            for one in self.trials
        ]
        if self.trained:
            self.trained = replace(self.trained, row_P=self.trained.row_P[:0])


def _slim(learner: Learner) -> Learner:
    return replace(learner, train=(), held_out=(), start=None, referee=None)


def make_candidate(label: str, recipe: Recipe, snapshot: Snapshot, base: BaseModel) -> Candidate:
    """Split and render one user's examples.

    Raises TrainingError where nothing is left to learn from, or where the base lacks what the recipe adapts: what one
    user asks for in vain is no trouble of a cohort.
    """
    if not recipe.search:  # whose trials are tried below
        make_bank(base, [recipe.method])
    _check_kind(label, snapshot.examples, recipe.objective)
    lessons = read_lessons(label, snapshot.examples, recipe, base)
    learner = Learner(label, recipe, lessons.learned, lessons.judged)
    search = Halving(learner, lambda spec: _file_bytes(base, spec)) if recipe.search else None
    return Candidate(label, recipe, learner, lessons.held_out, lessons.cut, lessons.dropped, search=search)


def _file_bytes(base: BaseModel, spec: AnyMethod) -> int:
    """About how large a file of weights is: cohorts keep them in fp32."""
    return 4 * make_bank(base, [spec]).parameters(spec)


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


def plan_training(base: BaseModel, candidates: Sequence[Candidate], budget_bytes: int, most_slots: int) -> Plan:
    """As many slots as fit into memory.  Rows are shortened at need if no recipe counts its batch in rows."""
    row_tokens = candidates[0].recipe.row_tokens
    recipes = [learner.recipe for candidate in candidates for learner in candidate.learners]
    fixed = any(recipe.batch_rows for recipe in recipes)
    shortest_row = None if fixed else max(candidate.longest for candidate in candidates)
    drops = any(recipe.method.dropout for recipe in recipes)
    return plan(base, training_bank(base, candidates), budget_bytes, row_tokens, most_slots, drops, shortest_row)


def training_bank(base: BaseModel, candidates: Iterable[Candidate]) -> Bank:
    """The bank that holds every user of the cohort, and every trial."""
    return make_bank(base, [learner.recipe.method for candidate in candidates for learner in candidate.learners])


def judge_candidates(base: BaseModel, candidates: Sequence[Candidate], slots: int, row_tokens: int) -> None:
    """Score base, live version and candidate on each user's held-out examples, packed together, and pass the gate."""
    trained_in = training_bank(base, candidates)
    named = [(one, name, asked) for one in candidates for name, asked in _rivals(one, trained_in).items()]
    scored = evaluate_all(base, [asked for *_, asked in named], slots, row_tokens)
    for (candidate, name, _), scores in zip(named, scored, strict=True):
        candidate.scores[name] = scores
    for candidate in candidates:
        found = as_judged(list(candidate.scores.values()), candidate.recipe.objective)
        candidate.scores = dict(zip(candidate.scores, found, strict=True))
        if "previous" in candidate.scores and not math.isfinite(candidate.scores["previous"].loss):
            del candidate.scores["previous"]  # no rival
        candidate.verdict = _verdict(candidate)
    answering = [(one, name, asked.trial(trained_in)) for one, name, asked in named if name != "previous"]
    _score_answers(base, trained_in, answering, slots)


def _rivals(candidate: Candidate, bank: Bank) -> Mapping[str, Asked]:
    """The base, the live version where there is one, and the candidate, on what was held out."""
    assert candidate.trained  # judged only after it was trained
    spec, live, held_out = candidate.recipe.method, candidate.live, candidate.learner.held_out
    tensors = bank.to_tensors(candidate.trained.row_P, spec)
    previous = {"previous": Asked(live.spec, live.tensors, held_out)} if live else {}
    return {"base": Asked(spec, None, held_out), **previous, "candidate": Asked(spec, tensors, held_out)}


def _verdict(candidate: Candidate) -> Verdict:
    rival, name = candidate.scores["base"], "the base"
    if "previous" in candidate.scores and candidate.scores["previous"].loss < rival.loss:
        rival, name = candidate.scores["previous"], f"version {candidate.live_number}"
    return judge(candidate.scores["candidate"], rival, name, candidate.recipe.gate)


def _score_answers(base: BaseModel, bank: Bank, named: Sequence[tuple[Candidate, str, Trial]], slots: int) -> None:
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
    limit = min(candidate.recipe.max_length, base.room(candidate.recipe.method.positions) - ANSWER_TOKENS)
    prompts = (_shown(render_prompt, example, base.tokenizer) for example in candidate.held_out)
    fitting = (prompt for prompt in prompts if prompt and 0 < len(prompt[0]) <= limit and max(prompt[0]) < base.words)
    return list(islice(fitting, ANSWERS_JUDGED))


def _shown(way: Callable[..., Shown | None], *arguments: Any) -> Shown | None:  # whatever the way takes
    """An example as the base reads it; None where its template refuses it: that one teaches and tells nothing."""
    try:
        return way(*arguments)
    except TemplateRefused:
        return None


def finite(row_P: Tensor) -> bool:
    """Whether a row may be published at all."""
    return bool(torch.isfinite(row_P).all())
