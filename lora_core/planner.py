"""How many users train at once: the most slots whose predicted peak fits into memory, and what to do where it did not.

K slots, T tokens a slot.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch

from lora_core.allocators import release
from lora_core.banks.bank import Bank
from lora_core.base_model import BaseModel
from lora_core.budget import Weights, fewer_bits
from lora_core.door import SHUT, Door
from lora_core.errors import MemoryTooSmall
from lora_core.layers import checkpointed, compiled, decoder_layers
from lora_core.learner import Learner, Trained
from lora_core.memory import predict
from lora_core.micro_step import Replay
from lora_core.saves import Saves
from lora_core.train import Compute, Pace, train

SHARE = 0.95  # of what a GPU has free: the rest is for fragments and for kernels' scratch memory

# How libraries say that memory is out where they have no error of its own for it.
EXHAUSTED = ("DefaultCPUAllocator: can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")


@dataclass(frozen=True)
class Plan:
    """K, T, how layers run, and the peak that this will take in bytes (0: not predicted)."""

    slots: int
    row_tokens: int
    checkpointed: bool = False  # layers forget their activations
    predicted_bytes: int = 0
    compiled: bool = False
    recorded: bool = False  # micro-steps as CUDA graphs, on a GPU

    def smaller(self) -> "Plan | None":
        """What to try when this did not fit: checkpointing, which changes nobody's bytes; then half the slots."""
        if not self.checkpointed:
            return replace(self, checkpointed=True, predicted_bytes=0)
        return replace(self, slots=self.slots // 2, predicted_bytes=0) if self.slots > 1 else None


def plan(
    base: BaseModel,
    bank: Bank,
    budget_bytes: int,
    row_tokens: int,
    most_slots: int,
    drops: bool = True,
    shortest_row: int | None = None,
) -> Plan:
    """The most slots (`most_slots`, or it halved) that fit, without checkpointing if that does.

    Only where not even one slot fits are rows shortened, by halves, to `shortest_row` at the least: the longest
    example's length, or None where T must stay.  Raises MemoryTooSmall.
    """
    modes = (False, True) if decoder_layers(base) else (False,)
    lengths = _halves(row_tokens, row_tokens if shortest_row is None else shortest_row)
    for length in lengths:

        @cache
        def peak(slots: int, forget: bool, length: int = length) -> int:
            return predict(base, bank, slots, length, drops, forget)

        if peak(most_slots, False) <= budget_bytes:  # looked at first: most packs fit at once
            return Plan(most_slots, length, False, peak(most_slots, False))
        needed = min(peak(1, forget) for forget in modes)
        if needed <= budget_bytes:
            slots, forget = _most(peak, budget_bytes, _halves(most_slots, 1), modes)
            return Plan(slots, length, forget, peak(slots, forget))
    raise MemoryTooSmall(needed, budget_bytes, lengths[-1], fewer_bits(Weights.of(base), base.quantised, needed))


def _most(
    peak: Callable[[int, bool], int], budget: int, choices: Sequence[int], modes: Sequence[bool]
) -> tuple[int, bool]:
    """The highest of falling numbers of slots that fits, and whether only with checkpointing; the last one does."""
    found, end = (0, False), len(choices)
    for forget in modes:
        low, high = 0, end
        while low < high:  # peaks grow with slots: whatever fits does so from some place on
            middle = (low + high) // 2
            low, high = (low, middle) if peak(choices[middle], forget) <= budget else (middle + 1, high)
        if low < end:
            found, end = (choices[low], forget), low
    return found


def _halves(most: int, least: int) -> list[int]:
    """A number and its halves down to the least, which ends the list."""
    return [most, *_halves(max(least, most // 2), least)] if most > least else [most]


def free_bytes(device: torch.device) -> int | None:
    """What this process may plan with, what it holds already included; None on a CPU, where nobody can tell."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return int(SHARE * (free + torch.cuda.memory_reserved(device)))


def train_planned(
    base: BaseModel,
    learners: Sequence[Learner],
    planned: Plan,
    bank: Bank,
    watch: Callable[[Pace], None] | None = None,
    compute: Compute | None = None,
    saves: Saves | None = None,
    door: Door = SHUT,
) -> Iterator[tuple[Trained, Plan]]:
    """Train every learner, and who comes in by the door, and yield each with the plan it was trained by.

    Where memory runs out all the same, those who have not finished begin again by a smaller plan: nobody is lost, and
    each has the bytes that its own plan gives.  Raises what the device said once no plan is smaller.
    """
    inside = {learner.name: learner for learner in learners}
    current: Plan | None = planned
    while current and not door.closing and (inside or current is planned):
        smaller, how = None, compute or (Replay() if current.recorded else None)
        try:
            with compiled(base, current.compiled), checkpointed(base, current.checkpointed):
                shape, listed = (current.slots, current.row_tokens, bank), _Listed(door, inside)
                for trained in train(base, inside.values(), *shape, watch, listed, how, saves):
                    del inside[trained.name]
                    yield trained, current
        except (RuntimeError, MemoryError) as error:
            smaller = current.smaller()
            if smaller is None or not exhausted(error):
                raise
        del how
        release(base.model.device)  # out here: an error that is being handled holds on to the cohort
        current = smaller


class _Listed(Door):
    """A door at which whoever comes in is written down: they must not be lost if the room gets smaller."""

    def __init__(self, door: Door, inside: dict[str, Learner]) -> None:
        self.door, self.inside = door, inside

    def arrivals(self, places: int) -> Sequence[Learner]:
        came = self.door.arrivals(places)
        self.inside.update({learner.name: learner for learner in came})
        return came

    def dismissed(self) -> Collection[str]:
        return self.door.dismissed()

    @property
    def closing(self) -> bool:
        return self.door.closing


def with_fewer(base: BaseModel, slots: int, attempt: Callable[[int], None]) -> None:
    """Attempt what can be begun again with so many slots, and with half as many each time memory runs out."""
    while True:
        try:
            return attempt(slots)
        except (RuntimeError, MemoryError) as error:
            if slots == 1 or not exhausted(error):
                raise
        release(base.model.device)
        slots //= 2


def exhausted(error: BaseException) -> bool:
    """Whether an error says that memory is out."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or any(words in str(error) for words in EXHAUSTED)
