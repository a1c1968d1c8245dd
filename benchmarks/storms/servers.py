"""The real servers and workers of a storm as plain processes, each of which can be killed and comes back to its data.

PostgreSQL is the system's: Prefect's server needs the extension pg_trgm, which that from PyPI lacks.  S3 is Ceph RGW.
"""

import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.servers import free_port

ROOT = Path(__file__).parents[2]
S3_SERVER = ROOT / "infra" / "s3-server"
PREFECT, LORA = (str(Path(sys.executable).parent / name) for name in ("prefect", "lora"))
DAEMONS = ("radosgw", "ceph-osd", "ceph-mon")
_PATIENCE_SECONDS = 120  # for a server to answer


@dataclass
class Process:
    """One service as a process of its own session, with its children."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    answers: Callable[[], bool]  # whether it serves
    user: str | None = None
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it serves.  Raises RuntimeError when it does not."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, env=dict(self.environment), user=self.user, group=self.user,
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        _wait(self.name, self.answers, self.log)

    def kill(self) -> None:
        """SIGKILL it and everything that it started."""
        _kill(self.pids)
        if self.process:
            self.process.wait()

    def stop(self) -> None:
        """Ask it to end; kill what does not, and what it leaves behind, as Prefect's worker does its runs."""
        left = self._tree
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT if self.user else signal.SIGTERM)  # PostgreSQL's fast shutdown
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=15)
        self.kill()
        _kill([one.pid for one in left if one.is_running()])  # and is not somebody else by now

    @property
    def pids(self) -> list[int]:
        """Its processes that live."""
        return [one.pid for one in self._tree]

    @property
    def _tree(self) -> list[psutil.Process]:
        """They, which a pid alone is not for ever."""
        if self.process is None:
            return []
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.process.pid)
            return [one for one in (root, *root.children(recursive=True)) if one.is_running()]
        return []

    @property
    def trees(self) -> dict[int, list[int]]:
        """The same by the first of them."""
        return {self.process.pid: self.pids} if self.process else {}

    @property
    def dead(self) -> bool:
        """Whether it ended by itself."""
        return self.process is not None and self.process.poll() is not None


@dataclass
class Store:
    """Ceph RGW: monitor, disk and front as three daemons that live and die together."""

    name: str
    folder: Path
    port: int
    on_disk: bool  # slower, and the objects survive SIGKILL

    def start(self) -> None:
        """Start the daemons that are not there, and wait until they serve."""
        known = (self.folder / "ceph.conf").exists()
        kind = {"STORE": "bluestore" if self.on_disk else "memstore"}
        command = [S3_SERVER, "resume" if known else "start", self.folder, str(self.port)]
        subprocess.run(command, check=True, timeout=180, env={**os.environ, **kind}, stdout=subprocess.DEVNULL)
        _wait(self.name, lambda: _responds(f"http://127.0.0.1:{self.port}/"), self.folder / "radosgw.log")

    def kill(self) -> None:
        """SIGKILL every daemon; with objects in memory only the front, which they would not survive otherwise."""
        _kill(self.pids if self.on_disk else self._pid("radosgw"))

    def stop(self) -> None:
        """End the daemons."""
        subprocess.run([S3_SERVER, "stop", self.folder], check=False, timeout=60)

    @property
    def pids(self) -> list[int]:
        """Its daemons that live."""
        return [pid for daemon in DAEMONS for pid in self._pid(daemon)]

    @property
    def trees(self) -> dict[int, list[int]]:
        """Each is alone."""
        return {pid: [pid] for pid in self.pids}

    @property
    def dead(self) -> bool:
        """Whether a daemon ended by itself."""
        return len(self.pids) < len(DAEMONS)

    def _pid(self, daemon: str) -> list[int]:
        with suppress(OSError, ValueError, psutil.NoSuchProcess):
            found = psutil.Process(int((self.folder / f"{daemon}.pid").read_text()))
            return [found.pid] if found.status() != psutil.STATUS_ZOMBIE else []
        return []


Service = Process | Store


@dataclass
class Site:
    """Everything that runs, by name, and the environment of whoever works with it."""

    folder: Path
    environment: dict[str, str]
    services: dict[str, Service] = field(default_factory=dict)

    @property
    def workers(self) -> list[str]:
        """The services that train."""
        return [name for name in self.services if name.startswith("worker")]

    def start(self, service: Service) -> None:
        """Add a service and start it."""
        self.services[service.name] = service
        service.start()


@contextmanager
def running_site(folder: Path, on_disk: bool, settings: Mapping[str, str], prefect: bool = True) -> Iterator[Site]:
    """PostgreSQL, S3, the registry's tables, Prefect's server and its deployments; stopped at the end."""
    programs = postgres_programs()
    if programs is None or not shutil.which("radosgw"):
        raise SystemExit("needs PostgreSQL with pg_trgm, and Ceph RGW: run infra/install-test-servers as root")
    ports = {name: free_port() for name in ("postgres", "s3", "prefect")}
    site = Site(folder, _environment(folder, ports) | dict(settings))
    with ExitStack() as ends:
        ends.callback(lambda: [service.stop() for service in reversed(site.services.values())])
        site.start(_postgres(site, programs, ports["postgres"]))
        _make_databases(programs, ports["postgres"])
        (folder / "s3").mkdir()
        site.start(Store("store", folder / "s3", ports["s3"], on_disk))
        owner = {"LORA_DATABASE_OWNER_URL": _registry_url("postgres", ports["postgres"])}
        _once(site, [LORA, "setup"], owner)
        if not prefect:
            yield site
            return
        site.start(_prefect_server(site, ports["prefect"]))
        _once(site, [PREFECT, "work-pool", "create", "gpu", "--type", "process", "--overwrite"])
        _once(site, [PREFECT, "--no-prompt", "deploy", "--all", "--prefect-file", "infra/prefect.yaml"])
        yield site


