"""The command line as a person uses it, without a Prefect server: from a file to a served adapter."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.flows.conftest import LORA, QUICK, ROOT, Lora, quiet_environment, write_user

SETTINGS = [word for one in QUICK for word in ("--set", one)]


def train(lora: Lora, base: Path, *words: str, code: int = 0) -> list[dict[str, str]]:
    """`lora train --json`."""
    rows: list[dict[str, str]] = json.loads(
        lora("train", *words, "--base", str(base), *SETTINGS, "--json", code=code).stdout
    )
    return rows


@pytest.fixture
def alice(tmp_path: Path) -> Path:
    """A file of a user who always answers the same."""
    return write_user(tmp_path / "alice.jsonl", "the quick brown fox")


def test_from_a_file_to_an_adapter_that_peft_loads(lora: Lora, base_folder: Path, alice: Path, tmp_path: Path) -> None:
    """Train, ask, show, pull; a second run finds nothing to do."""
    (row,) = train(lora, base_folder, "acme/alice", "--data", str(alice))
    assert (row["result"], row["version"]) == ("accepted", "1")

    (again,) = train(lora, base_folder, "acme/alice")
    assert (again["result"], again["version"]) == ("unchanged", "1")

    found = json.loads(lora("latest", "acme/alice", "--json").stdout)
    assert found["reference"] == "acme/alice:1"
    folder = json.loads(lora("pull", "acme/alice", "--to", str(tmp_path / "out"), "--json").stdout)["folder"]
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), folder)

    listed = json.loads(lora("list", "--json").stdout)
    assert [(one["adapter"], one["latest"]) for one in listed] == [("acme/alice", 1)]
    shown = json.loads(lora("show", "acme/alice", "--json").stdout)
    assert shown["scores"]["candidate"]["loss"] < shown["scores"]["base"]["loss"]
    assert shown["state"] == "accepted"
    assert "1 published" in lora("status").stdout
    assert "fox" in lora("chat", "acme/alice", "-p", "say 5", "--tokens", "12").stdout


@pytest.mark.long
@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_other_methods_take_the_same_way(
    lora: Lora, base_folder: Path, alice: Path, tmp_path: Path, method: str
) -> None:
    """Virtual tokens instead of LoRA: trained, published, reproduced to the byte, asked, and loaded by PEFT."""
    settings = [one for one in QUICK if not one.startswith(("rank", "learning_rate"))]
    settings += [f"method={method}", "num_virtual_tokens=8", "learning_rate=0.1"]
    words = [word for one in settings for word in ("-s", one)]

    (row,) = json.loads(
        lora("train", "acme/alice", "--data", str(alice), "--base", str(base_folder), *words, "--json").stdout
    )
    again = json.loads(lora("reproduce", "acme/alice:1", "--json").stdout)
    said = lora("chat", "acme/alice:1", "-p", "say 5", "--tokens", "12").stdout
    lora("pull", "acme/alice:1", "--to", str(tmp_path / "out"))

    assert (row["result"], row["version"]) == ("accepted", "1")
    assert (again["equal"], again["differs"]) == (True, {})
    assert "brown" in said
    config = next((tmp_path / "out").rglob("adapter_config.json"))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), config.parent)
    assert loaded.active_peft_config.num_virtual_tokens == 8


@pytest.mark.long
def test_adapter_layers_from_a_file_to_text(lora: Lora, base_folder: Path, alice: Path, tmp_path: Path) -> None:
    """Another method, the same way: train, reproduce, chat, pull; and the card's own lines load it."""
    settings = [word for one in QUICK if not one.startswith("rank") for word in ("--set", one)]
    words = ("acme/alice", "--data", str(alice), "--base", str(base_folder), *settings, "--json")
    (row,) = json.loads(lora("train", *words, "-s", "method=bottleneck", "-s", "width=16").stdout)

    assert (row["result"], row["version"]) == ("accepted", "1")
    assert json.loads(lora("reproduce", "acme/alice", "--json").stdout)["equal"]
    assert "fox" in lora("chat", "acme/alice", "-p", "say 5", "--tokens", "12").stdout
    folder = Path(json.loads(lora("pull", "acme/alice", "--to", str(tmp_path / "out"), "--json").stdout)["folder"])
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    here = re.sub(r"load_base\(.*\)", f"load_base({str(base_folder)!r})", code).replace(
        "path/of/this/folder", str(folder)
    )
    done = subprocess.run([sys.executable, "-c", here], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip(), done.stderr


def test_new_data_makes_a_new_version_and_rollback_takes_it_back(lora: Lora, base_folder: Path, alice: Path) -> None:
    """Aliases move, versions stay."""
    train(lora, base_folder, "acme/alice", "--data", str(alice))
    other = write_user(alice.parent / "new.jsonl", "hello to the lazy dog", seed=1)
    (row,) = train(lora, base_folder, "acme/alice", "--data", str(other))
    assert (row["result"], row["version"]) == ("accepted", "2")

    lora("rollback", "acme/alice", "--reason", "too lazy")
    lora("promote", "acme/alice:2")

    assert json.loads(lora("latest", "acme/alice", "--json").stdout)["reference"] == "acme/alice:1"
    history = lora("history", "acme/alice").stdout
    assert "too lazy" in history
    assert "production" in history


def test_a_candidate_that_is_no_better_is_kept_and_refused(lora: Lora, base_folder: Path, alice: Path) -> None:
    """A rate of almost nothing gains almost nothing: latest does not move."""
    train(lora, base_folder, "acme/alice", "--data", str(alice))

    words = ("train", "acme/alice", "--base", str(base_folder), *SETTINGS, "--set", "learning_rate=1e-9", "--json")
    (row,) = json.loads(lora(*words).stdout)

    assert (row["result"], row["version"]) == ("refused", "2")
    assert json.loads(lora("latest", "acme/alice", "--json").stdout)["reference"] == "acme/alice:1"
    assert "refused" in lora("promote", "acme/alice:2", code=1).stderr


def test_a_user_with_too_little_data_fails_alone(lora: Lora, base_folder: Path, alice: Path, tmp_path: Path) -> None:
    """The other two of the cohort are published; the exit code says that not everybody was."""
    lora("data", "add", "acme/alice", str(alice))
    lora("data", "add", "acme/bob", str(write_user(tmp_path / "b.jsonl", "hello dog", seed=2)))
    lora("data", "add", "globex/tiny", str(write_user(tmp_path / "t.jsonl", "x", count=1)))

    rows = train(lora, base_folder, "acme/alice", "acme/bob", "globex/tiny", code=4)

    assert {row["user"]: row["result"] for row in rows} == {
        "acme/alice": "accepted", "acme/bob": "accepted", "globex/tiny": "failed",
    }  # fmt: skip
    assert "add examples" in lora("status", "globex").stdout
    matrix = json.loads(lora("matrix", "acme/alice", "acme/bob", "--json").stdout)
    assert all(row["own"] < row["base"] and row["own"] < row["others"] for row in matrix)


def test_a_file_with_bad_rows_is_reported_by_line(lora: Lora, tmp_path: Path) -> None:
    """`data check` stores nothing and says everything."""
    path = write_user(tmp_path / "a.jsonl", "hello")
    path.write_text(path.read_text() + '{"mesages": []}\n')

    report = lora("data", "check", str(path)).stdout

    assert f"{path}:61 mesages: is not a known field; did you mean 'messages'?" in report
    assert not (tmp_path / "home" / "registry.db").exists()


UGLY = [
    (["train", "acme/../x", "--base", "B"], 1, "not a valid"),
    (["train", "acme/alice", "--base", "B"], 3, "no tenant acme"),
    (["train", "acme/alice", "--base", "/nowhere"], 1, "no such folder"),
    (["train", "acme/alice"], 1, "LORA_BASE"),
    (["train", "acme/alice", "--base", "B", "--set", "rnk=3"], 1, "did you mean rank"),
    (["train", "acme/alice", "--base", "B", "--recipe", "/nowhere.yaml"], 1, "cannot be read"),
    (["data", "add", "acme/alice", "/nowhere.jsonl"], 1, "does not exist"),
    (["data", "check", "pyproject.toml"], 1, "known format"),
    (["latest", "acme/alice"], 3, "no tenant"),
    (["pull", "acme/alice:x"], 1, "not a valid version number"),
    (["schedule", "set", "acme/alice", "--cron", "x", "--base", "B"], 1, "five fields"),
    (["schedule", "set", "acme/alice", "--base", "B"], 2, "either --cron or --every"),
    (["schedule", "remove", "acme/alice"], 3, "no tenant"),
    (["promote", "acme/alice", "--alias", "A B"], 3, "no tenant"),
    (["list", "../etc"], 1, "not a valid"),
    (["nonsense"], 2, "No such command"),
]


@pytest.mark.parametrize(("words", "code", "message"), UGLY)
def test_bad_input_gets_one_clear_line(
    lora: Lora, base_folder: Path, words: list[str], code: int, message: str
) -> None:
    """What, where, why, what to do; no traceback; the exit code of the README."""
    lora("setup")

    done = lora(*[str(base_folder) if word == "B" else word for word in words], code=code)

    assert message in " ".join(done.stderr.split())


def test_commands_before_set_up_say_what_to_do(lora: Lora) -> None:
    """A fresh machine is no reason for a traceback."""
    assert "lora setup" in lora("list", code=1).stderr


def test_doctor_tells_a_broken_database_from_a_good_one(lora: Lora) -> None:
    """By exit code, and without showing the password."""
    lora("setup")
    assert lora("doctor").stdout

    broken = lora("doctor", code=1, environment={"LORA_DATABASE_URL": "postgresql+psycopg://u:geheim@127.0.0.1:1/d"})

    assert "geheim" not in broken.stdout + broken.stderr
    assert "error" in broken.stdout


def test_schedules_are_set_listed_paused_and_removed(lora: Lora, base_folder: Path, alice: Path) -> None:
    """And one that is due is trained by `work --once`, once."""
    lora("data", "add", "acme/alice", str(alice))
    lora("schedule", "set", "acme/alice", "--every", "1h", "--base", str(base_folder), *SETTINGS)
    (row,) = json.loads(lora("schedule", "list", "acme", "--json").stdout)
    assert (row["adapter"], row["timing"], row["paused"]) == ("acme/alice", "every 1h", False)
    assert lora("work", "--once", "--json").stdout.strip() == "[]"
    lora("schedule", "pause", "acme/alice")
    assert json.loads(lora("schedule", "list", "--json").stdout)[0]["paused"] is True

    lora("schedule", "pause", "acme/alice", "--resume")
    lora("schedule", "remove", "acme/alice")

    assert "no schedules" in lora("schedule", "list").stdout


def start_training(base: Path, home: Path, *more: str) -> subprocess.Popen[bytes]:
    """`lora train acme/alice` in the background, with leases that run out in two seconds."""
    words = [*LORA, "train", "acme/alice", "--base", str(base), *SETTINGS, *more]
    environment = quiet_environment(home) | {"LORA_LEASE_SECONDS": "2"}
    return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_until_running(lora: Lora, process: subprocess.Popen[bytes]) -> None:
    """Until the registry says that a worker has the job and its run has begun."""
    for _ in range(200):
        if "running" in lora("status").stdout or process.poll() is not None:
            return
        time.sleep(0.1)


@pytest.mark.long
def test_a_kill_during_training_costs_time_and_nothing_else(
    lora: Lora, base_folder: Path, alice: Path, tmp_path: Path
) -> None:
    """SIGKILL; after the lease the next worker trains it: one version, nothing half visible."""
    lora("data", "add", "acme/alice", str(alice))
    doomed = start_training(base_folder, tmp_path, "--set", "epochs=1000", "--set", "patience=1000")
    wait_until_running(lora, doomed)
    time.sleep(1)
    doomed.send_signal(signal.SIGKILL)
    assert doomed.wait() == -signal.SIGKILL
    assert json.loads(lora("list", "--json").stdout)[0]["versions"] == 0
    store = tmp_path / "home" / "store"
    assert [path.suffix for path in store.rglob("*") if path.is_file()] == [".jsonl"]
    time.sleep(2.5)

    train(lora, base_folder, "acme/alice")
    rows = json.loads(lora("list", "--json").stdout)

    assert [(row["versions"], row["latest"]) for row in rows] == [(1, 1)]


@pytest.mark.long
def test_a_training_killed_half_way_goes_on_to_the_bytes_of_one_that_was_not(
    lora: Lora, base_folder: Path, alice: Path, tmp_path: Path
) -> None:
    """SIGKILL once progress was saved; the next worker goes on from there, and a training from nothing agrees."""
    lora("data", "add", "acme/alice", str(alice))
    words = [
        *LORA,
        "train",
        "acme/alice",
        "--base",
        str(base_folder),
        *SETTINGS,
        "-s",
        "epochs=60",
        "-s",
        "patience=60",
    ]
    environment = quiet_environment(tmp_path) | {"LORA_LEASE_SECONDS": "2", "LORA_SAVE_SECONDS": "0"}
    doomed = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    saves = tmp_path / "home" / "saves"
    while doomed.poll() is None and not list(saves.glob("*.safetensors")):
        time.sleep(0.02)
    doomed.send_signal(signal.SIGKILL)
    assert doomed.wait() == -signal.SIGKILL
    time.sleep(2.5)

    (row,) = json.loads(lora("work", "--once", "--json").stdout)
    again = json.loads(lora("reproduce", "acme/alice", "--json").stdout)

    assert row["version"] == "1"
    assert again["equal"]
    assert again["differs"] == {}
    assert list(saves.iterdir()) == []


@pytest.mark.long
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch compiles for a CPU with a C++ compiler")
def test_a_version_of_compiled_layers_is_reproduced_by_compiled_layers(
    lora: Lora, base_folder: Path, alice: Path
) -> None:
    """The manifest says so, whatever the settings are by then."""
    words = ("acme/alice", "--data", str(alice), "--base", str(base_folder), *SETTINGS)
    lora("train", *words, environment={"LORA_COMPILE": "true"})

    assert json.loads(lora("reproduce", "acme/alice", "--json").stdout)["equal"]


def test_what_cannot_be_reproduced_says_so(lora: Lora, base_folder: Path, alice: Path, tmp_path: Path) -> None:
    """A changed base is refused; other numbers of threads, libraries or devices would be named."""
    moved = tmp_path / "base"
    shutil.copytree(base_folder, moved)
    train(lora, moved, "acme/alice", "--data", str(alice))
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))

    assert "have changed" in lora("reproduce", "acme/alice", code=1).stderr


