"""A person or a machine stops a command: its exit code says so, and what was asked for waits."""

import signal
from pathlib import Path

import pytest

from flows.lora import main
from tests.flows.conftest import LoraHere, write_user


def ctrl_c(*_: object) -> None:
    """As Python's own handler of SIGINT, which a shell's background jobs do not have."""
    raise KeyboardInterrupt


def test_ctrl_c_is_quiet_while_the_command_line_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """That takes a second, in which one sees what one has typed."""
    monkeypatch.setattr("builtins.__import__", ctrl_c)
    with pytest.raises(SystemExit) as left:
        main()
    monkeypatch.undo()

    assert left.value.code == 130


@pytest.mark.parametrize(("stop", "code"), [(ctrl_c, 130), (lambda *_: signal.raise_signal(signal.SIGTERM), 143)])
def test_who_stops_a_training_is_told_that_it_is_asked_for(
    lora_here: LoraHere, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: object, code: int
) -> None:
    """Its job waits: a worker would train it, and publish."""
    monkeypatch.setattr("flows.cohort.train_candidates", stop)
    data = write_user(tmp_path / "a.jsonl", "hello")
    said = lora_here("train", "acme/alice", "--data", str(data), "--base", str(base_folder))

    assert (said.code, said.out) == (code, "")
    assert "waits in the queue: run it again, or take it back with `lora queue cancel`" in said.err
    assert "queued" in lora_here("queue", "list").out
