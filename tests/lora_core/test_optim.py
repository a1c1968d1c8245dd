"""A step of the cohort is PyTorch's AdamW on every row alone."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_core.cohort import Cohort
from lora_core.optim import RowStep, Stretch, clear_fixed, gradient_norms, kernels_start, rate_at, step_rows
from tests.lora_core.conftest import recipe

P = 1000


def cohort(slots: int, seed: int = 0) -> Cohort:
    """Random weights."""
    made = Cohort(slots, P, torch.device("cpu"), torch.float32)
    made.weights_KP.copy_(torch.randn(slots, P, generator=torch.Generator().manual_seed(seed)))
    return made


@pytest.mark.parametrize("clip", [0.5, 1e9])
def test_each_row_steps_as_torchs_adamw_would(clip: float) -> None:
    """With settings of its own: rate, decay, betas, clip; over 30 steps."""
    recipes = [
        recipe(weight_decay=0.1 * k, beta1=0.9 - 0.1 * k, learning_rate=1e-2 * (k + 1), clip=clip) for k in range(3)
    ]
    ours = cohort(3)
    theirs = [torch.nn.Parameter(row.clone()) for row in ours.weights_KP]
    optimisers = [
        torch.optim.AdamW([p], lr=r.learning_rate, betas=(r.beta1, r.beta2), eps=r.epsilon, weight_decay=r.weight_decay)
        for p, r in zip(theirs, recipes, strict=True)
    ]
    generator = torch.Generator().manual_seed(1)

    for step in range(1, 31):
        gradient_KP = torch.randn(3, P, generator=generator)
        ours.gradient_KP.copy_(gradient_KP)
        step_rows(ours, [RowStep(step, r.learning_rate, r) for r in recipes], gradient_norms(ours).tolist())
        for parameter, optimiser, gradient_P, one in zip(theirs, optimisers, gradient_KP, recipes, strict=True):
            parameter.grad = gradient_P.clone()
            torch.nn.utils.clip_grad_norm_([parameter], one.clip)
            optimiser.step()

    torch.testing.assert_close(ours.weights_KP, torch.stack([p.detach() for p in theirs]), atol=1e-5, rtol=1e-5)
    assert not ours.gradient_KP.any()


def test_stretches_of_a_row_step_at_rates_of_their_own() -> None:
    """As parameter groups of torch's AdamW would, under one norm; what does not train stays and is no part of it."""
    one, stretches = recipe(weight_decay=0.1), [Stretch(0, 300, 1.0), Stretch(300, 700, 0.0), Stretch(700, P, 8.0)]
    ours = cohort(2)
    before_KP = ours.weights_KP.clone()
    theirs = [torch.nn.Parameter(ours.weights_KP[1, s.start : s.stop].clone()) for s in stretches if s.times]
    optimiser = torch.optim.AdamW(
        [{"params": [p], "lr": 1e-2 * times} for p, times in zip(theirs, (1, 8), strict=True)], weight_decay=0.1
    )
    generator = torch.Generator().manual_seed(1)

    for step in range(1, 11):
        gradient_P = torch.randn(P, generator=generator)
        ours.gradient_KP[1] = gradient_P
        clear_fixed(ours, 1, stretches)
        step_rows(ours, [None, RowStep(step, 1e-2, one, stretches)], gradient_norms(ours).tolist())
        theirs[0].grad, theirs[1].grad = gradient_P[:300].clone(), gradient_P[700:].clone()
        torch.nn.utils.clip_grad_norm_(theirs, one.clip)
        optimiser.step()

    ended_P = ours.weights_KP[1]
    torch.testing.assert_close(ended_P[:300], theirs[0].detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ended_P[700:], theirs[1].detach(), atol=1e-5, rtol=1e-5)
    assert torch.equal(ended_P[300:700], before_KP[1, 300:700])
    assert torch.equal(ours.weights_KP[0], before_KP[0])


def test_a_row_that_is_not_due_stays_to_the_bit_and_keeps_its_gradient() -> None:
    """Its neighbour's step is none of its business."""
    ours = cohort(2)
    ours.gradient_KP.normal_(generator=torch.Generator().manual_seed(2))
    step_rows(ours, [RowStep(1, 0.1, recipe()), RowStep(1, 0.1, recipe())], [1.0, 1.0])
    ours.gradient_KP.normal_(generator=torch.Generator().manual_seed(3))
    before = [matrix[1].clone() for matrix in (ours.weights_KP, ours.first_KP, ours.second_KP, ours.gradient_KP)]

    step_rows(ours, [RowStep(2, 0.1, recipe()), None], [1.0, 1.0])

    after = [matrix[1] for matrix in (ours.weights_KP, ours.first_KP, ours.second_KP, ours.gradient_KP)]
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
    assert not ours.gradient_KP[0].any()


def test_a_row_steps_the_same_whatever_its_neighbours_gradients_are() -> None:
    """Clipping and moments are the row's own."""
    one, two = cohort(2), cohort(2)
    one.gradient_KP[0] = two.gradient_KP[0] = torch.ones(P)
    two.gradient_KP[1] = 1e30
    for each in (one, two):
        step_rows(each, [RowStep(1, 0.1, recipe())] * 2, gradient_norms(each).tolist())

    assert torch.equal(one.weights_KP[0], two.weights_KP[0])


@settings(max_examples=50)
@given(st.integers(1, 500), st.sampled_from(["constant", "linear", "cosine"]), st.floats(0, 0.9))
def test_rates_rise_to_the_peak_and_fall_and_are_never_zero(steps: int, schedule: str, warmup: float) -> None:
    """Every step learns something; none is above the recipe's rate."""
    one = recipe(schedule=schedule, warmup=warmup, learning_rate=0.1)

    rates = [rate_at(one, step, steps) for step in range(1, steps + 1)]

    peak = rates.index(max(rates))
    assert all(0 < rate <= 0.1 for rate in rates)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert max(rates) == pytest.approx(0.1) or len(rates) <= warmup * steps + 1


@pytest.mark.parametrize(("compiler", "starts"), [("", False), ("gcc", True), ("clang", True)])
def test_without_a_compiler_no_kernel_is_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, compiler: str, starts: bool
) -> None:
    """Steps are taken as where there is no Triton, and a GPU's owner is told why they are slow."""
    pytest.importorskip("triton", reason="Triton is for Linux on x86")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    if compiler:
        (tmp_path / compiler).touch(mode=0o755)

    assert kernels_start.__wrapped__() is starts
    assert ("install gcc" in caplog.text) is not starts
