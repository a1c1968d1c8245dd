"""The real servers that tests run against: one PostgreSQL and one S3 server a session, started when first asked for."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy.engine import URL, Engine, make_url
from sqlalchemy.orm import Session

from registry.schema import migrate
from registry.session import open_database, reading, transaction
from tests.servers import APPLICATION, S3Server, execute, new_database, running_postgres, running_s3


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test sees the developer's settings or writes to the developer's home."""
    for name in [key for key in os.environ if key.startswith(("LORA_", "AWS_", "PREFECT_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("LORA_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a real PostgreSQL, without a database's name."""
    with running_postgres(tmp_path_factory.mktemp("postgres")) as url:
        execute(url, "ALTER SYSTEM SET fsync = off")  # no test cuts the machine's power
        execute(url, "SELECT pg_reload_conf()")
        yield url


@pytest.fixture(scope="session")
def postgres_tables(postgres_server: str) -> str:
    """The name of a database with the tables and nothing in them: a copy takes a third of the time of making them."""
    return str(_emptied(new_database(postgres_server)).database)


@pytest.fixture(scope="session")
def sqlite_tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a file."""
    return Path(str(_emptied(f"sqlite:///{tmp_path_factory.mktemp('tables') / 'registry.db'}").database))


@pytest.fixture
def home(tmp_path: Path, sqlite_tables: Path) -> Path:
    """LORA_HOME with the tables in it."""
    folder = tmp_path / "home"
    folder.mkdir()
    shutil.copyfile(sqlite_tables, folder / "registry.db")
    return folder


def _emptied(url: str) -> URL:
    opened = set_up(url)
    opened.dispose()
    return opened.url


@pytest.fixture
def postgres_url(postgres_server: str) -> str:
    """A fresh, empty PostgreSQL database."""
    return new_database(postgres_server)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database, of each kind in turn."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'registry.db'}"
    url: str = request.getfixturevalue("postgres_url")
    return url


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """A registry with its tables, on each kind of database in turn; on PostgreSQL as the role that owns nothing."""
    with new_registry(request, tmp_path) as opened:
        yield opened


@contextmanager
def new_registry(request: pytest.FixtureRequest, folder: Path) -> Iterator[Engine]:
    """The same of the kind that a fixture's parameter names; SQLite's file is in the folder."""
    if request.param == "sqlite":
        copied = shutil.copyfile(request.getfixturevalue("sqlite_tables"), folder / "registry.db")
        opened = open_database(f"sqlite:///{copied}")
    else:
        server, tables = (request.getfixturevalue(name) for name in ("postgres_server", "postgres_tables"))
        opened = as_application(new_database(server, tables))
    yield opened
    opened.dispose()


def set_up(url: str) -> Engine:
    """Make the tables in the owner's database, and open it as the application does."""
    owner = open_database(url)
    if owner.dialect.name == "sqlite":
        migrate(owner)
        return owner
    migrate(owner, application=APPLICATION)
    owner.dispose()
    return as_application(url)


def as_application(url: str) -> Engine:
    """A database as the role that owns nothing."""
    return open_database(make_url(url).set(username=APPLICATION).render_as_string(hide_password=False))


@contextmanager
def looking(engine: Engine) -> Iterator[Session]:
    """What is really there, of every tenant: on PostgreSQL as the superuser, whom no policy binds."""
    with _unbound(engine) as owner, reading(owner) as session:
        yield session


@contextmanager
def tampering(engine: Engine) -> Iterator[Session]:
    """As `looking`, and what is done there is committed."""
    with _unbound(engine) as owner, transaction(owner) as session:
        yield session


@contextmanager
def _unbound(engine: Engine) -> Iterator[Engine]:
    url = engine.url.set(username="postgres") if engine.dialect.name == "postgresql" else engine.url
    opened = open_database(url.render_as_string(hide_password=False))
    yield opened
    opened.dispose()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real Ceph RGW where it is installed; else moto's server, loudly."""
    with running_s3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3_url(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a new bucket's store, with the environment to reach it."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return f"s3://test-{uuid.uuid4().hex[:16]}"
