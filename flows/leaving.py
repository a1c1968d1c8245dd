"""How a worker goes: asked by a signal, it takes nothing more, finishes what it can, and leaves the rest to others."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

TRAINING_SHARE = 0.5  # of the grace; the rest is for saving, judging and publishing
_LOOK = 0.1  # seconds between looks while idle


class Leave:
    """Whether this process is to go, and until when it may still train.

    Signal handlers call `ask`, so that nothing here waits for a lock.  A `note` is a file that says the same by being
    there, to a process that its supervisor cannot send a signal to.
    """

    def __init__(
        self, grace_seconds: float, clock: Callable[[], float] = time.monotonic, note: Path | None = None
    ) -> None:
        self.grace_seconds, self._clock, self._note = grace_seconds, clock, note
        self._until: float | None = None
        self.hurried = False  # asked again

    def ask(self) -> None:
        """Go, within the grace time; asked again, at once."""
        self.hurried = self._until is not None
        share = 0 if self.hurried else TRAINING_SHARE
        self._until = self._clock() + share * self.grace_seconds

    @property
    def asked(self) -> bool:
        """Whether no more work is to be taken."""
        if self._until is None and self._note and self._note.exists():
            self.ask()
        return self._until is not None

    @property
    def due(self) -> bool:
        """Whether training must stop now, wherever it is."""
        return self.asked and self._clock() >= (self._until or 0)

    def idle(self, seconds: float) -> None:
        """Wait, but no longer than until asked to go."""
        end = self._clock() + seconds
        while not self.asked and (left := end - self._clock()) > 0:
            time.sleep(min(_LOOK, left))


@contextmanager
def on_signals(leave: Leave, tell: Callable[[str], object]) -> Iterator[None]:
    """While inside, SIGTERM and SIGINT ask to leave; Kubernetes, spot machines and Ctrl-C say it this way.

    Where the block does not run in the process's main thread, signals are left as they are.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def heard(number: int, _: FrameType | None) -> None:
        again = leave.asked
        leave.ask()
        name = signal.Signals(number).name
        tell(
            f"{name} again: saving progress and going now" if again
            else f"{name}: nothing more is taken; going within {leave.grace_seconds:g} s (again: at once)"
        )  # fmt: skip

    before = {number: signal.signal(number, heard) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
