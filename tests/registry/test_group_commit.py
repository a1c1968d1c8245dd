"""Who comes while others are at work goes along with the next; nobody waits for company, nobody is left behind."""

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from registry.group_commit import GroupCommit

MOST = 4


class Work:
    """Squares numbers, the first time not before it is told to; remembers who went together."""

    def __init__(self) -> None:
        self.may_go, self.at_work = threading.Event(), threading.Event()
        self.together = list[list[int]]()

    def __call__(self, given: Sequence[int]) -> list[int]:
        """Once it may."""
        self.together.append(list(given))
        self.at_work.set()
        assert self.may_go.wait(30)
        if any(number < 0 for number in given):
            raise ArithmeticError(given)
        return [number * number for number in given]


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    """Enough for everybody."""
    with ThreadPoolExecutor(16) as pool:
        yield pool


def in_line(group: GroupCommit[int, int], work: Work, threads: ThreadPoolExecutor, *given: int) -> list[Future[int]]:
    """One at work, who is waited for, and the others in line in that order."""
    asked = list[Future[int]]()
    for number, one in enumerate(given):
        asked.append(threads.submit(group.join, one, work))
        assert work.at_work.wait(30)
        while len(group._line) < number:
            time.sleep(0.001)
    return asked


def test_who_comes_alone_goes_at_once() -> None:
    """A lone publisher is no slower for there being a line."""
    group, work = GroupCommit[int, int](MOST), Work()
    work.may_go.set()

    assert [group.join(number, work) for number in (3, 4)] == [9, 16]
    assert work.together == [[3], [4]]


def test_who_comes_meanwhile_goes_together_in_order_and_up_to_a_bound(threads: ThreadPoolExecutor) -> None:
    """Each gets its own answer."""
    group, work = GroupCommit[int, int](MOST), Work()
    asked = in_line(group, work, threads, *range(10))
    work.may_go.set()

    assert [one.result(30) for one in asked] == [number * number for number in range(10)]
    assert work.together == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9]]


def test_a_failure_is_told_to_those_who_went_along_and_to_nobody_else(threads: ThreadPoolExecutor) -> None:
    """The line goes on, and is empty in the end."""
    group, work = GroupCommit[int, int](MOST), Work()
    asked = in_line(group, work, threads, 0, 1, 2, -3, 4, 5)
    work.may_go.set()

    told = [one.exception(30) for one in asked]

    assert [type(one) for one in told] == [type(None), *[ArithmeticError] * 4, type(None)]
    assert group.join(6, work) == 36


@pytest.mark.parametrize("told", [False, True], ids=["while it waits", "at its turn"])
def test_who_is_interrupted_in_line_keeps_nobody_waiting(
    threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    """Ctrl-C in a process that goes on publishing: whoever comes later is not behind one who is gone."""
    group, work = GroupCommit[int, int](MOST), Work()

    class Interrupted(Future[object]):
        """The first to wait is interrupted: before it is told anything, or just then."""

        def result(self, timeout: float | None = None) -> object:
            if told:
                work.may_go.set()
                super().result(30)
            raise KeyboardInterrupt

    (first,) = in_line(group, work, threads, 1)
    monkeypatch.setattr("registry.group_commit.Future", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        group.join(2, work)
    monkeypatch.undo()
    work.may_go.set()

    assert first.result(30) == 1
    assert threads.submit(group.join, 3, work).result(5) == 9
    assert 2 not in [number for together in work.together for number in together]
