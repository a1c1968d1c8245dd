"""Full fine-tuning of one user: the yardstick that adapters are compared with.  All weights train, nothing is packed.

It reads the lessons that the packed loop would give the user (examples, batches, schedule, examinations, early stop),
so what it scores can be compared.  A recipe's rate is meant for adapters: a tenth of it is usual here.  T tokens a row.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_core.base_model import BaseModel
from lora_core.curriculum import Student
from lora_core.data.packing import empty_row
from lora_core.errors import TrainingError
from lora_core.forward import token_losses
from lora_core.layers import checkpointed
from lora_core.learner import Assignment, Heard, Learner, Lesson, Trained
from lora_core.memory import LiveBytes, workspace_bytes
from lora_core.optim import RowStep
from lora_core.recipe import Recipe


@dataclass(frozen=True)
class FullyTuned:
    """What became of a learner with every weight its own.  The weights themselves are not kept."""

    outcome: str
    reason: str
    steps: int
    losses: tuple[tuple[int, float], ...]  # step, mean training loss of its batch
    held_out: tuple[tuple[int, float], ...]  # step, mean held-out loss
    parameters: int  # trained, each tied one once

    @property
    def held_out_loss(self) -> float | None:
        """The best examination's; None where nobody examined."""
        return min((loss for _, loss in self.held_out), default=None)


def tune_fully(base: BaseModel, learner: Learner, row_tokens: int, layers_forget: bool = False) -> FullyTuned:
    """Train every weight of a copy of the base, one row of T tokens at a time; the base stays as it is.

    Raises TrainingError for a quantised base, and for pairs: their reference would be a second copy.
    """
    if learner.recipe.objective.paired:
        why = f"objective {learner.recipe.objective.name} is not fully tuned here"
        raise TrainingError(learner.name, why, "compare adapters, or set objective=sft")
    twin = trainable(base)
    with checkpointed(twin, layers_forget):
        result = _study(twin, Student(learner, row_tokens, lambda: torch.zeros(0)))  # its row is nobody's
    parameters = int(twin.model.num_parameters())
    losses, held_out = tuple(result.losses), tuple(result.held_out)
    return FullyTuned(result.outcome, result.reason, result.steps, losses, held_out, parameters)


def predict_full(base: BaseModel, row_tokens: int, layers_forget: bool = False) -> int:
    """Peak bytes of it on the base's device, whatever else is there: the very step, run on tensors without data.

    Raises TrainingError for a quantised base.
    """
    device = base.model.device
    live = LiveBytes(device)
    with FakeTensorMode(allow_non_fake_inputs=True):
        twin = trainable(base)
        live.meet([*twin.model.parameters(), *twin.model.buffers()])
        with live, checkpointed(twin, layers_forget):
            optimiser = adamw(twin)
            lesson = Lesson(empty_row(row_tokens), weight=1.0, dropout=0.0, key=0)
            for _ in range(2):  # the second time beside the gradients and moments of the first
                backward(twin, lesson)
                step_all(optimiser, RowStep(1, 0.0, Recipe()))
    return live.peak + workspace_bytes(device, base.model.dtype)


def trainable(base: BaseModel) -> BaseModel:
    """A copy of a base whose weights all train, in fp32: small steps are lost in bf16.  Raises TrainingError."""
    if base.quantised:
        why = f"weights in {base.quantised} cannot be trained"
        raise TrainingError(base.name, why, "take the whole base, unset LORA_QUANTISE")
    weights = {id(p): nn.Parameter(p.detach().to(torch.float32, copy=True)) for p in base.model.parameters()}
    shared = {id(buffer): buffer for buffer in base.model.buffers()}
    model = copy.deepcopy(base.model, {**weights, **shared})
    return replace(base, model=model, plain_head=False)  # whose loss takes the head for frozen


def adamw(base: BaseModel) -> torch.optim.AdamW:
    """AdamW over all weights."""
    return torch.optim.AdamW(base.model.parameters(), lr=0.0, fused=True)


def backward(base: BaseModel, lesson: Lesson) -> Tensor:
    """A row's summed loss, still on the device; its gradient is added unless the lesson only measures."""
    with _computed_in(base), torch.set_grad_enabled(bool(lesson.weight)):
        loss_1T, _ = token_losses(base, base.stack([lesson.row]))
        loss = loss_1T.sum()
    if lesson.weight:
        (loss * lesson.weight).backward()
    return loss.detach()


def _study(base: BaseModel, student: Student) -> Trained:
    """Every assignment in turn, until the student has what it came for."""
    optimiser, stream = adamw(base), student.study()
    try:
        assignment = next(stream)
        while True:
            assignment = stream.send(_answer(base, optimiser, assignment))
    except StopIteration as end:
        trained: Trained = end.value
        return trained


def _answer(base: BaseModel, optimiser: torch.optim.AdamW, assignment: Assignment) -> Heard:
    losses = [backward(base, lesson).item() for lesson in assignment.lessons]
    answers = [[loss] for loss in losses]
    if assignment.step is None or not all(map(math.isfinite, losses)):
        return answers, 0.0
    return answers, step_all(optimiser, assignment.step).item()


def step_all(optimiser: torch.optim.AdamW, step: RowStep) -> Tensor:
    """Clip and step by the recipe's settings; the gradient's norm before."""
    recipe, (group,) = step.recipe, optimiser.param_groups
    norm: Tensor = torch.nn.utils.clip_grad_norm_(group["params"], recipe.clip)
    group.update(lr=step.rate, betas=(recipe.beta1, recipe.beta2), eps=recipe.epsilon, weight_decay=recipe.weight_decay)
    optimiser.step()
    optimiser.zero_grad()
    return norm


@contextmanager
def _computed_in(base: BaseModel) -> Iterator[None]:
    """On a GPU products are in bf16, as adapters' are."""
    with torch.autocast("cuda", torch.bfloat16, enabled=base.model.device.type == "cuda"):
        yield
