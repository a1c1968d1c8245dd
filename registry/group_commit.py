"""Group commit: threads that want the same done at the same time have it done for all of them in one go.

As databases do with their logs.  Whoever comes while nobody is at work goes at once, alone; who comes meanwhile waits
in line, and then the first of the line takes all who stand there along, up to a bound.  Nobody waits for company.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar, cast

Given = TypeVar("Given")
Got = TypeVar("Got")

_LEAD = object()  # what the first in line is told: it is your turn


class GroupCommit(Generic[Given, Got]):
    """One line.  `act` is given what some want and returns what each gets, in the same order."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._line: deque[tuple[Given, Future[object]]] = deque()
        self._led = False

    def join(self, given: Given, act: Callable[[Sequence[Given]], Sequence[Got]]) -> Got:
        """What one gets.  Raises what `act` raised, as for everybody who went along."""
        mine: Future[object] = Future()
        with self._lock:
            self._line.append((given, mine))
            leads, self._led = not self._led, True
        got = _LEAD if leads else self._wait(mine)
        return self._lead(act) if got is _LEAD else cast(Got, got)

    def _wait(self, mine: Future[object]) -> object:
        """What one is told.  Whoever is interrupted leaves the line; if it was their turn, it is the next one's."""
        try:
            return mine.result()
        except BaseException:
            with self._lock:
                stood = len(self._line)
                self._line = deque(place for place in self._line if place[1] is not mine)
                leads = len(self._line) < stood and mine.done()
            if leads:
                self._pass_on()
            raise

    def _lead(self, act: Callable[[Sequence[Given]], Sequence[Got]]) -> Got:
        """Do it for those who stand in line, oneself the first; then the turn is the next one's."""
        with self._lock:
            some = [self._line.popleft() for _ in range(min(self._most, len(self._line)))]
        _, *others = [place for _, place in some]
        try:
            mine, *rest = act([given for given, _ in some])
        except BaseException as error:  # an interrupt too: else they would wait for ever
            for place in others:
                place.set_exception(error)
            raise
        else:
            for place, got in zip(others, rest, strict=True):
                place.set_result(got)
            return mine
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        with self._lock:
            self._led = bool(self._line)
            if self._line:
                _, first = self._line[0]
                first.set_result(_LEAD)
