"""Packed rows as tensors: what a model reads in one forward pass.  K slots, T tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_core.data.packing import Row, filled

Windows = int | Mapping[str, int | None] | None  # how many tokens back layers look, all or by kind; None: to the start
Masks = Tensor | Mapping[str, Tensor]  # K 1 T S, added to attention: 0 where a token may look; of all layers or by kind


@dataclass(frozen=True)
class Batch:
    """K rows as tensors on the base's device."""

    tokens_KT: Tensor
    targets_KT: Tensor
    positions_KT: Tensor
    documents_KT: Tensor
    masks: Masks
    counted: int  # how many predictions count, at most

    @property
    def inputs(self) -> dict[str, Any]:  # tensors and a flag, as transformers' models take them
        """What a model reads of it."""
        return {
            "input_ids": self.tokens_KT,
            "attention_mask": self.masks,
            "position_ids": self.positions_KT,
            "use_cache": False,
        }


def fields_of(rows: Sequence[Row], device: torch.device, grain: int = 1) -> Tensor:
    """K rows' tokens, targets, positions and documents, 4 K T; T is filled up to a multiple of the grain."""
    rows = [filled(row, -len(row.tokens) % grain) for row in rows]
    fields = [getattr(row, name) for name in ("tokens", "targets", "positions", "documents") for row in rows]
    fields_4KT = torch.frombuffer(bytearray().join(fields), dtype=torch.int64).view(4, len(rows), -1)
    return fields_4KT.to(device, copy=True)


def as_batch(fields_4KT: Tensor, dtype: torch.dtype, windows: Windows, counted: int | None = None) -> Batch:
    """As one batch; a token sees its own document's earlier tokens, as far back as a layer looks, and nothing else.

    `counted`: how many predictions count, which a GPU is not asked; None: all may.
    """
    tokens_KT, targets_KT, positions_KT, documents_KT = fields_4KT.unbind()
    seen_KTT = (documents_KT[:, :, None] == documents_KT[:, None, :]).tril()
    # The mask is always given, even where plain causal attention would do: the kernel that runs, and so every
    # bit of a row, must not depend on how the neighbours' rows are packed.
    masks: Masks
    if isinstance(windows, Mapping):
        masks = {kind: _mask(seen_KTT, window, dtype) for kind, window in windows.items()}
    else:
        masks = _mask(seen_KTT, windows, dtype)
    counted = tokens_KT.numel() if counted is None else counted
    return Batch(tokens_KT, targets_KT, positions_KT, documents_KT, masks, counted)


def _mask(seen_KTT: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """What is added to attention, K 1 T T; a window counts the token that looks."""
    hidden_K1TT = ~(seen_KTT if window is None else seen_KTT.triu(1 - window))[:, None]
    mask_K1TT = torch.zeros(hidden_K1TT.shape, dtype=dtype, device=seen_KTT.device)
    return mask_K1TT.masked_fill_(hidden_K1TT, torch.finfo(dtype).min)  # added, not boolean: eager attention adds it
