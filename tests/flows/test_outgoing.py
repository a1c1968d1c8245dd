"""Users who are done, and a store that is away: who is tried again, and when."""

from collections.abc import Sequence
from concurrent.futures import wait
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flows import outgoing
from flows.outgoing import AWAY_SECONDS, Done, Outgoing
from flows.side_threads import side_threads
from registry.errors import StoreError


class Store:
    """Takes batches by their first user's name, or is away."""

    def __init__(self) -> None:
        self.away, self.asked = True, list[Any]()

    def publish(self, done: Sequence[Done]) -> None:
        """As `publish_some` does."""
        self.asked.append(done[0][0])
        if self.away:
            raise StoreError("store", "is away", "wait")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that users on their way out see."""
    now = [1000.0]
    monkeypatch.setattr(outgoing, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def tend(out: Outgoing) -> None:
    """Send whoever is to be sent, and hear what became of them."""
    out.tend(at_once=True)
    wait(out._under_way)
    out.tend()


def test_many_who_fail_in_one_outage_put_the_next_try_off_once(clock: list[float]) -> None:
    """Each once would be minutes after five: the store is back long before."""
    store = Store()
    out = Outgoing(lambda _: None, store.publish, batch=1)
    for user in range(5):
        out.add(user, SimpleNamespace(live=None))  # type: ignore[arg-type]  # nothing else of them is looked at
        tend(out)
    assert store.asked == [0, 1, 2, 3, 4]

    store.away, clock[0] = False, clock[0] + AWAY_SECONDS
    for _ in range(5):
        tend(out)

    assert store.asked[5:] == [0, 1, 2, 3, 4]
    out.close()


def test_who_fails_again_is_tried_less_and_less_often(clock: list[float]) -> None:
    """Ten seconds after the first failure, twenty after the second."""
    store = Store()
    out = Outgoing(lambda _: None, store.publish, batch=1)
    out.add(0, SimpleNamespace(live=None))  # type: ignore[arg-type]  # as above
    tried = []
    for second in range(100):
        before = len(store.asked)
        tend(out)
        tried += [second] * (len(store.asked) - before)
        clock[0] += 1

    assert tried == [0, 10, 30, 70]
    out.close()


def test_side_threads_compute_on_one_core_and_leave_the_others_theirs() -> None:
    """However many torch has in the thread that trains."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with side_threads(2, "test") as threads:
            assert threads.submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
