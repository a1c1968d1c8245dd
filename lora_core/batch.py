"""Packed rows as tensors: what a model reads in one forward pass.  K slots, T tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lora_core.data.packing import Row


@dataclass(frozen=True)
class Batch:
    """K rows as tensors on the base's device.  `mask_K1TT` is added to attention: 0 where a token may look."""

    tokens_KT: Tensor
    targets_KT: Tensor
    positions_KT: Tensor
    documents_KT: Tensor
    mask_K1TT: Tensor

    @property
    def inputs(self) -> dict[str, Any]:  # tensors and a flag, as transformers' models take them
        """What a model reads of it."""
        return {
            "input_ids": self.tokens_KT,
            "attention_mask": self.mask_K1TT,
            "position_ids": self.positions_KT,
            "use_cache": False,
        }


def fields_of(rows: Sequence[Row], device: torch.device) -> Tensor:
    """K rows' tokens, targets, positions and documents, 4 K T."""
    fields = [getattr(row, name) for name in ("tokens", "targets", "positions", "documents") for row in rows]
    fields_4KT = torch.frombuffer(bytearray().join(fields), dtype=torch.int64).view(4, len(rows), -1)
    return fields_4KT.to(device, copy=True)


def as_batch(fields_4KT: Tensor, dtype: torch.dtype) -> Batch:
    """As one batch; a token sees its own document's earlier tokens and nothing else."""
    tokens_KT, targets_KT, positions_KT, documents_KT = fields_4KT.unbind()
    together_KTT = documents_KT[:, :, None] == documents_KT[:, None, :]
    # The mask is always given, even where plain causal attention would do: the kernel that runs, and so every
    # bit of a row, must not depend on how the neighbours' rows are packed.
    hidden_K1TT = ~together_KTT.tril()[:, None]
    mask_K1TT = torch.zeros(hidden_K1TT.shape, dtype=dtype, device=fields_4KT.device)
    mask_K1TT.masked_fill_(hidden_K1TT, torch.finfo(dtype).min)  # added, not boolean: eager attention adds it
    return Batch(tokens_KT, targets_KT, positions_KT, documents_KT, mask_K1TT)


def stack(rows: Sequence[Row], model: PreTrainedModel) -> Batch:
    """K rows as one batch, on the base's device."""
    return as_batch(fields_of(rows, model.device), model.dtype)
