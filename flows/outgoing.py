"""Users of a cohort who are done while others still train: judged a few at a time, published together by a thread."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait

from flows.candidates import Candidate
from flows.side_threads import side_threads
from registry.errors import RegistryError
from registry.jobs import ClaimedJob

PATIENCE_SECONDS = 15.0  # how long one who is done waits for others: rows that nobody fills are computed all the same
AWAY_SECONDS, MOST_AWAY_SECONDS = 10.0, 300.0  # until those are tried again who could not be published; each time twice
PUBLISHERS = 2  # threads: publishing is waiting for a store and a database
Done = tuple[ClaimedJob, Candidate]


class Outgoing:
    """Where users go who are done.  `judge` takes a batch of rows of them at once, then `publish`, called by a thread.

    Whoever cannot be published now, with the store or the database away, is tried again while others train: `publish`
    is called with the same users once more, and at the cohort's end whoever is left is somebody else's to publish.
    """

    def __init__(
        self, judge: Callable[[Sequence[Candidate]], None], publish: Callable[[Sequence[Done]], None], batch: int
    ) -> None:
        self._judge, self._publish, self._batch = judge, publish, batch
        self._threads = side_threads(PUBLISHERS, "publish")
        self._done: list[Done] = []
        self._oldest = 0.0  # when the first of them was done
        self._under_way: list[Future[Sequence[Done]]] = []
        self._left: list[Sequence[Done]] = []  # batches of whom some could not be published
        self._away_seconds, self._again_at = AWAY_SECONDS, 0.0

    def add(self, job: ClaimedJob, candidate: Candidate) -> None:
        """Somebody is done."""
        if not self._done:
            self._oldest = time.monotonic()
        self._done.append((job, candidate))

    def tend(self, at_once: bool = False) -> None:
        """Judge and send on who waits, once they are enough or one has waited long enough.

        Raises whatever a publisher raised that is not the store's or the database's trouble.
        """
        if self._done and (at_once or self._rows >= self._batch or self._waited >= PATIENCE_SECONDS):
            ready, self._done = self._done, []
            self._judge([candidate for _, candidate in ready])
            self._send(ready)
        finished = [future for future in self._under_way if future.done()]
        self._under_way = [future for future in self._under_way if not future.done()]
        for future in finished:
            self._hear(future.result())
        if self._left and time.monotonic() >= self._again_at:
            self._send(self._left.pop(0))

    @property
    def _rows(self) -> int:
        """What judging takes at least: a row for each rival, the candidate itself among them."""
        return sum(3 if candidate.live else 2 for _, candidate in self._done)

    @property
    def _waited(self) -> float:
        return time.monotonic() - self._oldest

    def close(self) -> None:
        """Wait for the publishers."""
        self._threads.shutdown()
        wait(self._under_way)
        for future in self._under_way:
            future.result()

    def _hear(self, left: Sequence[Done]) -> None:
        """Who of a batch could not be published.  Several that fail while the next try is awaited put it off once."""
        now = time.monotonic()
        if not left:
            self._away_seconds, self._again_at = AWAY_SECONDS, min(self._again_at, now + AWAY_SECONDS)
            return
        self._left.append(left)
        if now >= self._again_at:
            self._again_at = now + self._away_seconds
            self._away_seconds = min(2 * self._away_seconds, MOST_AWAY_SECONDS)

    def _send(self, done: Sequence[Done]) -> None:
        self._under_way.append(self._threads.submit(self._try_to_publish, done))

    def _try_to_publish(self, done: Sequence[Done]) -> Sequence[Done]:
        """The same users, where not all of them are published; nobody where they are."""
        try:
            self._publish(done)
        except RegistryError:
            return done
        return ()
