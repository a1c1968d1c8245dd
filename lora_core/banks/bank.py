"""What a method is to the engine: a bank of users' rows, and how they become files and come back.

K slots, P numbers a user.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from lora_core.base_model import BaseModel, Site
from lora_core.cohort import Cohort
from lora_core.optim import Stretch

Facts = Mapping[str, object]  # JSON that another module owns
Shapes = Mapping[str, list[int]]  # of tensors, by name

LINE = 32  # numbers: 64 bytes of bf16, 128 of fp32


class Bank(Protocol):
    """The rows of users of one method on one base.  A row of zeros, in a slot of scale 0, is the base itself.

    `spec` is the user's own settings, of the method that the bank is for; the bank may be wider than they ask for.
    """

    @property
    def sites(self) -> tuple[Site, ...]:
        """The modules that are adapted; none where the method leaves the layers' modules alone."""
        ...

    @property
    def width(self) -> int:
        """P: how many numbers a user has; whole lines of them."""
        ...

    @property
    def size(self) -> int:
        """How much of its unit (rank, width, virtual tokens) the method gives to the user who asked for most."""
        ...

    def start_row(self, spec: Any, seed: int) -> Tensor:
        """How a user starts, shape P: a function of the base, the settings and the seed alone."""
        ...

    def stretches(self, spec: Any) -> Sequence[Stretch]:
        """The whole row in stretches that each have a rate of their own; none where all has the recipe's."""
        ...

    def to_tensors(self, row_P: Tensor, spec: Any) -> dict[str, Tensor]:
        """A user's row as named tensors: what the file of weights holds."""
        ...

    def from_tensors(self, tensors: Mapping[str, Tensor], spec: Any) -> Tensor:
        """The row, shape P, that such tensors describe."""
        ...

    def parameters(self, spec: Any) -> int:
        """How many numbers of a user's row are trained."""
        ...

    def attached(self, base: BaseModel, cohort: Cohort) -> AbstractContextManager[None]:
        """While inside, the base's forward pass reads row k of every batch under slot k's row.

        Gradients are added to the cohort's gradient matrix.
        """
        ...


def whole_lines(numbers: int) -> int:
    """So many numbers, and zeros behind them that nobody reads, to the end of a cache line.

    What is that long begins at a whole line in every row: MKL's products round by how their operands are aligned, and a
    user's bytes must not depend on the slot.
    """
    return -(-numbers // LINE) * LINE


PEFT_USAGE = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(base, "path/of/this/folder")"""


@dataclass(frozen=True)
class Method:
    """A method's row in the table: its bank, and its files."""

    peft_type: str  # as adapter_config.json says it
    make: Callable[[BaseModel, Sequence[Any], int], Bank]  # for users of these settings, at least of this size
    config: Callable[[BaseModel, Any, Mapping[str, Tensor]], Facts]  # adapter_config.json, but what all have in common
    read_config: Callable[[Facts], Any]  # the settings that a file gives; raises ArtifactRefused
    layout: Callable[[BaseModel, Any], Sequence[Shapes]]  # tensors that a file may hold, in groups: all of one or none
    sentence: Callable[[Any, Mapping[str, Tensor]], str]  # what an adapter is, for its card
    library: str = "peft"  # what loads its files
    usage: str = PEFT_USAGE  # how, in Python, for its card; {base} stands for the base's name as a literal
