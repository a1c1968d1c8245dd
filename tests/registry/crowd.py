"""A process in which many threads pull one version at once: `python -m tests.registry.crowd`, or `crowds` from here.

It says `ready`, waits for a line on stdin, pulls, and prints each folder or error that it was given, once.
"""

import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from registry.client import Client
from registry.errors import RegistryError
from registry.session import open_database
from registry.store import open_store

ROOT = Path(__file__).parents[2]


def start_crowd(database: str, store: str, cache: Path, reference: str, pulls: int) -> subprocess.Popen[str]:
    """A process that is ready to pull."""
    command = [sys.executable, "-m", "tests.registry.crowd", database, store, str(cache), reference, str(pulls)]
    crowd = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert crowd.stdout
    assert crowd.stdout.readline() == "ready\n"
    return crowd


def release(crowds: Sequence[subprocess.Popen[str]]) -> list[str]:
    """Let them all pull at once; what they were given."""
    for crowd in crowds:
        assert crowd.stdin
        crowd.stdin.write("\n")
        crowd.stdin.flush()
    return [line for crowd in crowds for line in crowd.communicate()[0].splitlines()]


def main(database: str, store: str, cache: str, reference: str, pulls: str) -> None:
    """Be that process."""
    client = Client(open_database(database), open_store(store), Path(cache))

    def pull(_: int) -> str:
        try:
            return str(client.pull(reference))
        except RegistryError as error:
            return f"{type(error).__name__}: {error}"

    say("ready")
    sys.stdin.readline()
    with ThreadPoolExecutor(int(pulls)) as pool:
        for given in sorted(set(pool.map(pull, range(int(pulls))))):
            say(given)


def say(line: str) -> None:
    """A line of the answer."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
