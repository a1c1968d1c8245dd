"""The head's loss: of predictions that count alone, and each one's bits its own."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from lora_core import forward
from lora_core.data.rendering import IGNORED
from lora_core.forward import head_loss

TOLERANCES = {torch.float32: (1e-3, 1e-4), torch.bfloat16: (0.1, 0.02)}  # absolute, and relative


@pytest.fixture(scope="module", autouse=True)
def small_pieces() -> Iterator[None]:
    """Several pieces of few tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, "PIECE_LOGITS", 0)
        patch.setattr(forward, "LEAST_PIECE", 48)
        patch.setattr(forward, "FEWEST", 8)
        yield


@st.composite
def a_batch(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """hidden_KTD, head_VD and targets_KT, of which none, some or all count."""
    torch.manual_seed(draw(st.integers(0, 1 << 30)))
    slots, tokens, width = draw(st.integers(2, 6)), draw(st.integers(1, 40)), draw(st.integers(1, 80))
    vocabulary, dtype = draw(st.integers(2, 300)), draw(st.sampled_from([*TOLERANCES]))
    targets_KT = torch.randint(vocabulary, (slots, tokens))
    targets_KT[torch.rand(slots, tokens) >= draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))] = IGNORED
    hidden_KTD = torch.randn(slots, tokens, width) / width**0.5  # logits of about 1: what bf16 rounds of 40 is much
    return hidden_KTD.to(dtype), torch.randn(vocabulary, width, dtype=dtype), targets_KT


def read(hidden_KTD: Tensor, head_VD: Tensor, targets_KT: Tensor, counted: int | None = None) -> list[Tensor]:
    """Losses, right guesses, and the gradient of twice the losses' sum."""
    leaf_KTD = hidden_KTD.clone().requires_grad_()
    counted = int((targets_KT != IGNORED).sum()) if counted is None else counted
    loss_KT, right_KT = head_loss(leaf_KTD, head_VD, targets_KT, counted)
    (2 * loss_KT.sum()).backward()
    assert leaf_KTD.grad is not None
    return [loss_KT.detach(), right_KT, leaf_KTD.grad]


@given(batch=a_batch())
def test_the_loss_and_its_gradient_are_cross_entropys(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    """And nothing where a prediction does not count."""
    hidden_KTD, head_VD, targets_KT = batch
    leaf_KTD = hidden_KTD.float().clone().requires_grad_()
    logits_KTV = leaf_KTD @ head_VD.float().mT

    loss_KT, right_KT, gradient_KTD = read(*batch)

    expected_KT = functional.cross_entropy(logits_KTV.mT, targets_KT, ignore_index=IGNORED, reduction="none")
    (2 * expected_KT.sum()).backward()
    absolute, relative = TOLERANCES[hidden_KTD.dtype]
    torch.testing.assert_close(loss_KT, expected_KT.detach(), atol=absolute, rtol=relative)
    torch.testing.assert_close(gradient_KTD.float(), leaf_KTD.grad, atol=absolute, rtol=relative)
    assert not right_KT[targets_KT == IGNORED].any()
    if hidden_KTD.dtype == torch.float32:
        assert torch.equal(right_KT, logits_KTV.argmax(-1) == targets_KT)


@pytest.mark.usefixtures("one_thread")
@given(batch=a_batch(), share=st.floats(0, 1), recorded=st.booleans())
def test_a_predictions_bits_do_not_depend_on_how_many_others_count(
    batch: tuple[Tensor, Tensor, Tensor], share: float, recorded: bool
) -> None:
    """Nor on whether their number was told."""
    hidden_KTD, head_VD, targets_KT = batch
    left_KT = torch.rand(targets_KT.shape) < share
    fewer_KT = targets_KT.where(left_KT, IGNORED)

    whole = read(hidden_KTD, head_VD, targets_KT)
    fewer = read(hidden_KTD, head_VD, fewer_KT, targets_KT.numel() if recorded else None)

    assert all(torch.equal(one[left_KT], other[left_KT]) for one, other in zip(whole, fewer, strict=True))


def test_predictions_that_do_not_count_have_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """But what fills the last piece up: 16 of 64 tokens where 9 count, none where none does."""
    piece_loss, read_tokens = forward._piece_loss, list[int]()

    def counted(hidden_ND: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        read_tokens.append(len(hidden_ND))
        return piece_loss(hidden_ND, *rest)

    monkeypatch.setattr(forward, "_piece_loss", counted)
    none_KT = torch.full((2, 32), IGNORED)
    nine_KT = none_KT.clone()
    nine_KT[1, 3:12] = 7
    for dtype in TOLERANCES:
        for targets_KT in (none_KT, nine_KT):
            read(torch.randn(2, 32, 8, dtype=dtype), torch.randn(50, 8, dtype=dtype), targets_KT)

    assert read_tokens == [16, 8, 8]  # fp32 in one piece, bf16 in two of one size
