"""Functions of each number alone, whose bits do not depend on where among the others a number stands.

torch's CPU kernels compute by vectors, and what is left over at the end of each thread's share by other code, which
rounds some functions otherwise (SiLU, the tanh form of GELU, the sigmoid): a user's bytes would depend on the slot and
on who sits beside it.  Here every number is computed by vectors.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
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
