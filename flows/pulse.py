"""What this process is doing, in numbers, for whoever looks: the registry, Prometheus, Prefect's page.

Steps and the training loop write here and go on; a thread tells others every few seconds, and whatever is wrong with
those never reaches the training.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_core.train import Pace

EVERY = 5.0  # seconds between looks at it
WINDOW = 60.0  # seconds over which tokens a second are counted
WEIGHTS = {"train": (0.05, 0.85), "judge": (0.85, 0.95), "publish_all": (0.95, 1.0)}  # of a cohort's way, roughly
LOG = logging.getLogger("lora.pulse")


@dataclass(frozen=True)
class Look:
    """A worker at one moment."""

    phase: str = "idle"  # idle, or the step that it is at
    users: int = 0  # of the cohort
    training: int = 0  # learners in slots
    waiting: int = 0  # for a slot of this cohort
    finished: int = 0
    tokens: int = 0  # read in this cohort
    room: int = 0  # tokens there was room for
    micro_steps: int = 0
    tokens_per_second: float = 0.0
    share: float = 0.0  # of the cohort's way that lies behind it, 0 to 1; less again when others join
    seconds_left: float | None = None  # of training, if nobody stops early

    def facts(self) -> dict[str, Any]:  # numbers and a word, as JSON
        """As the registry keeps it."""
        return asdict(self)


class Pulse:
    """The process's look as it changes.  One thread writes, but for `join`; any may read."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.look = Look()
        self.tokens_total = self.room_total = self.micro_steps_total = 0  # since the process began
        self.moved_at = clock()  # when anything last happened here
        self._users = 0  # of this cohort, so far
        self._clock = clock
        self._began = clock()  # the training
        self._paced: deque[tuple[float, int]] = deque()  # when, and tokens_total by then

    def join(self, users: int) -> None:
        """So many users come to the cohort: at its beginning, or while others train."""
        self._users += users

    def enter(self, phase: str) -> None:
        """Another step begins."""
        self.moved_at = now = self._clock()
        if phase == "train":
            self._began = now
            self._paced.clear()
        share = WEIGHTS[phase][0] if phase in WEIGHTS else 0.0
        self.look = Look(phase, self._users, share=share)

    def rest(self, seconds: float = 0.0) -> None:
        """Nothing to do now, perhaps for so many seconds, and that is well."""
        self.moved_at = self._clock() + seconds
        self.look, self._users = Look(), 0

    def move(self) -> None:
        """Something has happened that is no step."""
        self.moved_at = self._clock()

    def keep(self, pace: "Pace") -> None:
        """A micro-step is over."""
        self.moved_at = now = self._clock()
        before = self.look if self.look.micro_steps < pace.micro_steps else Look()  # a smaller plan begins again
        self.tokens_total += pace.tokens - before.tokens
        self.room_total += pace.room - before.room
        self.micro_steps_total += pace.micro_steps - before.micro_steps
        begin, end = WEIGHTS["train"]
        done = pace.rows / max(1, pace.rows + pace.rows_left)
        self.look = Look(
            "train", self._users, len(pace.training), pace.waiting, pace.finished, pace.tokens, pace.room,
            pace.micro_steps, self._speed(now), begin + (end - begin) * done,
            (now - self._began) * pace.rows_left / max(1, pace.rows),
        )  # fmt: skip

    def idle_for(self) -> float:
        """Seconds since anything happened here, or should have."""
        return max(0.0, self._clock() - self.moved_at)

    def _speed(self, now: float) -> float:
        self._paced.append((now, self.tokens_total))
        while len(self._paced) > 2 and now - self._paced[0][0] > WINDOW:
            self._paced.popleft()
        since, tokens = self._paced[0]
        return (self.tokens_total - tokens) / (now - since) if now > since else 0.0


Listener = Callable[[Look], None]


@contextmanager
def told(pulse: Pulse, listeners: Sequence[Listener], every: float = EVERY) -> Iterator[None]:
    """Tell the listeners what the process does, from a thread, while the block runs and once more at its end."""
    done = threading.Event()

    def beat() -> None:
        while not done.is_set():
            tell_all(listeners, pulse.look)
            done.wait(every)

    # In this thread's context: in a flow run that holds the client of its own server.
    thread = threading.Thread(target=copy_context().run, args=(beat,), name="pulse", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=2 * every)  # one that hangs in a dead connection is left to end with the process
        tell_all(listeners, pulse.look)


def tell_all(listeners: Sequence[Listener], look: Look) -> None:
    """Tell each; one that fails is told about, and changes nothing else."""
    for listener in listeners:
        try:
            listener(look)
        except Exception as error:  # whatever is wrong with who listens, the work goes on
            LOG.debug("not told: %s", error)
