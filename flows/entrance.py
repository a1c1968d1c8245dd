"""Newcomers of a cohort that is training: claimed and prepared by a thread, so that no step waits for them."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from flows.candidates import Candidate
from flows.leaving import Leave
from flows.side_threads import side_threads
from registry.errors import RegistryError
from registry.jobs import ClaimedJob

LOOK_SECONDS = 1.0  # between looks for newcomers where nobody came, or only a few could
AWAY_SECONDS = 10.0  # the same after the database or the store was away
Newcomer = tuple[ClaimedJob, Candidate]


class Entrance:
    """Asked between micro-steps, it answers at once with who is ready.

    `fetch` claims and prepares at most so many: an empty answer says that nobody waits.  It is called by one thread.
    """

    def __init__(
        self, fetch: Callable[[int], Sequence[Newcomer]], leave: Leave, slots: int, open_seconds: float
    ) -> None:
        self._fetch, self._leave, self._many = fetch, leave, max(1, slots // 4)
        self._thread = side_threads(1, "entrance")
        self._coming: Future[Sequence[Newcomer]] | None = None
        self._until = time.monotonic() + open_seconds
        self._asked_for, self._more_wait = 0, False
        self._next_look = 0.0

    @property
    def expecting(self) -> bool:
        """Whether somebody may be on the way."""
        return self._coming is not None

    def look(self, places: int, empty: bool) -> None:
        """Look for newcomers if it is time, where so many places are free or about to be; `empty`: nobody trains."""
        if self._coming is None and self._wants(places, empty):
            self._asked_for, self._coming = places, self._thread.submit(self._fetch, places)

    def collect(self, wait: bool) -> Sequence[Newcomer]:
        """Who has come."""
        if self._coming is None or not (wait or self._coming.done()):
            return ()
        coming, self._coming = self._coming, None
        try:
            came = coming.result()
        except RegistryError:  # those who train go on; what was claimed has been put back
            self._next_look, self._more_wait = time.monotonic() + AWAY_SECONDS, False
            return ()
        self._next_look, self._more_wait = time.monotonic() + LOOK_SECONDS, len(came) >= self._asked_for
        return came

    def close(self) -> Sequence[Newcomer]:
        """Let nobody else in; whoever was on the way."""
        self._thread.shutdown(cancel_futures=True)
        coming, self._coming = self._coming, None
        done = coming and coming.done() and not coming.cancelled() and not coming.exception()
        return coming.result() if coming and done else ()

    def _wants(self, places: int, empty: bool) -> bool:
        """A few places are filled once a second, many at once as long as more wait."""
        now = time.monotonic()
        if self._leave.asked or now >= self._until or not places:
            return False
        return empty or now >= self._next_look or (self._more_wait and places >= self._many)