def start_workers(site: Site, count: int) -> None:
    """So many workers, each of one cohort at a time: of Prefect's pool, or plain ones where there is no Prefect."""
    for number in range(1, count + 1):
        name = f"worker-{number}"
        site.start(_worker(site, name) if "prefect" in site.services else _plain_worker(site, name))


def start_clock(site: Site) -> None:
    """The clock, whose first tick comes at once."""
    site.start(Process("clock", [LORA, "clock"], site.environment, site.folder / "clock.log", lambda: True))


def postgres_programs() -> Path | None:
    """Where the system's newest PostgreSQL with pg_trgm has its programs; None where there is none."""
    found = [path for path in Path("/usr/lib/postgresql").glob("*/bin") if (path / "postgres").exists()]
    shared = Path("/usr/share/postgresql")
    found = [path for path in found if (shared / path.parent.name / "extension" / "pg_trgm.control").exists()]
    return max(found, key=lambda path: int(path.parent.name), default=None)


def _postgres(site: Site, programs: Path, port: int) -> Process:
    """A PostgreSQL of its own below the folder; as root, run by the system's user for it."""
    data = site.folder / "postgres"
    data.mkdir()
    user = "postgres" if os.getuid() == 0 else None
    if user:
        os.chown(data, pwd.getpwnam(user).pw_uid, -1)
    init = [str(programs / "initdb"), "-D", str(data), "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale"]
    subprocess.run(init, check=True, user=user, cwd="/", stdout=subprocess.DEVNULL)
    place = ["-D", str(data), "-k", str(data), "-p", str(port), "-c", "listen_addresses=127.0.0.1"]
    command = [str(programs / "postgres"), *place, "-c", "max_connections=200"]
    ask = [str(programs / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]
    return Process(
        "postgres", command, site.environment, site.folder / "postgres.log",
        lambda: subprocess.run(ask, check=False).returncode == 0, user,
    )  # fmt: skip


def _make_databases(programs: Path, port: int) -> None:
    psql = [str(programs / "psql"), "-q", "-h", "127.0.0.1", "-p", str(port), "-U", "postgres"]
    for statement in ("CREATE DATABASE lora", "CREATE DATABASE prefect", "CREATE ROLE lora_app LOGIN"):
        subprocess.run([*psql, "-c", statement], check=True)


def _prefect_server(site: Site, port: int) -> Process:
    command = [PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    health = f"http://127.0.0.1:{port}/api/health"
    return Process("prefect", command, site.environment, site.folder / "prefect.log", lambda: _responds(health))


def _worker(site: Site, name: str) -> Process:
    command = [PREFECT, "worker", "start", "--pool", "gpu", "--type", "process", "--name", name, "--limit", "1"]
    environment = site.environment | {"LORA_WORKER": name}
    return Process(name, command, environment, site.folder / f"{name}.log", lambda: True)


def _plain_worker(site: Site, name: str) -> Process:
    environment = site.environment | {"LORA_WORKER": name}
    command = [LORA, "work", "--every", "1", "--json"]
    return Process(name, command, environment, site.folder / f"{name}.log", lambda: True)


def _environment(folder: Path, ports: Mapping[str, int]) -> dict[str, str]:
    """The compose file's environment, with this machine's ports."""
    prefects = f"postgresql+asyncpg://postgres@127.0.0.1:{ports['postgres']}/prefect"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LORA_", "PREFECT_", "AWS_"))}
    return kept | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "LORA_DATABASE_URL": _registry_url("lora_app", ports["postgres"]),
        "LORA_STORE_URL": "s3://adapters",
        "LORA_HOME": str(folder / "home"),
        "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{ports['s3']}",
        "AWS_ACCESS_KEY_ID": "AKLORA1",
        "AWS_SECRET_ACCESS_KEY": "SKLORA1secret",
        "AWS_REGION": "us-east-1",
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_API_URL": f"http://127.0.0.1:{ports['prefect']}/api",
        "PREFECT_API_DATABASE_CONNECTION_URL": prefects,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_CLIENT_RETRY_EXTRA_CODES": "500",
        "PREFECT_CLIENT_MAX_RETRIES": "20",
    }


def _registry_url(role: str, port: int) -> str:
    return f"postgresql+psycopg://{role}@127.0.0.1:{port}/lora"


def _once(site: Site, command: Sequence[str], more: Mapping[str, str] | None = None) -> None:
    """Run something to its end.  Raises CalledProcessError."""
    with (site.folder / "setup.log").open("ab") as log:
        environment = site.environment | dict(more or {})
        subprocess.run(command, check=True, env=environment, cwd=ROOT, stdout=log, stderr=log, timeout=300)


def _wait(name: str, answers: Callable[[], bool], log: Path) -> None:
    until = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < until:
        if answers():
            return
        time.sleep(0.2)
    raise RuntimeError(f"{name} did not answer within {_PATIENCE_SECONDS} s; see {log}")


def _responds(url: str) -> bool:
    """Whether a server answers, be it with a refusal."""
    try:
        urllib.request.urlopen(url, timeout=3).close()
    except urllib.error.HTTPError as error:
        return error.code < 500
    except OSError:
        return False
    return True


def _kill(pids: Sequence[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
