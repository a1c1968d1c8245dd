"""The cohort matrix: K users' adapters as K rows of P numbers, and everything that is a row beside them.

A finished user is one row copied out; a new one is one row written in.  Nothing here knows what a row means.
"""

from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # 2**64 / golden ratio as a signed 64-bit number: spreads counters


@dataclass(frozen=True)
class Aside:
    """A user's rows outside of the cohort, on the CPU: all that it takes to sit down again, in whichever slot."""

    weights_P: Tensor
    first_P: Tensor
    second_P: Tensor
    gradient_P: Tensor
    scale: float

    @classmethod
    def fresh(cls, weights_P: Tensor, scale: float) -> "Aside":
        """A user who has not trained yet; its zeros take no memory while it waits."""
        nothing = torch.zeros(()).expand_as(weights_P)
        return cls(weights_P, nothing, nothing, nothing, scale)


Kept = tuple[Tensor | None, Tensor]  # of a borrowed slot: its row, where the working one is the only one, and its scale


class Cohort:
    """K slots: weights, gradient, both Adam moments (all K x P), and a column of settings a slot.

    `weights_KP` is fp32; `working_KP` is what the forward pass reads: the same memory in fp32, a copy in bf16.
    A cohort that does not learn has one row of zeros for all slots where the others have gradient and moments.
    """

    def __init__(self, slots: int, width: int, device: torch.device, dtype: torch.dtype, learns: bool = True) -> None:
        self.weights_KP = torch.zeros(slots, width, device=device)
        self.working_KP = self.weights_KP if dtype == torch.float32 else self.weights_KP.to(dtype)
        rows = slots if learns else 1
        self.first_KP, self.second_KP, self.gradient_KP = (
            torch.zeros(rows, width, device=device, dtype=kind).expand(slots, -1)
            for kind in (torch.float32, torch.float32, dtype)
        )
        self.scale_K11 = torch.zeros(slots, 1, 1, device=device, dtype=dtype)
        self.dropout_K = torch.zeros(slots, device=device)
        self.key_K = torch.zeros(slots, device=device, dtype=torch.int64)
        self.drops = False  # whether any slot drops inputs now; then every slot computes a mask
        self._borrowed: dict[int, Kept] = {}  # by slot

    @property
    def slots(self) -> int:
        """K."""
        return len(self.weights_KP)

    def lowest(self, slots: int) -> "Cohort":
        """The lowest so many slots, as a cohort of their own in the same memory."""
        if slots == self.slots:
            return self
        part = copy(self)
        for name, column in vars(self).items():
            if isinstance(column, Tensor):
                setattr(part, name, column[:slots])
        if self.working_KP is self.weights_KP:
            part.working_KP = part.weights_KP
        return part

    def admit(self, slot: int, row_P: Tensor, scale: float) -> None:
        """Write a user into a slot: its start row, and no memory of who was there."""
        self.clear(slot)
        self.weights_KP[slot] = row_P.to(self.weights_KP.device)
        self.working_KP[slot] = self.weights_KP[slot]
        self.scale_K11[slot] = scale

    def clear(self, slot: int) -> None:
        """Make a slot the base model: a row of zeros."""
        for matrix in (self.weights_KP, self.first_KP, self.second_KP, self.gradient_KP, self.working_KP):
            matrix[slot] = 0
        self.scale_K11[slot] = 0

    def take(self, slot: int) -> Aside:
        """A copy of a user's rows, to go on from later."""
        weights_P, first_P, second_P, gradient_P = (
            matrix[slot].to("cpu", copy=True)
            for matrix in (self.weights_KP, self.first_KP, self.second_KP, self.gradient_KP)
        )
        return Aside(weights_P, first_P, second_P, gradient_P, float(self.scale_K11[slot]))

    def seat(self, slot: int, aside: Aside) -> None:
        """Write rows that were taken aside into a slot."""
        self.admit(slot, aside.weights_P, aside.scale)
        for matrix_KP, row_P in zip(
            (self.first_KP, self.second_KP, self.gradient_KP),
            (aside.first_P, aside.second_P, aside.gradient_P),
            strict=True,
        ):
            if any(row_P.stride()):  # else zeros, and they are there
                matrix_KP[slot] = row_P

    def move(self, home: int, slot: int) -> None:
        """Bring a user's rows to a slot that is nobody's; the one they were in is the base model's."""
        for matrix in (self.weights_KP, self.first_KP, self.second_KP, self.gradient_KP, self.scale_K11):
            matrix[slot] = matrix[home]
        self.refresh(slot)
        self.clear(home)

    def lend(self, home: int, lane: int) -> None:
        """Make another slot read as a user's own does."""
        self.weights_KP[lane] = self.weights_KP[home]
        self.working_KP[lane] = self.working_KP[home]
        self.scale_K11[lane] = self.scale_K11[home]

    def forget_gradient(self, slot: int) -> None:
        """Before somebody learns there."""
        self.gradient_KP[slot] = 0

    def fold(self, lane: int, home: int) -> None:
        """Add what another slot learnt to the user's own gradient; there it is to be forgotten."""
        self.gradient_KP[home] += self.gradient_KP[lane]

    def borrow(self, home: int, lane: int) -> None:
        """Make another user's slot read as a user's own does, until it is given back; its gradient stays as it is."""
        row_P = self.working_KP[lane].clone() if self.working_KP is self.weights_KP else None
        self._borrowed[lane] = row_P, self.scale_K11[lane].clone()
        self.working_KP[lane] = self.working_KP[home]
        self.scale_K11[lane] = self.scale_K11[home]

    def give_back(self) -> None:
        """Every borrowed slot reads as it did."""
        for lane, (row_P, scale_11) in self._borrowed.items():
            self.working_KP[lane] = self.weights_KP[lane] if row_P is None else row_P
            self.scale_K11[lane] = scale_11
        self._borrowed.clear()

    def row(self, slot: int) -> Tensor:
        """A copy of a user's row, on the CPU, shape P."""
        return self.weights_KP[slot].to("cpu", copy=True)

    def refresh(self, slot: int) -> None:
        """Bring the working copy of a row up to date after its weights changed."""
        if self.working_KP is not self.weights_KP:
            self.working_KP[slot] = self.weights_KP[slot]

    def set_dropout(self, rates: list[float], keys: list[int]) -> None:
        """Each slot's dropout rate (0 when it is evaluated) and the key of this micro-step's mask."""
        self.drops = any(rates)
        self.dropout_K.copy_(torch.tensor(rates))
        self.key_K.copy_(torch.tensor(keys))

    def dropout_mask(self, site: Tensor, x_KTI: Tensor) -> Tensor | None:
        """What multiplies a site's inputs: 0 or 1 / (1 - rate), shape K T I; None when no slot drops.

        A counter-based hash (SplitMix64's finaliser; Steele et al., 2014) of the slot's own key, the site and the place
        in the row: the mask depends on nobody else, and on no generator's state.
        """
        if not self.drops:
            return None
        places = torch.arange(x_KTI.shape[1:].numel(), device=x_KTI.device).view(1, *x_KTI.shape[1:])
        key_K11, rate_K11 = (column_K.to(x_KTI.device).view(-1, 1, 1) for column_K in (self.key_K, self.dropout_K))
        mixed = places * _GOLDEN + key_K11 * (2 * site.to(x_KTI.device) + 1)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64)):
            mixed = (mixed ^ (mixed >> shift & (1 << 64 - shift) - 1)) * factor
        uniform = ((mixed >> 40) & 0xFFFFFF).float() / 2**24
        return ((uniform >= rate_K11) / (1 - rate_K11)).to(x_KTI.dtype)


def as_leaf(factor: Tensor, gradient: Tensor) -> Tensor:
    """A view of the cohort matrix to differentiate by; what autograd finds is added to a view of the gradient's."""
    view = factor.detach().requires_grad_()
    view.grad = gradient
    return view
