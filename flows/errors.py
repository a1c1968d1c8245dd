"""What can go wrong between the registry and the training core.

FlowError
├── Unready             a command needs something that is not set up or not installed
├── FieldRefused        one field of what somebody wrote down cannot be followed
├── HomeAway            this machine's home does not take or give what a job needs
└── OrchestratorAway    Prefect's server cannot be reached from within a run
"""


class FlowError(Exception):
    """Everything the flows raise on purpose."""


class Unready(FlowError):
    """Something is not set up: what, and what to do."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what, fix)

    def __str__(self) -> str:
        return "{}; {}".format(*self.args)


class HomeAway(FlowError):
    """The home of a worker does not take or give what a job needs: full, broken, or not to be written to."""

    def __init__(self, home: str, worker: str, why: str) -> None:
        super().__init__(home, worker, why)

    def __str__(self) -> str:
        return "{} of worker {} cannot be used ({}); make room there, or check its rights".format(*self.args)


class OrchestratorAway(FlowError):
    """Prefect's server failed a run: nobody's job is to blame."""

    def __init__(self, step: str, why: str) -> None:
        super().__init__(step, why)

    def __str__(self) -> str:
        return "{}: Prefect's server could not be told ({}); the jobs wait for the next run".format(*self.args)


class FieldRefused(FlowError):
    """One field of what somebody wrote down cannot be followed: which, why, and what to do."""

    def __init__(self, field: str, why: str, fix: str) -> None:
        super().__init__(field, why, fix)

    def __str__(self) -> str:
        return "{}: {}; {}".format(*self.args)
