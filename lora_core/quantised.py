"""Bases in 8 or 4 bits: bitsandbytes packs the weights as they are loaded and unpacks them whenever they are used.

Its modules' own forward pass is not run, because a row must depend neither on its neighbours nor on what ran before:
the 8-bit one looks for outliers over the whole batch, and the 4-bit one repacks the weights in place, with scales
rounded to bf16, when a CPU with AVX512-BF16 first runs it without gradient.  I inputs and O outputs of a linear.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from lora_core.products import quick_product

PACKED = ("Params4bit", "Int8Params")  # bitsandbytes' weights, by name: it need not be installed


def quantisation(quantise: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """How bitsandbytes packs: int8 by row, or NF4 with its scales quantised too (Dettmers et al., "QLoRA", 2023)."""
    if quantise == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def packed_in(config: PreTrainedConfig) -> str:
    """The bits that a base's configuration says bitsandbytes has packed it in: 8bit, 4bit, or nothing.

    Files can be packed already, whatever is asked for here.
    """
    given = getattr(config, "quantization_config", None) or {}
    how = given if isinstance(given, dict) else given.to_dict()  # a file's, or a loaded model's
    return next((bits for bits in ("8bit", "4bit") if how.get(f"load_in_{bits}")), "")


def unpack_on_use(model: PreTrainedModel) -> None:
    """Put a QuantisedLinear in place of every linear that bitsandbytes packed."""
    linears = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    for path, linear in linears:
        if type(linear.weight).__name__ in PACKED:
            model.set_submodule(path, QuantisedLinear(linear))


class QuantisedLinear(nn.Module):
    """A frozen linear whose weight is kept in 8 or 4 bits, and is a plain matrix only while it is multiplied."""

    def __init__(self, packed: nn.Linear) -> None:  # bitsandbytes' are subclasses
        super().__init__()
        self.in_features, self.out_features = packed.in_features, packed.out_features
        self.weight, self.bias = packed.weight, packed.bias
        self.state = getattr(packed, "state", None)  # where an 8-bit weight has its scales

    @property
    def scales(self) -> list[Tensor]:
        """What is kept beside the packed weight: no parameter and no buffer, so nobody else counts them."""
        nest = [self.state, getattr(self.weight, "quant_state", None)]
        nest += [getattr(part, "state2", None) for part in nest]
        held = [getattr(part, name, None) for part in nest for name in ("absmax", "code", "offset", "SCB")]
        return [tensor for tensor in held if isinstance(tensor, Tensor)]

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The weight as a plain matrix, O x I: the same numbers every time."""
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight  # imported late: brings bitsandbytes

        weight_OI: Tensor = dequantize_bnb_weight(self.weight, self.state)
        return weight_OI.to(dtype)

    def forward(self, x_I: Tensor) -> Tensor:
        """The product with the unpacked weight; I is x's last axis."""
        y_O: Tensor = _UnpackedProduct.apply(x_I, self)  # type: ignore[no-untyped-call]  # torch's
        return y_O


class _UnpackedProduct(torch.autograd.Function):
    """y = x W + b with W unpacked once in the forward and once more in the backward pass, and kept in neither."""

    @staticmethod
    def forward(ctx: Any, x_I: Tensor, frozen: QuantisedLinear) -> Tensor:  # torch's context object has no public type
        ctx.frozen = frozen
        return quick_product(x_I, frozen.unpacked(x_I.dtype).mT, frozen.bias)

    @staticmethod
    def backward(ctx: Any, g_O: Tensor) -> tuple[Tensor, None]:  # torch's context object
        return quick_product(g_O, ctx.frozen.unpacked(g_O.dtype)), None
