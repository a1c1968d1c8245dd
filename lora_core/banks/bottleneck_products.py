"""What an adapter layer does to the forward pass, and the gradients of that.

K slots, T tokens a slot, D width of the base, W the bank's width, V = W + 1: the row that holds the upper bias.
Every narrow product has W or V as its rows, not its columns: half the time on a CPU.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_core.cohort import Cohort
from lora_core.elementwise import alike
from lora_core.layers import Forward
from lora_core.products import gradient_product

Activation = tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]  # act(x); and its gradient of (g, x)

# Each is 0 at 0: then what lies beyond a user's own width has no gradient and stays zero.
ACTIVATIONS: Mapping[str, Activation] = {
    "relu": (F.relu, lambda g, x: torch.ops.aten.threshold_backward(g, x, 0)),
    "gelu": (F.gelu, torch.ops.aten.gelu_backward),
    "silu": (F.silu, torch.ops.aten.silu_backward),
}


@dataclass(frozen=True)
class Factors:
    """One adapter layer of K users: down and its bias, up with its bias as the last row; and switches, not trained.

    `biased_K11` is not 0 where the user has biases here; `chosen_KA11` where the user has that activation of the bank.
    """

    down_KWD: Tensor
    bias_KW1: Tensor
    up_KVD: Tensor
    biased_K11: Tensor
    chosen_KA11: Tensor

    @property
    def trained(self) -> tuple[Tensor, Tensor, Tensor]:
        """What has gradients."""
        return self.down_KWD, self.bias_KW1, self.up_KVD

    def to(self, device: torch.device) -> "Factors":
        """The same on a layer's device; gradients come back."""
        return Factors(*(factor.to(device) for factor in (*self.trained, self.biased_K11, self.chosen_KA11)))


class AdapterLayer:
    """K users' adapter layers at one place of the base; row k of the batch belongs to slot k."""

    def __init__(
        self, weights: Factors, gradients: Factors, activations: Sequence[str], cohort: Cohort, number: int
    ) -> None:
        leaves = [_leaf(*pair) for pair in zip(weights.trained, gradients.trained, strict=True)]
        self.factors = replace(weights, down_KWD=leaves[0], bias_KW1=leaves[1], up_KVD=leaves[2])
        self.activations = [ACTIVATIONS[name] for name in activations]
        self.cohort = cohort
        self.number = torch.tensor(number, device=leaves[0].device)  # a tensor: a graph is compiled for all numbers

    def around(self, forward: Forward) -> Forward:
        """A module's forward pass with the adapter layer behind it: behind the first tensor where it gives several."""

        def adapting(*inputs: Any, **named: Any) -> Any:  # whatever the module takes and gives
            output = forward(*inputs, **named)
            return (self._adapt(output[0]), *output[1:]) if isinstance(output, tuple) else self._adapt(output)

        return adapting

    def _adapt(self, x_KTD: Tensor) -> Tensor:
        keep_KTD = self.cohort.dropout_mask(self.number, x_KTD)
        if torch.compiler.is_compiling():
            return adapted(x_KTD, keep_KTD, self.factors.to(x_KTD.device), self.activations)[0]
        y_KTD: Tensor = Adapted.apply(x_KTD, self.factors.down_KWD, self, keep_KTD)  # type: ignore[no-untyped-call]  # torch's
        return y_KTD


def adapted(
    x_KTD: Tensor, keep_KTD: Tensor | None, factors: Factors, activations: Sequence[Activation]
) -> tuple[Tensor, Tensor]:
    """y = x + up act(down (keep * x) + b) + c, row by row; and what enters the activation, inner_KWT."""
    biased_K11 = _on(factors.biased_K11)
    inner_KWT = torch.baddbmm(factors.bias_KW1 * biased_K11, factors.down_KWD, _seen(x_KTD, keep_KTD).mT)
    low_KVT = _low(inner_KWT, biased_K11, factors, activations)
    return torch.baddbmm(x_KTD, low_KVT.mT, factors.up_KVD), inner_KWT


