"""What a cohort's device did for whom: every second of it is somebody's, shared out by the tokens that were read.

A micro-step is shared among those who read in it, so that rows without a reader, and padding, are paid for by whoever
the device ran for.  Seconds in which nobody reads (loading the base, compiling) go to the next who do.  So a user's
cost is final when it leaves, and the sum over users is what the device was held for: no nanosecond more or less.
"""

import time
from collections.abc import Callable, Iterable, Mapping

NANOSECONDS = 1e9


class Meter:
    """Device time of one cohort by learner, in whole nanoseconds, since it was made.

    One thread spends; others may read what is final.
    """

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.devices = 1  # that are held at once
        self.total = 0  # read off the clock so far
        self.common = 0  # of these, nobody's yet
        self._by_learner: dict[str, int] = {}
        self._tokens: dict[str, int] = {}
        self._clock, self._last = clock, clock()

    def spend(self, read: Mapping[str, int]) -> None:
        """Share out the time since the last look, and what was nobody's, by how many tokens each learner has read."""
        now = self._clock()
        passed, self._last = (now - self._last) * self.devices, now
        self.total += passed
        due, tokens = self.common + passed, sum(read.values())
        for name, count in read.items():
            share = due * count // tokens if tokens else 0  # of what is left: the last takes what rounding left over
            self._by_learner[name] = self._by_learner.get(name, 0) + share
            self._tokens[name] = self._tokens.get(name, 0) + count
            due, tokens = due - share, tokens - count
        self.common = due

    def forget(self, names: Iterable[str]) -> None:
        """Begin with these learners at nothing: a user may come again, with another job."""
        for name in names:
            self._by_learner.pop(name, None)
            self._tokens.pop(name, None)

    def nanoseconds(self, names: Iterable[str]) -> int:
        """What the device did for these learners."""
        return sum(self._by_learner.get(name, 0) for name in names)

    def seconds(self, names: Iterable[str]) -> float:
        """The same in seconds."""
        return self.nanoseconds(names) / NANOSECONDS

    def tokens(self, names: Iterable[str]) -> int:
        """What was read for these learners: lessons, examinations, judging."""
        return sum(self._tokens.get(name, 0) for name in names)
