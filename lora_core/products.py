"""Products with frozen weights, and linears that compute them; N is all axes of x but the last, I inputs, O outputs.

In fp32 on a CPU they go through oneDNN.  It uses AVX-512 wherever there is any, and is twice as fast as what torch
calls by itself (MKL) on processors that are not Intel's; and a row's bits do not depend on its place among the rows,
which they do in MKL where rows are few or widths are odd.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

GRAIN = 4  # numbers of fp32, 16 bytes: MKL's batched products round alike wherever operands begin at a multiple
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def quick_product(x_NI: Tensor, weight_IO: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W + b, N O."""
    if not multiplies_alone(x_NI):
        return F.linear(x_NI, weight_IO.mT, bias_O)
    y_MO = torch.ops.mkldnn._linear_pointwise(x_NI.flatten(0, -2), weight_IO.mT, bias_O, "none", [], "")
    y_NO: Tensor = torch.ops.aten._unsafe_view(y_MO, (*x_NI.shape[:-1], y_MO.shape[1]))  # some bases add to it in place
    return y_NO


def product_and_sum(x_KTI: Tensor, weight_IO: Tensor, bias_O: Tensor | None, a_KTR: Tensor, b_KRO: Tensor) -> Tensor:
    """x W + b + a b, K T O, the last product row by row.

    On a GPU the large product reads the small one's result on its way, which hides a read of y: of the time of two
    linears of 4096 to 14336 a twentieth (H200).
    """
    if not x_KTI.is_cuda or bias_O is not None:
        return quick_product(x_KTI, weight_IO, bias_O).baddbmm_(a_KTR, b_KRO)
    y_KTO = torch.bmm(a_KTR, b_KRO)
    add_quick_product(y_KTO, x_KTI, weight_IO)
    return y_KTO


def add_product(y_KAB: Tensor | None, a_KAN: Tensor, b_KNB: Tensor) -> Tensor:
    """a b row by row, added to y in place if there is one.

    It is rounded before it is added, as what another slot learnt is: the same bits wherever a user's rows are read.
    """
    product_KAB = gradient_product(a_KAN, b_KNB)
    return product_KAB.contiguous() if y_KAB is None else y_KAB.add_(product_KAB)


def gradient_product(a_KAN: Tensor, b_KNB: Tensor) -> Tensor:
    """a b row by row, where a result is as long as factors are, whatever that is: each begins at a whole grain."""
    numbers = a_KAN.shape[1] * b_KNB.shape[2]
    if numbers % GRAIN == 0 or a_KAN.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.bmm(a_KAN, b_KNB)
    space_KN = a_KAN.new_empty(len(a_KAN), numbers + -numbers % GRAIN)
    product_KAB = space_KN[:, :numbers].unflatten(1, (a_KAN.shape[1], b_KNB.shape[2]))
    return torch.bmm(a_KAN, b_KNB, out=product_KAB)


def add_quick_product(y_KTO: Tensor, x_KTI: Tensor, weight_IO: Tensor) -> None:
    """Add x W to y, in place."""
    if multiplies_alone(x_KTI):
        y_KTO.add_(quick_product(x_KTI, weight_IO))
    else:
        y_KTO.flatten(0, 1).addmm_(x_KTI.flatten(0, 1), weight_IO)


def multiplies_alone(x_NI: Tensor) -> bool:
    """Whether a row has the same bits whoever is beside it, how many, and wherever it stands: by oneDNN."""
    several = x_NI.numel() > x_NI.shape[-1]  # one alone is quicker the other way
    return _ONEDNN and several and x_NI.device.type == "cpu" and x_NI.dtype == torch.float32


def quicken(model: nn.Module) -> None:
    """Have every plain linear of a model multiply by the quick product while its weight is frozen."""
    for module in model.modules():
        if type(module) in QUICK:
            module.__class__ = QUICK[type(module)]


class QuickLinear(nn.Linear):
    """A linear whose frozen weight gets no gradient and whose product is the quick one."""

    def forward(self, x_NI: Tensor) -> Tensor:
        """N O."""
        return super().forward(x_NI) if self.weight.requires_grad else _product(x_NI, self.weight.mT, self.bias)


class QuickConv1D(Conv1D):  # type: ignore[misc]  # transformers does not type it
    """The same for GPT-2's kind, which keeps its weight as [in, out]."""

    def forward(self, x_NI: Tensor) -> Tensor:
        """N O."""
        return super().forward(x_NI) if self.weight.requires_grad else _product(x_NI, self.weight, self.bias)


QUICK: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: QuickLinear, Conv1D: QuickConv1D}


def _product(x_NI: Tensor, weight_IO: Tensor, bias_O: Tensor | None) -> Tensor:
    if not multiplies_alone(x_NI):  # torch knows the gradient
        return quick_product(x_NI, weight_IO, bias_O)
    y_NO: Tensor = torch.ops.lora_core.quick_product(x_NI, weight_IO, bias_O)
    return y_NO


# The same with a gradient, for x alone: an operator, since inductor takes oneDNN's own with constant weights only.


def _shapes(x_NI: Tensor, weight_IO: Tensor, bias_O: Tensor | None) -> Tensor:
    return x_NI.new_empty(*x_NI.shape[:-1], weight_IO.shape[1])


def _keep_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # torch's context object
    ctx.save_for_backward(inputs[1])


def _gradient(ctx: Any, g_NO: Tensor) -> tuple[Tensor, None, None]:  # torch's context object
    (weight_IO,) = ctx.saved_tensors
    return torch.ops.lora_core.quick_product(g_NO.contiguous(), weight_IO.mT, None), None, None


torch.library.define("lora_core::quick_product", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
torch.library.impl("lora_core::quick_product", "default", quick_product)
torch.library.register_fake("lora_core::quick_product", _shapes)
torch.library.register_autograd("lora_core::quick_product", _gradient, setup_context=_keep_for_gradient)
