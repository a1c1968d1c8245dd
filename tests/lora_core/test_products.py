"""Products with frozen weights: the same numbers as torch's, and a row's bits are its own."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from lora_core.base_model import BaseModel
from lora_core.full_tuning import trainable
from lora_core.products import quick_product, quicken


@st.composite
def a_product(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None]:
    """x_KTI of any number of rows, few or many, and a weight as Linear or as Conv1D keeps it."""
    torch.manual_seed(draw(st.integers(0, 1 << 30)))
    slots, tokens = draw(st.integers(2, 8)), draw(st.integers(1, 70))
    inputs, outputs = draw(st.integers(1, 300)), draw(st.integers(1, 300))
    weight_IO = torch.randn(outputs, inputs).mT if draw(st.booleans()) else torch.randn(inputs, outputs)
    return torch.randn(slots, tokens, inputs), weight_IO, torch.randn(outputs) if draw(st.booleans()) else None


@pytest.mark.usefixtures("one_thread")
@given(of=a_product(), order=st.randoms(use_true_random=False), threads=st.sampled_from([1, 2]))
def test_a_slots_bits_depend_on_no_neighbour_no_place_no_number_of_slots_and_none_of_threads(
    of: tuple[Tensor, Tensor, Tensor | None], order: Any, threads: int
) -> None:
    """What packed = alone rests on, whichever kernel oneDNN has for a shape."""
    x_KTI, weight_IO, bias_O = of
    places = order.sample(range(len(x_KTI)), len(x_KTI))
    beside_KTI = torch.full_like(x_KTI, float("nan"))
    beside_KTI[0] = x_KTI[places[0]]

    y_KTO = quick_product(x_KTI, weight_IO, bias_O)
    torch.set_num_threads(threads)

    moved_KTO, beside_KTO = (quick_product(x, weight_IO, bias_O) for x in (x_KTI[places], beside_KTI))
    fewer_NO = quick_product(x_KTI.flatten(0, 1)[1:3], weight_IO, bias_O)
    torch.set_num_threads(1)

    assert torch.equal(moved_KTO, y_KTO[places])
    assert torch.equal(beside_KTO[0], y_KTO[places[0]])
    assert len(fewer_NO) < 2 or torch.equal(fewer_NO, y_KTO.flatten(0, 1)[1:3])  # one alone is not multiplied so
    wanted = x_KTI.double() @ weight_IO.double() + (0 if bias_O is None else bias_O.double())
    torch.testing.assert_close(y_KTO.double(), wanted, rtol=1e-4, atol=1e-4)


def conv1d() -> nn.Module:
    """GPT-2's kind, with a bias that is not zero."""
    made: nn.Module = Conv1D(24, 40)
    nn.init.normal_(made.get_parameter("bias"))
    return made


@pytest.mark.parametrize("make", [lambda: nn.Linear(40, 24), lambda: nn.Linear(40, 24, bias=False), conv1d])
@pytest.mark.parametrize("rows", [1, 2, 97])
def test_a_quick_linear_is_the_linear_it_was(make: Any, rows: int) -> None:
    """Output and gradient of x, for one row and many, under its own kind's name."""
    plain = make().requires_grad_(False)
    quick = copy.deepcopy(plain)
    quicken(quick)
    x_NI = torch.randn(1, rows, 40, requires_grad=True)
    g_NO = torch.randn(1, rows, 24)

    y_NO = quick(x_NI)

    assert isinstance(quick, type(plain))
    assert quick.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(y_NO, plain(x_NI), rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(of, x_NI, g_NO)[0] for of in (y_NO, plain(x_NI))]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN")
def test_rows_in_fp32_go_through_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or nothing is gained: the others go torch's way."""
    plain: list[int] = []

    def linear(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        plain.append(x_NI.numel() // x_NI.shape[-1])
        return x_NI @ weight_OI.mT

    monkeypatch.setattr(functional, "linear", linear)
    for rows in (1, 2, 100):
        quick_product(torch.randn(rows, 8), torch.randn(8, 8))
    quick_product(torch.randn(50, 8).bfloat16(), torch.randn(8, 8).bfloat16())

    assert plain == [1, 50]


def test_a_copy_that_trains_all_its_weights_gets_their_gradients(base: BaseModel) -> None:
    """Full fine-tuning copies the base, quick linears and all."""
    twin = trainable(base)
    tokens_KT = torch.arange(64).view(2, -1) % 30

    twin.model(input_ids=tokens_KT, labels=tokens_KT).loss.backward()

    for site in base.sites:
        gradient = twin.model.get_submodule(site.name).get_parameter("weight").grad
        assert gradient is not None, site.name
        assert gradient.abs().sum() > 0, site.name
