"""What a base takes in so many bits: whether it may be loaded into a stated budget at all, and which bits would fit.

Nothing is loaded: shapes are enough.  What a whole pack takes is in `memory.py`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from lora_core.base_model import BaseModel, linears_of, widths
from lora_core.errors import MemoryTooSmall

# Bytes a packed weight: bitsandbytes' int8; NF4 with a byte of scale for 64 numbers, and four for 256 of those.
PACKED = {"8bit": 1.0, "4bit": 0.5 + 1 / 64 + 4 / (64 * 256)}
ROW_SCALE = {"8bit": 4, "4bit": 0}  # bytes


@dataclass(frozen=True)
class Weights:
    """A base's numbers: how many there are, how many of them lie in linears that can be packed, and bytes of one."""

    parameters: int
    linears: tuple[tuple[int, int], ...]  # inputs and outputs of each
    width: int  # bytes a number where it is not packed

    @classmethod
    def of(cls, base: BaseModel, width: int | None = None) -> "Weights":
        """Those of a base, however it is kept; in its own width unless another is asked for."""
        linears = tuple(widths(linear) for linear in linears_of(base.model).values())
        return cls(base.parameters, linears, width or base.model.dtype.itemsize)

    def bytes(self, quantise: str = "") -> int:
        """About what they take: in few bits, the widest linear is a plain matrix while it is multiplied."""
        if not quantise:
            return self.parameters * self.width
        sizes = [inputs * outputs for inputs, outputs in self.linears]
        scales = sum(ROW_SCALE[quantise] * outputs for _, outputs in self.linears)
        plain = self.parameters - sum(sizes) + max(sizes)
        return plain * self.width + round(sum(sizes) * PACKED[quantise]) + scales


def fewer_bits(weights: Weights, quantised: str, needed: int) -> tuple[tuple[str, int], ...]:
    """What would be needed in place of `needed` bytes, were the base kept in fewer bits than it is."""
    choices: Iterable[str] = {"": ("8bit", "4bit"), "8bit": ("4bit",)}.get(quantised, ())
    return tuple((bits, needed - weights.bytes(quantised) + weights.bytes(bits)) for bits in choices)


def check_base_fits(weights: Weights, quantised: str, budget_bytes: int) -> None:
    """Whether a base may be loaded at all, told before it is.  Raises MemoryTooSmall."""
    needed = weights.bytes(quantised)
    if needed > budget_bytes:
        raise MemoryTooSmall(needed, budget_bytes, 0, fewer_bits(weights, quantised, needed))
