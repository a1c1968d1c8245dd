"""The compose file's services as plain processes: a schedule fires, is trained, published, asked for and pulled."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from infra.stack import Stack, running
from tests.flows.conftest import LORA, QUICK, ROOT, write_user

SETTINGS = [word for one in QUICK for word in ("--set", one)]

pytestmark = [
    pytest.mark.long,
    pytest.mark.xdist_group("stack"),  # one stack, in one process
    pytest.mark.timeout(600),
    pytest.mark.skipif(not shutil.which("radosgw"), reason="needs the S3 server; run infra/install-test-servers"),
]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> object:
    """Everything of docker-compose.yml, running."""
    with running(tmp_path_factory.mktemp("stack"), {"LORA_BASE": str(base_folder)}) as started:
        yield started


def lora(stack: Stack, *words: str) -> str:
    """The command line against the stack."""
    environment = stack.environment | {"COLUMNS": "200"}
    done = subprocess.run([*LORA, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def ask_prefect(stack: Stack, code: str) -> list[str]:
    """What a Prefect client in its own process prints, line by line."""
    done = subprocess.run(
        [sys.executable, "-c", code], env=stack.environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


RUNS = """
from prefect.client.orchestration import get_client
with get_client(sync_client=True) as client:
    for run in client.read_flow_runs(limit=200):
        print(run.name, run.state_name)
    for artifact in client.read_artifacts():
        print("artifact", artifact.key)
    for entry in client.read_logs():
        print("log", entry.message)
"""


def test_a_users_schedule_fires_and_an_adapter_can_be_pulled(stack: Stack, tmp_path: Path) -> None:
    """Tick, job, cohort run, version, pull: nobody but the clock and the workers does anything."""
    for user, habit in (("alice", "the quick brown fox"), ("bob", "hello to the lazy dog")):
        lora(stack, "data", "add", f"acme/{user}", str(write_user(tmp_path / f"{user}.jsonl", habit)))
        lora(stack, "schedule", "set", f"acme/{user}", "--every", "60s", *SETTINGS)

    for _ in range(100):
        listed = json.loads(lora(stack, "list", "--json"))
        if all(one["latest"] for one in listed):
            break
        time.sleep(3)

    assert [(one["adapter"], one["latest"]) for one in listed] == [("acme/alice", 1), ("acme/bob", 1)]
    assert (Path(lora(stack, "pull", "acme/alice").strip()) / "adapter_model.safetensors").is_file()
    for _ in range(30):  # a version is out before the run of its cohort has ended
        seen = ask_prefect(stack, RUNS)
        if any(line.startswith("acme-") and line.endswith(" Completed") for line in seen):
            break
        time.sleep(2)
    assert any(line.startswith("acme-") and "users" in line and line.endswith(" Completed") for line in seen), seen
    assert {"tick Completed", "artifact tick"} <= set(seen), seen  # who was due, as a table
    assert any(line.startswith("artifact cohort-") and line.endswith("-curves") for line in seen), seen
    assert any(line.startswith("artifact cohort-") and line.endswith("-progress") for line in seen), seen
    told = [line for line in seen if line.startswith("log version published")]  # by threads that Prefect does not know
    assert len(told) >= 2, seen
    fired = json.loads(lora(stack, "schedule", "list", "--json"))
    assert all(one["last fired"] for one in fired)


OWN_OR_PREFECTS = """
from prefect import flow, task
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from flows import tasks
def broken(): raise KeyError("its own")
def away(): raise AssertionError("is not begun")
class Away:
    def with_options(self, **_): return self
    def __call__(self): raise ConcurrencySlotAcquisitionError("no slot")
tasks.TASKS |= {broken: task(name="broken")(broken), away: Away()}
@flow
def both():
    for step in (broken, away):
        try: tasks.as_task(step)
        except Exception as error: print(type(error).__name__)
both()
"""


def test_what_a_step_raises_is_told_from_prefects_own_trouble(stack: Stack) -> None:
    """The one may be a job's fault, and is counted as an attempt; the other never is, of whatever kind it is."""
    told = [line for line in ask_prefect(stack, OWN_OR_PREFECTS) if "Error" in line or "Away" in line]

    assert told == ["KeyError", "OrchestratorAway"]


def test_a_user_is_trained_on_demand(stack: Stack, tmp_path: Path) -> None:
    """The deployment for one user, named after it."""
    lora(stack, "data", "add", "globex/eve", str(write_user(tmp_path / "eve.jsonl", "hello fox", seed=5)))
    settings = json.dumps(dict(one.split("=") for one in QUICK))
    words = [
        "prefect",
        "deployment",
        "run",
        "adapt-user/adapt-user",
        "-p",
        "reference=globex/eve",
        "-p",
        f"recipe={settings}",
    ]

    done = subprocess.run([*words, "--watch"], env=stack.environment, capture_output=True, text=True, timeout=300)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "globex/eve:1" in lora(stack, "latest", "globex/eve")
    assert any(line.startswith("globex/eve ") for line in ask_prefect(stack, RUNS))


def test_the_operations_page_can_be_followed(stack: Stack, tmp_path: Path) -> None:
    """Every block marked `sh`, from top to bottom, in one folder and one shell."""
    page = (ROOT / "docs" / "operations.md").read_text()
    blocks = [textwrap.dedent(found) for found in re.findall(r"^ *```sh\n(.*?)^ *```$", page, re.DOTALL | re.MULTILINE)]
    environment = stack.environment | {"RECIPE": " ".join(SETTINGS), "PYTHONPATH": str(ROOT)}

    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", "\n".join(blocks)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout + done.stderr
    assert len(blocks) >= 6
    pulled = [line for line in done.stdout.splitlines() if "/pulled/" in line]
    assert len(pulled) >= 2, done.stdout  # once from the registry, once from its restored copy


def test_the_compose_file_names_what_is_here() -> None:
    """Files and commands that it mentions exist; os.environ is not needed to read it."""
    text = (ROOT / "docker-compose.yml").read_text()

    for path in ("infra/Dockerfile", "infra/prefect.yaml", "infra/postgres-init.sh"):
        assert path in text
        assert (ROOT / path).is_file()
    assert os.access(ROOT / "infra" / "s3-server", os.X_OK)
