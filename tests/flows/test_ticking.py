"""What a tick asks Prefect for, what it costs, and that the clock goes on whatever happens to one."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun, State, StateType

from flows.clock import Ticks, keep_time
from flows.factory import Factory, now
from flows.settings import FactorySettings
from flows.ticking import may_begin
from tests.flows.conftest import LORA, ROOT


@pytest.mark.parametrize(
    ("state", "minutes", "counts"),
    [
        (StateType.SCHEDULED, 600, True),  # every worker has been busy for long
        (StateType.PENDING, 0, True),
        (StateType.PENDING, 10, False),
    ],
)
def test_a_run_whose_worker_died_before_it_began_does_not_count(state: StateType, minutes: int, counts: bool) -> None:
    """It stays pending for ever: a few of those, and no tick would ask for a run again."""
    since = now() - timedelta(minutes=minutes)
    run = FlowRun(flow_id=uuid4(), state=State(type=state, timestamp=since), state_type=state)

    assert may_begin(run) == counts


def test_neither_a_tick_nor_a_run_that_finds_nobody_loads_torch(base_folder: Path, tmp_path: Path) -> None:
    """Half a gigabyte of libraries would lie in the clock for nothing, and seconds pass where others came first."""
    code = (
        "import sys, flows.adapt, flows.clock, flows.ticking; from flows.factory import Factory;"
        "Factory.from_environment().set_up(); assert flows.adapt.adapt_cohort.fn() == {};"
        "from pathlib import Path; from lora_core import base_files;"
        f"folder = base_files.locate({str(base_folder)!r}); base_files.fingerprint(folder);"
        "assert base_files.count_parameters(folder) > 0;"
        "print([name for name in ('torch', 'transformers', 'scipy') if name in sys.modules])"
    )

    environment = {**os.environ, "LORA_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )

    assert done.stdout.strip() == "[]", done.stderr


def test_the_clock_goes_on_after_a_tick_that_failed(tmp_path: Path) -> None:
    """Prefect or the database was away: what is due stays due, and the next tick is another try."""
    factory = Factory(FactorySettings(database_url=f"sqlite:///{tmp_path / 'registry.db'}"))
    ticks, outcomes = Ticks(), iter((ConnectionError("no answer"), None, ValueError("odd"), None, SystemExit()))

    def tick() -> None:
        if error := next(outcomes):
            raise error

    with pytest.raises(SystemExit):
        keep_time(factory, tick, ticks, every=0.01)

    counted = [ticks.registry.get_sample_value("lora_clock_ticks_total", {"result": one}) for one in ("done", "failed")]
    assert counted == [2, 2]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 1, "set PREFECT_API_URL"),
        (["--deployment", "adapt-cohort"], 2, "is no FLOW/NAME"),
        (["--every", "0"], 2, "--every"),
        (["--metrics-port", "99999"], 2, "--metrics-port"),
    ],
)
def test_a_clock_that_cannot_run_says_why(words: list[str], code: int, said: str) -> None:
    """It asks for runs of Prefect's workers: without a server there is nobody to ask."""
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}

    done = subprocess.run(
        [*LORA, "clock", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )

    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr
