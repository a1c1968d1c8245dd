"""What can go wrong between the registry and the training core.

FlowError
├── Unready             a command needs something that is not set up or not installed
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


class OrchestratorAway(FlowError):
    """Prefect's server failed a run: nobody's job is to blame."""

    def __init__(self, step: str, why: str) -> None:
        super().__init__(step, why)

    def __str__(self) -> str:
        return "{}: Prefect's server could not be told ({}); the jobs wait for the next run".format(*self.args)
