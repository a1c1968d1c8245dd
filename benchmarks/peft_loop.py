"""A whole recipe by plain PEFT: what somebody without the factory would run for each trial of a grid."""

import math
from collections.abc import Sequence
from itertools import islice

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks.sides import stock
from lora_core.base_model import BaseModel
from lora_core.data.packing import epoch_batches
from lora_core.data.rendering import IGNORED, Rendered
from lora_core.learner import Learner
from lora_core.methods import LoraSpec
from lora_core.optim import rate_at

JUDGED = 16  # held-out examples at once


def train_with_peft(base: BaseModel, learner: Learner) -> float:
    """The best held-out loss: batches, schedule, clipping, examinations and early stop as the recipe says."""
    recipe = learner.recipe
    assert isinstance(recipe.method, LoraSpec)  # PEFT's config below is LoRA's
    assert not recipe.objective.paired  # and the loss is of answers: each example is one document
    assert recipe.batch_rows is None  # and nothing is packed
    learned, judged = ([text for one in half for text in one.documents] for half in (learner.train, learner.held_out))
    model = adapted(base, recipe.method)
    parameters = [p for p in model.parameters() if p.requires_grad]
    betas = (recipe.beta1, recipe.beta2)
    optimiser = torch.optim.AdamW(parameters, betas=betas, weight_decay=recipe.weight_decay, fused=True)
    whole = recipe.epochs * math.ceil(len(learned) / recipe.batch_size)
    planned = min(whole, recipe.max_steps or whole)
    losses = [held_out_loss(model, judged)]
    step = 0
    for epoch in range(recipe.epochs):
        batches = epoch_batches(len(learned), recipe.batch_size, recipe.seed, epoch)
        for batch in islice(batches, planned - step):
            step += 1
            ids, labels = _padded([learned[index] for index in batch])
            model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
            optimiser.param_groups[0]["lr"] = rate_at(recipe, step, planned)
            optimiser.step()
            optimiser.zero_grad()
        losses.append(held_out_loss(model, judged))
        if step == planned:
            break
        if recipe.patience and min(losses[: -recipe.patience], default=math.inf) <= min(losses[-recipe.patience :]):
            break
    return min(losses)


@torch.inference_mode()
def held_out_loss(model: nn.Module, examples: Sequence[Rendered]) -> float:
    """Mean loss a token that counts, nothing dropped."""
    droppers = [module for name, module in model.named_modules() if "lora_dropout" in name]
    for module in droppers:
        module.eval()
    total = counted = 0.0
    for start in range(0, len(examples), JUDGED):
        ids, labels = _padded(examples[start : start + JUDGED])
        tokens = int((labels[:, 1:] != IGNORED).sum())
        total += float(model(input_ids=ids, labels=labels, use_cache=False).loss) * tokens
        counted += tokens
    for module in droppers:
        module.train()
    return total / counted


def adapted(base: BaseModel, spec: LoraSpec) -> nn.Module:
    """The base under PEFT as the recipe's method says; the weights are shared, as copying them takes time too."""
    targets = sorted({site.name.rpartition(".")[2] for site in base.sites})
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=int(spec.alpha),
        lora_dropout=spec.dropout,
        target_modules=targets,
        layers_to_transform=None if spec.layers is None else list(spec.layers),
        task_type="CAUSAL_LM",
    )
    model: nn.Module = get_peft_model(stock(base).model, config, autocast_adapter_dtype=False)
    return model


def _padded(examples: Sequence[Rendered]) -> tuple[Tensor, Tensor]:
    """Ids and labels, as long as the longest; what pads comes last, so that causal attention needs no mask."""
    length = max(len(example.tokens) for example in examples)
    ids = [[*one.tokens, *[0] * (length - len(one.tokens))] for one in examples]
    labels = [
        [token if counts else IGNORED for token, counts in zip(one.tokens, one.trained, strict=True)]
        + [IGNORED] * (length - len(one.tokens))
        for one in examples
    ]
    return torch.tensor(ids), torch.tensor(labels)
