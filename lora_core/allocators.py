"""How memory is asked of the system and given back: CUDA's segments and the C library's heap."""

import ctypes
import gc
import sys

import torch

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt(3)
KEPT, LARGEST_KEPT = 1 << 28, 1 << 25  # bytes: free ones that stay with the process, and a block among them


def tighten(device: torch.device) -> None:
    """Have the allocator of a device suit training, whose every step asks for the same blocks again.

    CUDA's grows its segments in place: otherwise a block of over a megabyte may be up to a megabyte larger than what
    was asked for.  On a CPU glibc keeps what is freed: otherwise it returns larger blocks each time, and the kernel
    clears their pages again at the next step.
    """
    if device.type == "cuda":
        renamed = getattr(torch._C, "_accelerator_setAllocatorSettings", None)  # where torch warns of the older name
        (renamed or torch.cuda.memory._set_allocator_settings)("expandable_segments:True")
    elif device.type == "cpu" and sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "mallopt"):  # musl has none
            library.mallopt(MMAP_THRESHOLD, LARGEST_KEPT)
            library.mallopt(TRIM_THRESHOLD, KEPT)


def release(device: torch.device) -> None:
    """Free what nobody reaches any more: a cohort hangs in circles of its seats until Python looks for those."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
