"""The door of a training: who comes in while others train, who is sent away, and when it closes."""

from collections.abc import Collection, Sequence

from lora_core.learner import Learner


class Door:
    """Asked between two micro-steps.  This one never opens: who is in it at the start is trained to the end."""

    def arrivals(self, places: int) -> Sequence[Learner]:
        """Who comes in now.  So many could sit down at once or in a moment; more have to wait.

        With nobody left in the room this is the last question: an empty answer ends the training.
        """
        return ()

    def dismissed(self) -> Collection[str]:
        """The names of those whose result nobody wants any more."""
        return ()

    @property
    def closing(self) -> bool:
        """Whether to stop now, with everybody's progress saved."""
        return False


SHUT = Door()
