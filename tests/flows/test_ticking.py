"""What a tick asks Prefect for, and what it costs."""

import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun, State, StateType

from flows.factory import now
from flows.ticking import may_begin
from tests.flows.conftest import ROOT


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


def test_a_tick_loads_no_torch_whoever_is_due(base_folder: Path) -> None:
    """A process a minute: with the imports of training it would keep a core busy for a tenth of the time."""
    code = (
        "import sys, flows.ticking; from pathlib import Path; from lora_core import base_files;"
        f"folder = base_files.locate({str(base_folder)!r}); base_files.fingerprint(folder);"
        "assert base_files.count_parameters(folder) > 0;"
        "print([name for name in ('torch', 'transformers', 'scipy') if name in sys.modules])"
    )

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)

    assert done.stdout.strip() == "[]", done.stderr
