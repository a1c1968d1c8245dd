"""Every method and full fine-tuning on one user's data: quality, size, memory and time, side by side.

Each method tries a few rates around the recipe's, packed as slots of one cohort, and is judged by the best of them: a
rate that suits one method ruins another.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from lora_core.artifact import safetensors_bytes
from lora_core.banks.table import make_bank
from lora_core.base_model import BaseModel
from lora_core.errors import TrainingError
from lora_core.evaluate import Asked, Scores, evaluate_all
from lora_core.full_tuning import predict_full, tune_fully
from lora_core.learner import Learner, Trained
from lora_core.memory import predict
from lora_core.methods import AnyMethod, BottleneckSpec, LoraSpec, PrefixSpec, PromptSpec
from lora_core.recipe import Recipe
from lora_core.train import train

CONTENDERS: Mapping[str, AnyMethod] = {
    "LoRA, rank 8": LoraSpec(rank=8, alpha=16),
    "LoRA, rank 1": LoraSpec(rank=1, alpha=2),
    "adapter layers, Houlsby": BottleneckSpec(width=16, placement="houlsby"),
    "adapter layers, Pfeiffer": BottleneckSpec(width=16, placement="pfeiffer"),
    "prefix tuning, 8 tokens": PrefixSpec(virtual_tokens=8),
    "prompt tuning, 16 tokens": PromptSpec(virtual_tokens=16),
}
FULL = "full fine-tuning"
# Rates that are tried, as multiples of the recipe's, which is meant for LoRA.  Virtual tokens want larger ones (Lester
# et al., 2021), all weights at once smaller ones (Schulman et al., 2025: a tenth).
USUAL = (1 / 3, 1.0, 3.0)
FACTORS: Mapping[str, tuple[float, ...]] = {
    "prompt_tuning": (3.0, 10.0, 30.0),
    "prefix_tuning": (1.0, 3.0, 10.0),
    FULL: (0.03, 0.1, 0.3),
}


@dataclass(frozen=True)
class Compared:
    """What one method came to.  `fit`: how many of its files fit in the space of one full model's."""

    method: str
    rate: float  # the best of those that were tried
    loss: float  # mean held-out loss a token, in nats
    accuracy: float | None  # share of held-out tokens that were the first guess; not taken for full fine-tuning
    parameters: int
    share: float  # of the base's
    peak_bytes: int  # to train one user, predicted from shapes
    seconds: float  # of training, a rate
    file_bytes: int
    fit: int


def compare(
    base: BaseModel, learner: Learner, say: Callable[[str], None], missed: Callable[[str, TrainingError], None]
) -> Iterator[Compared]:
    """Every contender in turn, full fine-tuning last; `say` is told whose turn it is, `missed` who cannot be trained.

    Raises TrainingError, the first one's, where nobody could be trained.
    """
    _check(learner)
    ways = {name: partial(_adapter, base, learner, name, spec) for name, spec in CONTENDERS.items()}
    ways[FULL] = partial(_full, base, learner)
    troubles: list[TrainingError] = []
    for name, way in ways.items():
        say(name)
        try:
            yield way()
        except TrainingError as error:  # a base without a method's places, say: the others go on
            missed(name, error)
            troubles.append(error)
    if len(troubles) == len(ways):
        raise troubles[0]


def _check(learner: Learner) -> None:
    """Before minutes go into what could not be judged."""
    if not learner.held_out:
        raise TrainingError(learner.name, "has no held-out examples to compare on", "add examples")
    if learner.recipe.patience is None:
        raise TrainingError(learner.name, "is never examined, as patience is null", "set patience")
    if learner.recipe.objective.paired:
        raise TrainingError(learner.name, "learns from pairs, and only answers can be compared", "set objective=sft")


def bare(base: BaseModel, learner: Learner) -> Scores:
    """The base itself on the same examples."""
    recipe = learner.recipe
    return evaluate_all(base, [Asked(recipe.method, None, learner.held_out)], 1, recipe.row_tokens)[0]


def full_bytes(base: BaseModel) -> int:
    """What one full model takes on disk, in the precision it is kept in here."""
    size: int = base.model.dtype.itemsize
    return base.parameters * size


