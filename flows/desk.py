"""What happens between two micro-steps of a cohort: who is done goes on to be judged, who has come is let in."""

from collections.abc import Callable, Collection, Sequence

from flows.candidates import Candidate
from flows.entrance import Entrance, Newcomer
from flows.leaving import Leave
from flows.outgoing import Outgoing
from registry.jobs import ClaimedJob


class Desk:
    """The cohort's door, as `flows.guests.Guests` has it.  `enter` writes newcomers into the cohort."""

    def __init__(
        self,
        outgoing: Outgoing,
        entrance: Entrance | None,
        leave: Leave,
        enter: Callable[[Sequence[Newcomer]], None],
        lost: Callable[[], Collection[str]],
        training: int,
    ) -> None:
        self.outgoing, self.entrance, self.leave = outgoing, entrance, leave
        self._enter, self._lost = enter, lost
        self.training = training  # how many are

    def arrivals(self, places: int) -> Sequence[Candidate]:
        """Who has come.  With nobody in training, whoever is done is judged while newcomers are looked for."""
        empty = not self.training
        if self.entrance:
            self.entrance.look(places, empty)
        self.outgoing.tend(at_once=empty and bool(self.entrance and self.entrance.expecting))
        came = self.entrance.collect(wait=empty) if self.entrance else ()
        self._enter(came)
        self.training += len(came)
        return [candidate for _, candidate in came]

    def dismissed(self) -> Collection[str]:
        """Whose job somebody else has by now."""
        return self._lost()

    @property
    def closing(self) -> bool:
        """Whether the time to train is over."""
        return self.leave.due

    def left(self) -> None:
        """Somebody is no longer in training."""
        self.training -= 1

    def done(self, job: ClaimedJob, candidate: Candidate) -> None:
        """Send somebody on who is trained."""
        self.outgoing.add(job, candidate)
