"""The `lora` command as a process of its own, forked off a server that has the libraries already.

A process that begins from nothing spends its first seconds on importing torch and transformers; the suite has dozens.
Run as a program this file is the server: a line of JSON in for each command, its exit code out.
"""

import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parents[2]
_NAMES = ("in", "out", "err")


class Commands:
    """A server of one's own; it ends with `close`."""

    def __init__(self) -> None:
        command, pipe = [sys.executable, "-m", "tests.flows.forked"], subprocess.PIPE
        self._server = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)

    def run(self, words: Sequence[str], environment: Mapping[str, str], typed: str) -> subprocess.CompletedProcess[str]:
        """What a command answered."""
        assert self._server.stdin  # a pipe
        assert self._server.stdout  # another
        with tempfile.TemporaryDirectory() as folder:
            given, out, err = (Path(folder, name) for name in _NAMES)
            given.write_text(typed)
            self._server.stdin.write(json.dumps((words, dict(environment), folder)) + "\n")
            self._server.stdin.flush()
            code = int(self._server.stdout.readline())
            return subprocess.CompletedProcess(["lora", *words], code, out.read_text(), err.read_text())

    def close(self) -> None:
        """No more commands."""
        self._server.communicate()


def serve() -> None:
    """Fork a child for each line, and wait for it."""
    # As the command line has it before it imports them.
    os.environ.update({"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"})
    import transformers.models.llama.modeling_llama  # noqa: F401

    import flows.work  # noqa: F401  (not flows.cli, which looks at the environment)

    for line in sys.stdin:
        words, environment, folder = json.loads(line)
        if (child := os.fork()) == 0:
            _be(words, environment, folder)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        sys.stdout.flush()


def _be(words: Sequence[str], environment: Mapping[str, str], folder: str) -> NoReturn:
    """In the child: be the command; at its end the libraries are left as they lie, which takes a second otherwise."""
    for number, name in enumerate(_NAMES):
        os.dup2(os.open(Path(folder, name), os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
    sys.stdin = open(0)  # noqa: SIM115 (lives as long as the process)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["lora", *words]
    code = 1
    try:
        from flows.cli import main

        main()
    except SystemExit as left:
        code = int(left.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