def rates(name: str, recipe: Recipe) -> list[float]:
    """What a method tries."""
    return [recipe.learning_rate * factor for factor in FACTORS.get(name, USUAL)]


def _adapter(base: BaseModel, learner: Learner, name: str, spec: AnyMethod) -> Compared:
    recipes = [
        learner.recipe.model_copy(update={"method": spec, "learning_rate": rate})
        for rate in rates(spec.name, learner.recipe)
    ]
    trials = [replace(learner, name=f"{name} {recipe.learning_rate:g}", recipe=recipe) for recipe in recipes]
    row_tokens = learner.recipe.row_tokens
    bank = make_bank(base, [spec])
    start = time.perf_counter()
    found = {one.name: one for one in train(base, trials, len(trials), row_tokens, bank)}
    seconds = (time.perf_counter() - start) / len(trials)
    best = min(trials, key=lambda trial: _held_out_loss(found[trial.name]))
    if not math.isfinite(_held_out_loss(found[best.name])):
        raise TrainingError(name, found[best.name].reason or "learnt nothing at any rate", "lower learning_rate")
    tensors = bank.to_tensors(found[best.name].row_P, spec)
    scores = evaluate_all(base, [Asked(spec, tensors, learner.held_out)], 1, row_tokens)[0]
    parameters, size = bank.parameters(spec), len(safetensors_bytes(tensors))
    return Compared(
        name, best.recipe.learning_rate, scores.loss, scores.accuracy, parameters, parameters / base.parameters,
        predict(base, bank, 1, row_tokens, spec.dropout > 0), seconds, size, full_bytes(base) // size,
    )  # fmt: skip


def _full(base: BaseModel, learner: Learner) -> Compared:
    tried = [
        replace(learner, recipe=learner.recipe.model_copy(update={"learning_rate": rate}))
        for rate in rates(FULL, learner.recipe)
    ]
    start = time.perf_counter()
    found = [tune_fully(base, one, learner.recipe.row_tokens) for one in tried]
    seconds = (time.perf_counter() - start) / len(tried)
    losses = [math.inf if one.held_out_loss is None else one.held_out_loss for one in found]
    loss, result, one = min(zip(losses, found, tried, strict=True), key=lambda item: item[0])
    if not math.isfinite(loss):
        raise TrainingError(FULL, result.reason or "learnt nothing at any rate", "lower learning_rate")
    size = full_bytes(base)
    return Compared(
        FULL, one.recipe.learning_rate, loss, None, result.parameters, result.parameters / base.parameters,
        predict_full(base, learner.recipe.row_tokens), seconds, size, 1,
    )  # fmt: skip


def _held_out_loss(trained: Trained) -> float:
    return min((loss for _, loss in trained.held_out), default=math.inf)


def advice(results: Sequence[Compared], base_loss: float) -> list[str]:
    """When to use which, drawn from what was measured here alone."""
    full = next((one for one in results if one.method == FULL), None)
    adapters = [one for one in results if one.method != FULL and one.loss < base_loss]
    if not adapters:
        return ["No adapter learnt anything from this data: add examples, or try other rates."]
    best = min(adapters, key=lambda one: one.loss)
    near = [one for one in adapters if base_loss - one.loss >= 0.95 * (base_loss - best.loss)]
    small, light, quick = (
        min(near, key=key) for key in (lambda o: o.file_bytes, lambda o: o.peak_bytes, lambda o: o.seconds)
    )
    lines = [
        f"Quality first: {best.method}, {base_loss - best.loss:.3f} nats a token better than the base.",
        f"Space first: {small.method}, the smallest file within 5 % of that gain; {small.fit:,} fit in one full model.",
        f"Memory first: {light.method}; time first: {quick.method}.",
    ]
    if full and full.loss < base_loss:
        reached = (base_loss - best.loss) / (base_loss - full.loss)
        lines.append(
            f"Full fine-tuning: the best adapter reaches {reached:.0%} of its gain with {best.share:.2%} of the numbers"
            f" and {best.peak_bytes / full.peak_bytes:.0%} of the memory."
        )
    return lines
