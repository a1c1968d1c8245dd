"""Threads that work beside training and do not slow it down."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch


def side_threads(most: int, name: str) -> ThreadPoolExecutor:
    """Threads that compute on one core each.

    A second team of OpenMP threads in the process, even an idle one, makes them more than the cores: libgomp then puts
    the training thread's to sleep after each operation instead of letting them spin for the next.
    """
    return ThreadPoolExecutor(most, name, initializer=partial(torch.set_num_threads, 1))
