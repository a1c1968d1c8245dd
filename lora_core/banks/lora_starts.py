"""PiSSA's start (Meng et al., 2024): factors from the principal directions of the frozen weights.

I inputs and O outputs of a site, R a user's rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_core.quantised import QuantisedLinear


@dataclass(frozen=True)
class Principal:
    """The largest singular values of a weight and their vectors: W is about left^T diag(values) right."""

    left_RO: Tensor
    values_R: Tensor
    right_RI: Tensor


class Principals:
    """The principal directions of linears, up to a rank: each weight is decomposed once for all users.

    By a full SVD in fp32 on the CPU, which has no random start as the quick ones have.
    """

    def __init__(self, linears: Mapping[str, nn.Module], most: int) -> None:
        self._linears, self._most = linears, most
        self._found: dict[str, Principal] = {}
        self._lock = Lock()  # starts are drawn by several threads

    def factors(self, name: str, rank: int, scale: float) -> tuple[Tensor, Tensor]:
        """down R I and up R O of a linear: scale times their product is the weight's principal part, as in PEFT."""
        with self._lock:
            if name not in self._found:
                self._found[name] = _principal(_weight(self._linears[name]), self._most)
            found = self._found[name]
        roots_R1 = (found.values_R[:rank, None] / scale).sqrt()
        return roots_R1 * found.right_RI[:rank], roots_R1 * found.left_RO[:rank]


def _principal(weight_OI: Tensor, rank: int) -> Principal:
    left_OR, values_R, right_RI = torch.linalg.svd(weight_OI, full_matrices=False)
    return Principal(left_OR[:, :rank].mT.clone(), values_R[:rank].clone(), right_RI[:rank].clone())


def _weight(linear: nn.Module) -> Tensor:
    if isinstance(linear, QuantisedLinear):
        return linear.unpacked(torch.float32).cpu()
    weight: Tensor = linear.weight  # type: ignore[assignment]  # nn.Module types its attributes loosely
    return (weight.mT if isinstance(linear, Conv1D) else weight).detach().float().cpu()
