"""How the base's decoder layers run while a cohort trains: forgetting their activations, or compiled.

Neither changes the base: both stand in front of the layers' own forward pass, one on top of the other.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_core.base_model import BaseModel
from lora_core.errors import TrainingError

KINDS = 24  # of layers to compile: of four sorts, say, to learn from with dropout or without, and to examine

ONE_SHAPE = "one_shape"  # an attribute of a model whose layers are compiled for batches of one shape

Forward = Callable[..., Any]  # a layer's own: what it takes and gives is the architecture's affair


def decoder_layers(base: BaseModel) -> list[nn.Module]:
    """The layers of text that transformers marks as such; empty for an architecture that marks none."""
    marked = {path: module for path, module in base.model.named_modules()
              if isinstance(module, GradientCheckpointingLayer)}  # fmt: skip
    return [layer for path, layer in marked.items() if any(site.name.startswith(f"{path}.") for site in base.sites)]


@contextmanager
def wrapped(layers: Sequence[nn.Module], wrap: Callable[[Forward], Forward]) -> Iterator[None]:
    """While inside, layers run what `wrap` makes of their forward pass; their attributes can still be read."""
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        vars(layer)["forward"] = wrap(layer.forward)  # shadows the class's
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            del vars(layer)["forward"]
            if own is not None:
                vars(layer)["forward"] = own


@contextmanager
def checkpointed(base: BaseModel, on: bool = True) -> Iterator[None]:
    """While inside, a layer keeps its input alone and is computed again in the backward pass: less memory, same bytes.

    transformers' own switch works in training mode only, and a base is in evaluation mode for good.  No generator's
    state is kept: dropout masks are a function of the lesson's key, so they come out the same again.
    """
    again = lambda forward: partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)  # noqa: E731  short
    with wrapped(decoder_layers(base) if on else [], again):
        yield


@contextmanager
def compiled(base: BaseModel, on: bool = True) -> Iterator[None]:
    """While inside, every layer runs as one graph that torch compiles at its first use; the layers share what they can.

    Rounding differs from the uncompiled base's, so the plan that a manifest records says so; from one compiled run to
    the next the bytes are the same.  Raises TrainingError for a base, or a machine, that cannot.
    """
    if not on:
        yield
        return
    if base.quantised or not decoder_layers(base):
        why = "quantised layers" if base.quantised else "an architecture that marks no layers"
        raise TrainingError(base.name, f"{why} cannot be compiled", "unset LORA_COMPILE")
    compile_whole = partial(torch.compile, dynamic=False, fullgraph=True)
    torch.compiler.reset()  # forget cohorts from before: there is a limit to how often one layer may be compiled
    limit = torch._dynamo.config.patch(recompile_limit=KINDS)
    vars(base.model)[ONE_SHAPE] = True
    try:
        with warnings.catch_warnings(), limit, wrapped(decoder_layers(base), compile_whole):
            warnings.filterwarnings("ignore", "grad and param do not obey")  # views of a matrix cannot
            yield
    except (TorchDynamoException, FailOnRecompileLimitHit) as error:
        why = f"its layers cannot be compiled: {str(error).strip().splitlines()[0][:200]}"
        raise TrainingError(base.name, why, "unset LORA_COMPILE; compiling on a CPU needs a C++ compiler") from None
    finally:
        del vars(base.model)[ONE_SHAPE]
