"""How many of a cohort's slots a micro-step computes: all K, or the lowest alone, where that changes nobody's bytes."""

from contextlib import ExitStack

import torch

from lora_core.banks.bank import Bank
from lora_core.base_checks import fuses_attention
from lora_core.base_model import BaseModel
from lora_core.cohort import Cohort
from lora_core.layers import ONE_SHAPE
from lora_core.products import multiplies_alone


def least_height(base: BaseModel, slots: int) -> int:
    """How many rows a batch has at the least, for each row to have the bits that it has among so many.

    In fp32 on a CPU oneDNN multiplies every row alone, and batched products, attention and norms are computed row by
    row once each thread has one: where there are fewer, MKL and torch split a row among threads, which rounds
    otherwise; so does attention in steps with one row, whose heads are no copies then.  Anywhere else the number of
    rows may choose the kernel, and compiled layers are for one shape.
    """
    if hasattr(base.model, ONE_SHAPE):
        return slots
    sample = torch.empty(2, 1, dtype=base.model.dtype, device=base.model.device)
    alone = multiplies_alone(sample) and torch.backends.mkl.is_available()  # others' kernels nobody has tried
    alone = alone and len({tensor.device for tensor in base.frozen}) == 1
    fewest = max(torch.get_num_threads(), 1 if fuses_attention(base.model) else 2)
    return min(slots, fewest) if alone else slots


class Lowest(ExitStack):
    """A bank, in its base for the lowest slots of a cohort: as many as the last micro-step read."""

    def __init__(self, base: BaseModel, bank: Bank, cohort: Cohort) -> None:
        super().__init__()
        self.base, self.bank, self.cohort = base, bank, cohort
        self._now: Cohort | None = None

    def slots(self, height: int) -> Cohort:
        """So many slots, as a cohort of their own, which the base reads from now on."""
        if self._now is None or self._now.slots != height:
            self.close()
            self._now = self.cohort.lowest(height)
            self.enter_context(self.bank.attached(self.base, self._now))
        return self._now
