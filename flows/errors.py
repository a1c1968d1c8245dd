"""What can go wrong between the registry and the training core.

FlowError
└── Unready    a command needs something that is not set up or not installed
"""


class FlowError(Exception):
    """Everything the flows raise on purpose."""


class Unready(FlowError):
    """Something is not set up: what, and what to do."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what, fix)

    def __str__(self) -> str:
        return "{}; {}".format(*self.args)