def adapted_gradients(
    g_KTD: Tensor,
    x_KTD: Tensor,
    keep_KTD: Tensor | None,
    inner_KWT: Tensor,
    factors: Factors,
    activations: Sequence[Activation],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, down, its bias, and up, from that of y."""
    biased_K11, width = _on(factors.biased_K11), inner_KWT.shape[1]
    up_g_KVD = gradient_product(_low(inner_KWT, biased_K11, factors, activations), g_KTD)
    low_g_KWT = torch.bmm(factors.up_KVD[:, :width], g_KTD.mT)
    ways_KWT = [alike(gradient, low_g_KWT, inner_KWT) for _, gradient in activations]
    inner_g_KWT = _chosen(ways_KWT, factors.chosen_KA11)
    down_g_KWD = gradient_product(inner_g_KWT, _seen(x_KTD, keep_KTD))
    bias_g_KW1 = inner_g_KWT.sum(2, keepdim=True) * biased_K11
    x_g_KTD = torch.bmm(inner_g_KWT.mT, factors.down_KWD)  # rounded here, whether or not a neighbour drops inputs
    if keep_KTD is not None:
        x_g_KTD.mul_(keep_KTD)
    return x_g_KTD.add_(g_KTD), down_g_KWD, bias_g_KW1, up_g_KVD


class Adapted(torch.autograd.Function):
    """`adapted`.  Its backward adds the factors' gradients straight into the cohort's gradient matrix."""

    @staticmethod
    def forward(
        ctx: Any,  # torch's context object has no public type
        x_KTD: Tensor, leaf: Tensor, layer: AdapterLayer, keep_KTD: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """`leaf`, any factor, makes autograd call the backward where x needs no gradient."""
        factors = layer.factors.to(x_KTD.device)
        y_KTD, inner_KWT = adapted(x_KTD, keep_KTD, factors, layer.activations)
        ctx.save_for_backward(x_KTD, keep_KTD, inner_KWT)
        ctx.layer, ctx.factors = layer, factors
        return y_KTD

    @staticmethod
    def backward(ctx: Any, g_KTD: Tensor) -> tuple[Tensor | None, ...]:  # torch's context object
        """The gradient of x; the factors' are added where they belong."""
        x_KTD, keep_KTD, inner_KWT = ctx.saved_tensors
        x_g_KTD, *gradients = adapted_gradients(g_KTD, x_KTD, keep_KTD, inner_KWT, ctx.factors, ctx.layer.activations)
        for leaf, gradient in zip(ctx.layer.factors.trained, gradients, strict=True):
            leaf.grad.add_(gradient.to(leaf.device))
        return x_g_KTD if ctx.needs_input_grad[0] else None, None, None, None


def _low(inner_KWT: Tensor, biased_K11: Tensor, factors: Factors, activations: Sequence[Activation]) -> Tensor:
    """What up multiplies: the activation's outputs, and a row of ones where the user has biases."""
    low_KWT = _chosen([alike(act, inner_KWT) for act, _ in activations], factors.chosen_KA11)
    return torch.cat([low_KWT, biased_K11.expand(-1, 1, low_KWT.shape[2])], dim=1)


def _chosen(ways_KWT: Sequence[Tensor], chosen_KA11: Tensor) -> Tensor:
    """Each slot's own of several ways to compute the same; the first in a slot that has chosen none."""
    found_KWT, *others_KWT = ways_KWT
    for chosen_K11, other_KWT in zip(chosen_KA11.unbind(1)[1:], others_KWT, strict=True):
        found_KWT = torch.where(chosen_K11 != 0, other_KWT, found_KWT)
    return found_KWT


def _on(switch_K11: Tensor) -> Tensor:
    """1 or 0: weight decay may have moved the number of a switch, and cannot make it 0."""
    return (switch_K11 != 0).to(switch_K11.dtype)


def _seen(x_KTD: Tensor, keep_KTD: Tensor | None) -> Tensor:
    return x_KTD if keep_KTD is None else x_KTD * keep_KTD


def _leaf(factor: Tensor, gradient: Tensor) -> Tensor:
    """A view of the cohort matrix to differentiate by; what autograd finds is added to a view of the gradient's."""
    leaf = factor.detach().requires_grad_()
    leaf.grad = gradient
    return leaf
