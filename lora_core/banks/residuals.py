"""Where a base's layers add to what flows through them: found by trying, not by a table of architectures."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lora_core.base_model import BaseModel
from lora_core.errors import TrainingError
from lora_core.layers import decoder_layers

ADDS = ("add", "add_", "__add__", "__radd__", "__iadd__")
CARRIES = ("to", "mul", "__mul__", "__rmul__", "dropout", "contiguous")  # what passes on a tensor, at most scaled


@dataclass(frozen=True)
class Place:
    """A module whose output is added to the residual stream: its path in the model, and how wide that is."""

    name: str
    width: int
    block: str  # attention or mlp: which of the layer's two blocks it ends

    @property
    def layer(self) -> int:
        """The number of its layer."""
        return next(int(part) for part in self.name.split(".") if part.isdigit())


class ResidualStream(TorchFunctionMode):
    """Follows the hidden states through layers while they run, and notes whose outputs are added to them.

    Tensors are known by identity; they are kept, lest a later one has the address of an earlier one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ran: dict[str, None] = {}  # modules' paths, in order
        self.added: dict[str, int] = {}  # those whose output was added, and how wide it is
        self._stream: dict[int, Tensor] = {}
        self._outputs: dict[int, tuple[Tensor, tuple[str, ...]]] = {}  # and whose they are, or whose sum

    def enter_layer(self, _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """A layer is about to run: what enters it is the stream."""
        hidden = inputs[0] if inputs else named["hidden_states"]
        self._stream[id(hidden)] = hidden

    def leave(self, path: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        """What to do when a module inside a layer has run: its output is its own, also where a part of it made it."""

        def note(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:  # hooks get whatever a module takes
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor) and id(first) not in self._stream and all(first is not x for x in inputs):
                self._outputs[id(first)] = (first, (path,))
                self.ran[path] = None

        return note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # torch's protocol
        """Run a function; follow sums."""
        result = func(*args, **(kwargs or {}))
        operands = [one for one in args[:2] if isinstance(one, Tensor)]
        if func.__name__ in ADDS and len(operands) == 2:
            self._sum(operands, result)
        elif func.__name__ in CARRIES and len(operands) == 1:
            self._sum(operands, result, adds=False)
        return result

    def _sum(self, operands: Sequence[Tensor], result: Tensor, adds: bool = True) -> None:
        owners = [path for one in operands for path in self._outputs.get(id(one), (one, ()))[1]]
        if any(id(one) in self._stream for one in operands):
            self._stream[id(result)] = result
            self.added |= {path: result.shape[-1] for path in owners if adds}
        elif owners:
            self._outputs[id(result)] = (result, tuple(owners))


def residual_places(base: BaseModel) -> list[Place]:
    """Of each layer, the two modules whose outputs are added to the residual stream: the attention's and the MLP's.

    These are the blocks themselves in most architectures, the norms behind them in others.  Raises TrainingError for
    a base whose layers do not add twice.
    """
    paths = {module: path for path, module in base.model.named_modules()}
    layers = {paths[layer]: layer for layer in decoder_layers(base)}
    if not layers:
        raise _unfit(base, "transformers marks none of its layers")
    stream = ResidualStream()
    with torch.inference_mode(), _watched(layers, stream), stream:
        base.model.base_model(input_ids=torch.zeros(1, 2, dtype=torch.int64).to(base.model.device), use_cache=False)
    return [place for layer in layers for place in _two_of(base, layer, stream)]


def _two_of(base: BaseModel, layer: str, stream: ResidualStream) -> list[Place]:
    found = [path for path in stream.ran if path in stream.added and path.startswith(f"{layer}.")]
    outer = [path for path in found if not any(path.startswith(f"{other}.") for other in found)]
    if len(outer) != 2:
        raise _unfit(base, f"{layer} adds {len(outer)} modules to its residual stream, not two")
    return [Place(path, stream.added[path], block) for path, block in zip(outer, ("attention", "mlp"), strict=True)]


def _unfit(base: BaseModel, why: str) -> TrainingError:
    return TrainingError(base.name, f"{why}, so adapter layers have no place in it", "train with method=lora")


@contextmanager
def _watched(layers: dict[str, nn.Module], stream: ResidualStream) -> Iterator[None]:
    hooks = [layer.register_forward_pre_hook(stream.enter_layer, with_kwargs=True) for layer in layers.values()]
    for path, layer in layers.items():
        inner = [(f"{path}.{name}", module) for name, module in layer.named_modules() if name]
        hooks += [module.register_forward_hook(stream.leave(name)) for name, module in inner]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
