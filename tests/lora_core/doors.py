"""Doors that open at given micro-steps."""

from collections.abc import Collection, Sequence

from lora_core.door import Door
from lora_core.learner import Learner


class OneByOne(Door):
    """One learner comes in after each micro-step, the first after so many; it may close, or send some away."""

    def __init__(
        self, coming: Sequence[Learner] = (), after: int = 0, closes: int | None = None, unwanted: Collection[str] = ()
    ) -> None:
        self.coming, self.after, self.closes, self.unwanted = list(coming), after, closes, unwanted
        self.asked = 0
        self.places: list[int] = []  # as they were told, question by question

    def arrivals(self, places: int) -> Sequence[Learner]:
        """The next one, once it is time."""
        self.asked += 1
        self.places.append(places)
        return [self.coming.pop(0)] if self.coming and self.asked > self.after else ()

    def dismissed(self) -> Collection[str]:
        """Those who are unwanted, from the start."""
        return self.unwanted

    @property
    def closing(self) -> bool:
        """Whether it has been asked often enough."""
        return self.closes is not None and self.asked >= self.closes
