"""The stack without Docker: what it keeps from run to run, and what it says when a part of it ends."""

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import psutil
import pytest

from infra import stack
from tests.servers import S3Server, is_over


def test_a_part_that_ends_by_itself_ends_the_stack_and_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Else it is gone from one moment to the next, without a word and with exit code 0."""

    @contextlib.contextmanager
    def running(folder: Path) -> Iterator[stack.Stack]:
        with subprocess.Popen(["sleep", "60"]) as lives, subprocess.Popen(["false"]) as ends:
            parts = dict.fromkeys(stack.STAYING, lives) | {"clock": ends}
            yield stack.Stack(folder, dict.fromkeys(stack.SHOWN, ""), parts)
            lives.kill()

    monkeypatch.setattr(stack, "running", running)
    monkeypatch.setattr(sys, "argv", ["stack.py", str(tmp_path)])
    with pytest.raises(SystemExit) as left:
        stack.main()

    assert left.value.code == f"clock ended with 1; see {tmp_path / 'clock'}.log"


def test_what_a_part_has_started_ends_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A run of a worker that does not go in time is a session of its own, and would train on for nobody."""
    monkeypatch.setattr(stack, "STOPPING_SECONDS", 0.2)
    part = f"trap '' TERM; setsid sleep 60 & echo $! > {tmp_path / 'run'}; wait; sleep 60"
    with subprocess.Popen(["sh", "-c", part], start_new_session=True) as worker:
        while not (tmp_path / "run").exists() or not (tmp_path / "run").read_text():
            time.sleep(0.01)
        run = psutil.Process(int((tmp_path / "run").read_text()))

        stack.stop(stack.Stack(tmp_path, {}, {"worker": worker}))

    assert is_over(run)


def test_each_server_that_is_not_there_is_told(tmp_path: Path) -> None:
    """One without the others serves nobody; without apt-get nothing can be installed."""
    for program in ("ls", "id", "ceph-mon"):
        (tmp_path / program).symlink_to(shutil.which(program) or "/bin/true")

    told = subprocess.run(
        ["/bin/bash", stack.ROOT / "infra" / "install-test-servers"],
        env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=True,
    )  # fmt: skip

    assert "apt-get install radosgw ceph-osd" in told.stderr


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("radosgw"), reason="needs the S3 server; run infra/install-test-servers")
def test_objects_are_there_when_the_stack_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry's rows are, and name them; a folder whose first run was cut short is begun anew."""
    folder = tmp_path / "s3"
    (folder / "mon").mkdir(parents=True)
    (folder / "monmap").touch()
    found = []
    for _ in range(2):
        server = S3Server(f"http://127.0.0.1:{stack.start_s3(folder)}", "AKLORA1", "SKLORA1secret", real=True)
        try:
            for name, value in server.environment().items():
                monkeypatch.setenv(name, value)
            client = boto3.client("s3")
            client.create_bucket(Bucket="adapters")
            found.append(client.list_objects_v2(Bucket="adapters")["KeyCount"])
            client.put_object(Bucket="adapters", Key="kept", Body=b"bytes")
        finally:
            subprocess.run([stack.S3_SERVER, "stop", folder], check=True)

    assert found == [0, 1]
