"""Processes that begin together: whoever is measured beside others must not be alone until they have loaded."""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from threading import Barrier

_PATIENCE_SECONDS = 300  # for all of them to have loaded


@contextmanager
def crew(
    size: int, load: Callable[..., object] = dict, given: tuple[object, ...] = ()
) -> Iterator[ProcessPoolExecutor]:
    """So many processes, each of which has called `load` with what is given before the block begins.

    Raises BrokenProcessPool when one of them cannot.
    """
    spawn = get_context("spawn")
    gate = spawn.Barrier(size, timeout=_PATIENCE_SECONDS)
    with ProcessPoolExecutor(size, spawn, _come, (gate, load, given)) as pool:
        list(pool.map(abs, range(size)))  # nobody answers before everybody is there
        yield pool


def _come(gate: Barrier, load: Callable[..., object], given: tuple[object, ...]) -> None:
    load(*given)
    gate.wait()
