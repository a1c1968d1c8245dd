"""The memory law: the peak of a micro-step, in bytes, before the first step and from shapes alone.

The very step that trains is run on tensors without data (torch's fake tensors) while every allocation is counted: no
formula has to keep up with an architecture, a bank or a change of the engine.  K slots, P numbers a user.
"""

import weakref
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_core.banks.bank import Bank
from lora_core.base_model import BaseModel
from lora_core.cohort import Cohort
from lora_core.data.packing import pack
from lora_core.data.rendering import Rendered
from lora_core.layers import checkpointed
from lora_core.learner import Lesson
from lora_core.micro_step import backward_rows
from lora_core.optim import RowStep, gradient_norms, step_rows
from lora_core.recipe import Recipe

BLOCKS = {"cuda": 512, "cpu": 64}  # bytes an allocation is rounded up to: c10's CUDACachingAllocator and CPUAllocator


def predict(
    base: BaseModel,
    bank: Bank,
    slots: int,
    row_tokens: int,
    drops: bool = True,
    layers_forget: bool = False,
    lends: bool = True,
) -> int:
    """Peak bytes on the base's device while K slots of T tokens train: base, cohort, micro-step, libraries' workspaces.

    `drops`: whether any user drops inputs; `layers_forget`: whether layers are checkpointed; `lends`: whether one may
    learn in others' slots while those wait to be examined, whose rows are copied aside where they are in fp32.
    """
    device = base.model.device
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, checkpointed(base, layers_forget):
        frozen = [fake.from_tensor(tensor) for tensor in base.frozen]
        live = LiveBytes(device)
        live.meet(frozen)
        with live:
            _train_once(base, bank, slots, row_tokens, drops, lends)
    return live.peak + workspace_bytes(device, base.model.dtype)


def _train_once(base: BaseModel, bank: Bank, slots: int, row_tokens: int, drops: bool, lends: bool) -> None:
    """A cohort from its making to its first optimiser step, all rows one full document; one user's, if that may be."""
    cohort = Cohort(slots, bank.width, base.model.device, base.model.dtype)
    (row,) = pack([(0, Rendered((0,) * row_tokens, (True,) * row_tokens))], row_tokens)
    lesson = Lesson(row, weight=1.0, dropout=0.5 if drops else 0.0, key=0)
    with bank.attached(base, cohort):
        for lane in range(1, slots if lends else 1):
            cohort.borrow(0, lane)
        backward_rows(base, cohort, [lesson] * slots, row_tokens)
        cohort.give_back()
        gradient_norms(cohort)
        due: list[RowStep | None] = [RowStep(1, 0.0, Recipe())]  # row by row: one costs as much memory as all
        step_rows(cohort, due + [None] * (slots - 1), [1.0] * slots)


class LiveBytes(TorchDispatchMode):
    """Counts the storages that are alive on a device while operators run, in forward and backward; keeps the peak.

    A kernel's own scratch memory, which no operator returns, is not seen.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.now = self.peak = 0
        self._kind, self._block = device.type, BLOCKS.get(device.type, 512)
        self._known: set[int] = set()  # addresses of the storages that are alive

    def meet(self, tensors: object) -> None:
        """Count the tensors of a nest of them, each storage once and until it is freed."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor) and tensor.device.type == self._kind:
                self._count(tensor.untyped_storage())

    def _count(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address in self._known:
            return
        size = -(-storage.nbytes() // self._block) * self._block
        self._known.add(address)
        weakref.finalize(storage, self._forget, address, size).atexit = False
        self.now += size
        self.peak = max(self.peak, self.now)

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # torch's protocol
        """Run an operator and count what it returns."""
        result = func(*args, **(kwargs or {}))
        self.meet(result)
        return result


@cache
def workspace_bytes(device: torch.device, dtype: torch.dtype) -> int:
    """What matrix libraries keep for good on a GPU: a workspace for the forward's thread, one for the backward's.

    Tried on tiny matrices, for it varies with the card and with CUBLAS_WORKSPACE_CONFIG; 0 on a CPU.
    """
    if device.type != "cuda":
        return 0
    torch._C._cuda_clearCublasWorkspaces()
    before = torch.cuda.memory_allocated(device)
    _multiply(device, dtype)
    torch.cuda.synchronize(device)
    return torch.cuda.memory_allocated(device) - before


def _multiply(device: torch.device, dtype: torch.dtype) -> None:
    """Every kind of product that the engine computes, in the forward's thread and in the backward's."""
    square = torch.ones(64, 64, device=device, dtype=dtype, requires_grad=True)
    _Products.apply(square).sum().backward()  # type: ignore[no-untyped-call]  # torch's


class _Products(torch.autograd.Function):
    """The same products in both directions."""

    @staticmethod
    def forward(ctx: Any, square: Tensor) -> Tensor:  # torch's context object
        return _products(square)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # torch's context object
        return _products(gradient.contiguous())


def _products(square: Tensor) -> Tensor:
    product = torch.addmm(square[0], square, square @ square).addmm_(square, square)
    return torch.bmm(product[None], product[None]).baddbmm_(product[None], product[None])[0]
