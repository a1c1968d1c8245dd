"""Functions of each number alone, whose bits do not depend on where among the others a number stands.

torch's CPU kernels compute by vectors, and what is left over at the end of each thread's share by other code, which
rounds some functions otherwise (SiLU, the tanh form of GELU, the sigmoid): a user's bytes would depend on the slot and
on who sits beside it.  Here every number is computed by vectors.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers.activations import ACT2CLS

VECTORS = 64  # numbers that a kernel takes at once, at the most: two AVX-512 registers of bf16
GRAIN = 32768  # numbers: most kernels give no thread less (at::internal::GRAIN_SIZE); GELU's uses all from 20,000 on
ALONE = 16384  # numbers that every kernel computes on one thread


def alike(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """A function of each number, or of each two, of tensors of one shape."""
    shape, numbers = inputs[0].shape, inputs[0].numel()
    if _as_it_is(*inputs):
        return function(*inputs)
    flat = [F.pad(one.flatten(), (0, -numbers % VECTORS)) for one in inputs]
    unit = VECTORS * torch.get_num_threads()
    most = len(flat[0]) // unit * unit
    size = most if most and _fills(most) else ALONE  # all but the end at once, if that comes out even
    found = torch.cat([function(*parts) for parts in zip(*(one.split(size) for one in flat), strict=True)])
    return found[:numbers].view(shape)


def steady(model: nn.Module) -> None:
    """Have every activation of a model that is a module of its own compute each number alike."""
    for module in model.modules():
        if type(module) in STEADY:
            module.__class__ = STEADY[type(module)]


class Steady(nn.Module):
    """An activation, each number alike."""

    def forward(self, x: Tensor) -> Tensor:
        """x's shape."""
        plain = super().forward
        as_it_is = _as_it_is(x)  # and then so is the gradient
        y: Tensor = plain(x) if as_it_is else _Alike.apply(x, plain)  # type: ignore[no-untyped-call]  # torch's
        return y


_KINDS = {nn.GELU, *(kind[0] if isinstance(kind, tuple) else kind for kind in ACT2CLS.values())}
STEADY: dict[type[nn.Module], type[nn.Module]] = {
    kind: type(f"Steady{kind.__name__}", (Steady, kind), {}) for kind in _KINDS
}


# Functions that round otherwise at the end of a share, or whose gradients do; powers where the exponent is not whole.
LOOSE: set[object] = {torch.sigmoid, Tensor.sigmoid, F.silu, F.softplus, F.gelu, F.elu}
POWERS: set[object] = {torch.pow, Tensor.pow, Tensor.__pow__}
_CALLING: dict[type[nn.Module], type[nn.Module]] = {}  # steady kinds of modules that call loose functions


@contextmanager
def tried(model: nn.Module) -> Iterator[None]:
    """While inside, a model runs on something; on a CPU what calls loose functions itself is steady afterwards."""
    callers, on_cpu = _Callers(), all(parameter.device.type == "cpu" for parameter in model.parameters())
    hooks = [module.register_forward_pre_hook(callers.enter) for module in model.modules()]
    hooks += [module.register_forward_hook(callers.leave) for module in model.modules()]
    with callers:
        yield
    for hook in hooks:
        hook.remove()
    for module in callers.found if on_cpu else ():
        kind = type(module)
        if kind not in _CALLING:
            _CALLING[kind] = _steady_kind(kind)
        module.__class__ = _CALLING[kind]


class _Callers(TorchFunctionMode):
    """Notes which modules call loose functions, but for the activations that are steady already."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[nn.Module, None] = {}
        self._inside: list[nn.Module] = []

    def enter(self, module: nn.Module, _: object) -> None:
        self._inside.append(module)

    def leave(self, *_: object) -> None:
        self._inside.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # torch's protocol
        """Run a function; note who called it."""
        if _is_loose(func, args) and self._inside and not isinstance(self._inside[-1], Steady):
            self.found[self._inside[-1]] = None
        return func(*args, **(kwargs or {}))


def _steady_kind(kind: type[nn.Module]) -> type[nn.Module]:
    """A class of modules whose loose functions compute each number alike, and whose parts' do."""

    @wraps(kind.forward)
    def forward(self: nn.Module, *inputs: Any, **named: Any) -> Any:  # whatever the module takes and gives
        if torch.compiler.is_compiling():
            return kind.forward(self, *inputs, **named)
        with _Steadily():
            return kind.forward(self, *inputs, **named)

    return type(f"Steady{kind.__name__}", (kind,), {"forward": forward})


class _Steadily(TorchFunctionMode):
    """While inside, loose functions of one tensor compute each number alike."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # torch's protocol
        """Run a function."""
        kwargs = kwargs or {}
        if not _is_loose(func, args) or kwargs.get("inplace") or _as_it_is(args[0]):
            return func(*args, **kwargs)
        x, *rest = args
        return _Alike.apply(x, lambda x: func(x, *rest, **kwargs))  # type: ignore[no-untyped-call]  # torch's


def _is_loose(func: object, args: Sequence[object]) -> bool:
    if func in POWERS and len(args) > 1:
        return isinstance(args[0], Tensor) and isinstance(args[1], float) and not args[1].is_integer()
    return func in LOOSE and bool(args) and isinstance(args[0], Tensor)


class _Alike(torch.autograd.Function):
    """`alike` of one tensor, with its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:  # torch's context object
        ctx.save_for_backward(x)
        ctx.function = function
        return alike(function, x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # torch's context object
        (x,) = ctx.saved_tensors
        return alike(partial(_gradient, ctx.function), x, g), None


@torch.enable_grad()
def _gradient(function: Callable[[Tensor], Tensor], x: Tensor, g: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (found,) = torch.autograd.grad(function(x), x, g)
    return found


def _as_it_is(*inputs: Tensor) -> bool:
    """Whether torch computes all numbers by vectors anyway, or there is nothing of the kind: on a GPU, or compiled."""
    if torch.compiler.is_compiling() or inputs[0].device.type != "cpu":
        return True
    return _fills(inputs[0].numel()) and all(one.is_contiguous() for one in inputs)


def _fills(numbers: int) -> bool:
    """Whether each thread's share is whole vectors, by the rule of at::parallel_for."""
    threads = torch.get_num_threads()
    sharing = {1, min(threads, -(-numbers // GRAIN)), threads}  # one of them
    return all(-(-numbers // share) % VECTORS == 0 for share in sharing if share)