DIES_PUBLISHING = """
import os, signal, sys
from registry.store import FolderStore
put = FolderStore.put_new
def doomed(self, key, data):
    if key.endswith("manifest.json"):
        os.kill(os.getpid(), signal.SIGKILL)
    return put(self, key, data)
FolderStore.put_new = doomed
from flows.cli import main
main()
"""


@pytest.mark.long
def test_a_kill_during_publish_gives_one_version_when_run_again(
    lora: Lora, base_folder: Path, alice: Path, tmp_path: Path
) -> None:
    """Killed with the weights uploaded and the manifest not: nothing is visible, then exactly version 1."""
    lora("data", "add", "acme/alice", str(alice))
    words = [sys.executable, "-c", DIES_PUBLISHING, "train", "acme/alice", "--base", str(base_folder), *SETTINGS]
    environment = quiet_environment(tmp_path) | {"LORA_LEASE_SECONDS": "2"}
    dead = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True)
    assert dead.returncode == -signal.SIGKILL, dead.stderr.decode()
    assert json.loads(lora("list", "--json").stdout)[0]["versions"] == 0
    time.sleep(2.5)

    rows = json.loads(lora("work", "--once", "--json").stdout)

    assert [(row["user"], row["result"], row["version"]) for row in rows] == [("acme/alice", "accepted", "1")]
    assert (Path(json.loads(lora("pull", "acme/alice", "--json").stdout)["folder"]) / "manifest.json").is_file()


def test_everything_runs_on_postgresql_and_s3_by_setting_two_urls(
    lora: Lora, base_folder: Path, alice: Path, postgres_url: str, s3_url: str
) -> None:
    """The same commands; no other change."""
    urls = {"LORA_DATABASE_URL": postgres_url, "LORA_STORE_URL": f"{s3_url}/adapters"}
    urls |= {name: value for name, value in os.environ.items() if name.startswith("AWS_")}

    lora("setup", environment=urls)
    words = ("train", "acme/alice", "--data", str(alice), "--base", str(base_folder), *SETTINGS, "--json")
    (row,) = json.loads(lora(*words, environment=urls).stdout)

    assert row["result"] == "accepted"
    folder = Path(json.loads(lora("pull", "acme/alice", "--json", environment=urls).stdout)["folder"])
    assert (folder / "adapter_model.safetensors").is_file()
