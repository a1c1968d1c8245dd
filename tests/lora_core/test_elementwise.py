"""A number's bits under an elementwise function do not depend on where it stands, nor on how many others there are."""

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from lora_core.elementwise import GRAIN, alike, steady

KINDS = ["silu", "gelu_pytorch_tanh", "gelu", "gelu_new", "quick_gelu", "sigmoid", "relu"]
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "silu": F.silu,
    "its gradient": torch.ops.aten.silu_backward,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.usefixtures("threads")
def test_a_part_is_what_it_is_in_the_whole(name: str, dtype: torch.dtype) -> None:
    """Of any size, from anywhere."""
    generator, count = random.Random(0), 2 if "gradient" in name else 1
    inputs = [torch.randn(6 * GRAIN + 77, generator=torch.Generator().manual_seed(n)).to(dtype) for n in range(count)]
    whole = alike(FUNCTIONS[name], *inputs)

    for size in (1, 31, 64, 1000, GRAIN, 3 * GRAIN + 64, 5 * GRAIN - 7):
        start = generator.randrange(len(whole) - size)
        part = alike(FUNCTIONS[name], *(one[start:][:size] for one in inputs))
        assert torch.equal(part, whole[start:][:size])


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("shape", [(5, 22, 1000), (7, 3, 5), (3, 64, 1024)], ids=str)
@pytest.mark.usefixtures("threads")
def test_an_activation_of_a_base_gives_a_row_the_same_bits_in_every_slot(name: str, shape: tuple[int, ...]) -> None:
    """Forward and backward; and it is the function that it was."""
    module = nn.Sequential(ACT2FN[name])
    x_KTI, g_KTI = torch.randn(shape, requires_grad=True), torch.randn(shape)
    plain_KTI = module(x_KTI)
    (plain_g_KTI,) = torch.autograd.grad(plain_KTI, x_KTI, g_KTI)
    steady(module)
    steady(module)  # once is enough

    y_KTI, y_g_KTI = with_gradient(module, x_KTI, g_KTI)

    torch.testing.assert_close(y_KTI, plain_KTI)
    torch.testing.assert_close(y_g_KTI, plain_g_KTI)
    for slot in range(1, shape[0]):
        turned, turned_g = with_gradient(module, x_KTI.roll(slot, 0), g_KTI.roll(slot, 0))
        assert torch.equal(turned.roll(-slot, 0), y_KTI)
        assert torch.equal(turned_g.roll(-slot, 0), y_g_KTI)
    fewer, fewer_g = with_gradient(module, x_KTI[:2], g_KTI[:2])
    assert torch.equal(fewer, y_KTI[:2])
    assert torch.equal(fewer_g, y_g_KTI[:2])


def with_gradient(module: nn.Module, x_KTI: Tensor, g_KTI: Tensor) -> tuple[Tensor, Tensor]:
    """What comes out, and the gradient of what went in."""
    x_KTI = x_KTI.detach().requires_grad_()
    y_KTI = module(x_KTI)
    (x_g_KTI,) = torch.autograd.grad(y_KTI, x_KTI, g_KTI)
    return y_KTI.detach(), x_g_KTI
