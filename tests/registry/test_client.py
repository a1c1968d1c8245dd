"""Pull: verified, atomic, cached."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy.engine import Engine

from registry.client import Client
from registry.errors import NotFound, ObjectDiffers, ObjectMissing
from registry.publishing import Published, publish
from registry.store import FolderStore, ObjectStore, open_store
from tests.registry.conftest import NOW, Claim, finished


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    """An empty store of each kind in turn."""
    url = str(tmp_path / "store") if request.param == "folder" else request.getfixturevalue("s3_url")
    opened = open_store(url)
    opened.set_up()
    return opened


@pytest.fixture
def published(engine: Engine, store: ObjectStore, claim: Claim) -> Published:
    """Alice's version 1."""
    return publish(engine, store, claim()[0], finished(), NOW)


@pytest.fixture
def client(engine: Engine, store: ObjectStore, tmp_path: Path) -> Client:
    """A client with an empty cache."""
    return Client(engine, store, tmp_path / "cache")


class Unreachable(FolderStore):
    """A store behind a cut cable."""

    def stream(self, key: str) -> Iterator[bytes]:
        """Never."""
        raise AssertionError(f"asked for {key}")


def test_a_pull_gives_the_files_under_the_served_name(client: Client, published: Published) -> None:
    """By any way of writing the reference."""
    folder = client.pull("acme/alice")

    assert folder.name == published.served_name
    assert (folder / "weights.bin").read_text() == "weights"
    assert client.pull("acme/alice:1") == client.pull("acme/alice@latest") == folder


def test_a_second_pull_touches_no_store(client: Client, published: Published, tmp_path: Path) -> None:
    """What is immutable need not be asked for twice."""
    folder = client.pull("acme/alice")
    client.store = Unreachable(tmp_path)

    assert client.pull("acme/alice") == folder
    assert client.pull("acme/alice", verify=True) == folder


def test_pulls_at_once_give_one_whole_folder(client: Client, published: Published, tmp_path: Path) -> None:
    """Sixteen threads, one result, nothing left aside."""
    with ThreadPoolExecutor(16) as pool:
        folders = set(pool.map(lambda _: client.pull("acme/alice"), range(16)))

    assert len(folders) == 1
    assert [path.name for path in tmp_path.glob("cache/[!.]*")] == [published.sha256]
    assert list(tmp_path.glob("cache/.pulling/*")) == []


@pytest.mark.parametrize("file", ["weights.bin", "manifest.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "longer", "gone"])
def test_a_damaged_object_is_refused_and_named(
    engine: Engine, claim: Claim, tmp_path: Path, file: str, damage: str
) -> None:
    """And nothing of it stays in the cache."""
    store = FolderStore(tmp_path / "store")
    store.set_up()
    done = publish(engine, store, claim()[0], finished(), NOW)
    path = tmp_path / "store" / done.prefix / file
    data = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes({"flipped": bytes([data[0] ^ 1]) + data[1:], "cut": data[:-1], "longer": data + b"!"}[damage])
    client = Client(engine, store, tmp_path / "cache")

    with pytest.raises((ObjectDiffers, ObjectMissing), match=file):
        client.pull("acme/alice")

    left = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert [path for path in left if path.suffix != ".lock"] == []


def test_a_cache_that_was_tampered_with_is_mended_on_request(client: Client, published: Published) -> None:
    """`--verify` trusts the registry, not the disk."""
    folder = client.pull("acme/alice")
    (folder / "weights.bin").write_text("evil")

    assert (client.pull("acme/alice", verify=True) / "weights.bin").read_text() == "weights"


@pytest.mark.parametrize("reference", ["acme/bob", "globex/alice", "acme/alice:2", "acme/alice@production"])
def test_what_does_not_exist_is_named(client: Client, published: Published, reference: str) -> None:
    """Not found is an answer, not a traceback."""
    with pytest.raises(NotFound):
        client.pull(reference)


WITHOUT = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "peft", "prefect", "numpy", "pyarrow", "alembic", "boto3"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
from pathlib import Path
from registry.client import Client
from registry.session import open_database
from registry.store import open_store
import flows.cli
print(Client(open_database(sys.argv[1]), open_store(sys.argv[2]), Path(sys.argv[3])).pull("acme/alice"))
"""


def test_registry_client_and_command_line_need_no_torch(engine: Engine, claim: Claim, tmp_path: Path) -> None:
    """An inference host installs the client alone."""
    store = FolderStore(tmp_path / "store")
    store.set_up()
    done = publish(engine, store, claim()[0], finished(), NOW)
    url = engine.url.render_as_string(hide_password=False)

    command = [sys.executable, "-c", WITHOUT, url, str(tmp_path / "store"), str(tmp_path / "cache")]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)

    assert result.stdout.strip().endswith(done.served_name), result.stderr
