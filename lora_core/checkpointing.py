"""Activation checkpointing by decoder layer: a layer keeps its input alone and is computed again in the backward pass.

transformers' own switch works in training mode only, and a base is in evaluation mode for good.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_core.base_model import BaseModel


def decoder_layers(base: BaseModel) -> list[nn.Module]:
    """The layers that can be computed again; empty for an architecture that marks none."""
    return [module for module in base.model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextmanager
def checkpointed(base: BaseModel, on: bool = True) -> Iterator[None]:
    """While inside, layers forget their activations, and training gives the same bytes with less memory.

    No generator's state is kept: dropout masks are a function of the lesson's key, so they come out the same again.
    """
    layers = decoder_layers(base) if on else []
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own is under it
