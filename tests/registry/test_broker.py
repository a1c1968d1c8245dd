"""Leave to pull without credentials: what a broker gives, and what the store itself refuses."""

import json
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from sqlalchemy.engine import Engine

from registry.broker import Broker
from registry.errors import (
    GrantRefused,
    NotFound,
    ObjectDiffers,
    SettingRefused,
    SignatureRefused,
    StoreUnavailable,
    TicketRefused,
)
from registry.publishing import Published, publish
from registry.signing import Signer, Verifier
from registry.store import FolderStore, ObjectStore, open_store
from registry.tickets import Ticket, redeem
from tests.registry.conftest import NOW, Claim, finished
from tests.registry.test_signing import write_pair
from tests.servers import S3Server

SECRET = "0123456789abcdef" * 2
HOUR, MINUTES = timedelta(hours=1), timedelta(minutes=5)
Versions = dict[str, Published]


@pytest.fixture
def bucket(s3_url: str) -> ObjectStore:
    """A new bucket."""
    store = open_store(s3_url)
    store.set_up()
    return store


@pytest.fixture
def both(engine: Engine, bucket: ObjectStore, claim: Claim) -> Versions:
    """A version of acme's alice and one of globex's."""
    names = ("acme", "globex")
    return {name: publish(engine, bucket, claim(1, f"{name}/alice")[0], finished(f"{name}'s"), NOW) for name in names}


@pytest.fixture
def broker(engine: Engine, bucket: ObjectStore) -> Broker:
    """A broker on them."""
    return Broker(engine, bucket, SECRET)


def ticket(broker: Broker, reference: str = "acme/alice", lasting: timedelta = MINUTES) -> Ticket:
    """By a fresh grant."""
    return broker.ticket(broker.grant("acme", HOUR, NOW), reference, lasting, NOW)


def answer(url: str, method: str = "GET") -> int:
    """The server's status."""
    asked = urllib.request.Request(url, method=method, data=b"evil" if method == "PUT" else None)
    try:
        with urllib.request.urlopen(asked, timeout=30) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_a_ticket_of_an_unsigned_version_is_refused_where_a_key_is_set(
    engine: Engine, broker: Broker, bucket: ObjectStore, claim: Claim, both: Versions, tmp_path: Path
) -> None:
    """A broker's word is not the signer's; a signed version passes."""
    private, public = write_pair(tmp_path / "keys")
    publish(engine, bucket, claim(reference="acme/bob")[0], finished("signed"), NOW, Signer(private))

    with pytest.raises(SignatureRefused, match="not signed"):
        redeem(ticket(broker), tmp_path / "cache", verifier=Verifier([public]))

    assert redeem(ticket(broker, "acme/bob"), tmp_path / "cache", verifier=Verifier([public])).is_dir()


WITHOUT = """
import os, sys
from pathlib import Path
from registry.tickets import Ticket, redeem
assert not [name for name in os.environ if name.startswith(("AWS_", "LORA_"))]
print(redeem(Ticket.read(sys.stdin.read()), Path(sys.argv[1])))
"""


def test_a_ticket_pulls_its_version_without_any_credentials(broker: Broker, both: Versions, tmp_path: Path) -> None:
    """In a process that has neither keys nor a database, verified like any pull, and whole."""
    text = ticket(broker).model_dump_json()

    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, tmp_path / "cache"], input=text, env={"PATH": ""},
        cwd=Path(__file__).parents[2], capture_output=True, text=True,
    )  # fmt: skip

    folder = Path(done.stdout.strip())
    assert folder.name == both["acme"].served_name, done.stderr
    assert (folder / "weights.bin").read_text() == "acme's"
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "weights.bin"]


def test_a_ticket_names_exactly_one_versions_files(broker: Broker, both: Versions) -> None:
    """Below the keys of its own tenant."""
    made = ticket(broker)

    paths = {urlsplit(file.url).path for file in made.files.values()}
    assert {path.rpartition("/t/")[2] for path in paths} == {
        f"{both['acme'].prefix.removeprefix('t/')}/{name}" for name in ("weights.bin", "manifest.json")
    }
    assert "X-Amz-Signature" not in repr(made)


def test_the_server_itself_refuses_another_key_method_or_time(
    broker: Broker, both: Versions, bucket: ObjectStore, s3_server: S3Server
) -> None:
    """A signature fits one object, one method, one span of time: not ours to check, the store's."""
    if not s3_server.real:
        pytest.skip("moto checks no signature: needs the real S3 server; run infra/install-test-servers")
    made = ticket(broker)
    url = made.files["weights.bin"].url
    foreign = url.replace(both["acme"].prefix, both["globex"].prefix)
    assert foreign != url
    bucket_url = url.replace(f"/{made.prefix}/weights.bin", "")
    longer = url.replace("X-Amz-Expires=300", "X-Amz-Expires=3000")
    assert longer != url

    assert answer(url) == 200
    assert answer(foreign) == 403
    assert answer(url.replace("weights.bin", "manifest.json")) == 403
    assert answer(url.replace("/weights.bin", f"/{quote('../../', safe='')}weights.bin")) == 403
    assert answer(bucket_url) == 403
    assert answer(longer) == 403
    assert answer(url, "PUT") == 403
    assert answer(url, "DELETE") == 403
    assert answer(url.partition("?")[0]) == 403
    assert bucket.get(f"{both['acme'].prefix}/weights.bin") == b"acme's"


def test_a_ticket_that_is_over_is_refused_by_the_server(
    broker: Broker, both: Versions, s3_server: S3Server, tmp_path: Path
) -> None:
    """And the client says so, without the URL."""
    if not s3_server.real:
        pytest.skip("moto checks no expiry: needs the real S3 server; run infra/install-test-servers")
    import time

    made = ticket(broker, lasting=timedelta(seconds=1))
    time.sleep(2.5)

    with pytest.raises(StoreUnavailable, match="refused \\(403\\).*new ticket") as caught:
        redeem(made, tmp_path)

    assert "Signature" not in str(caught.value)


@pytest.mark.usefixtures("both")
def test_a_grant_is_for_one_tenant_and_for_a_while(broker: Broker) -> None:
    """Forged, foreign, stretched and over are refused; no ticket outlives its grant."""
    grant = broker.grant("acme", HOUR, NOW)
    tenant, end, signature = grant.split(".")
    later = NOW + timedelta(minutes=58)

    for wrong in (
        "", "acme", f"globex.{end}.{signature}", f"{tenant}.{int(end) + 1}.{signature}", f"{tenant}.{end}.{'0' * 64}",
        f"{tenant}.{end}.", f"..{signature}", "a.b.c.\ud800", grant + "é",
        Broker(broker.engine, broker.store, "f" * 32).grant("acme", HOUR, NOW),
    ):  # fmt: skip
        with pytest.raises(GrantRefused, match="ask for a new one"):
            broker.ticket(wrong, "acme/alice", MINUTES, NOW)
    with pytest.raises(GrantRefused, match="of acme, not of globex"):
        broker.ticket(grant, "globex/alice", MINUTES, NOW)
    with pytest.raises(GrantRefused, match="over at"):
        broker.ticket(grant, "acme/alice", MINUTES, NOW + HOUR)
    with pytest.raises(NotFound):
        broker.ticket(grant, "acme/bob", MINUTES, NOW)
    assert broker.ticket(grant, "acme/alice", MINUTES, later).until == NOW + HOUR


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("lasting", [timedelta(0), timedelta(days=400)])
def test_nothing_lasts_for_ever(broker: Broker, lasting: timedelta) -> None:
    """Leave is short, and the limits are told."""
    with pytest.raises(GrantRefused, match="between a second and"):
        broker.grant("acme", lasting, NOW)
    with pytest.raises(GrantRefused, match="a second to"):
        ticket(broker, lasting=lasting)


def test_a_secret_must_be_long(engine: Engine, bucket: ObjectStore) -> None:
    """Or it can be guessed; and it is not shown."""
    with pytest.raises(SettingRefused, match="LORA_GRANT_SECRET") as caught:
        Broker(engine, bucket, "geheim")
    assert "geheim" not in str(caught.value)


def test_a_folder_signs_nothing(engine: Engine, claim: Claim, tmp_path: Path) -> None:
    """And says what to do instead."""
    store = FolderStore(tmp_path)
    publish(engine, store, claim()[0], finished(), NOW)

    with pytest.raises(StoreUnavailable, match="signs no URLs; use a store on S3"):
        ticket(Broker(engine, store, SECRET))


@pytest.mark.usefixtures("both")
def test_bytes_that_are_not_what_the_ticket_says_are_refused(broker: Broker, tmp_path: Path) -> None:
    """Also when the URL of one file is put in another's place."""
    made = ticket(broker)
    body = json.loads(made.model_dump_json())
    body["files"]["weights.bin"]["url"] = body["files"]["manifest.json"]["url"]

    with pytest.raises(ObjectDiffers):
        redeem(Ticket.read(json.dumps(body)), tmp_path)


def _forged(**changes: Any) -> str:  # any JSON
    file = {"sha256": "a" * 64, "size": 1, "url": "http://127.0.0.1:9/x"}
    body = {
        "reference": "acme/alice:1", "number": 1, "state": "accepted", "served_name": "default-1", "prefix": "t/acme/x",
        "sha256": "b" * 64, "until": "2026-03-01T12:00:00Z", "files": {"manifest.json": file},
    }  # fmt: skip
    file |= changes.pop("file", {})
    return json.dumps(body | changes)


FORGED = {
    "not JSON": "{",
    "no object": "[]",
    "empty": "",
    "too long": " " * (1 << 21),
    "served name leads out": _forged(served_name="../../etc"),
    "digest leads out": _forged(sha256="../" * 20),
    "file leads out": _forged(files={"../x": {"sha256": "a" * 64, "size": 1, "url": "http://h/x"}}),
    "file is hidden": _forged(files={".ssh": {"sha256": "a" * 64, "size": 1, "url": "http://h/x"}}),
    "prefix leads out": _forged(prefix="t/../x"),
    "reads a local file": _forged(file={"url": "file:///etc/passwd"}),
    "reads by ftp": _forged(file={"url": "ftp://h/x"}),
    "URL without host": _forged(file={"url": "http:///x"}),
    "negative size": _forged(file={"size": -1}),
    "more than there is": _forged(evil=True),
}


@pytest.mark.parametrize("text", FORGED.values(), ids=FORGED)
def test_a_forged_ticket_is_refused_before_anything_is_written(text: str, tmp_path: Path) -> None:
    """A ticket decides where files go: it is checked like any name."""
    with pytest.raises(TicketRefused, match="new ticket") as caught:
        redeem(Ticket.read(text), tmp_path)

    assert len(str(caught.value)) < 300
    assert list(tmp_path.iterdir()) == []


ANSWERS = {
    "a redirect is not followed": (302, {"Location": "http://127.0.0.1:9/secret"}, r"refused \(302\).*new ticket"),
    "a server in trouble": (503, {}, r"trouble with .*manifest.json \(503\); try again"),
    "a connection that broke off": (200, {"Content-Length": "1"}, "manifest.json broke off .*try again"),
}


@pytest.mark.parametrize(("status", "headers", "told"), ANSWERS.values(), ids=ANSWERS)
def test_an_answer_that_is_not_the_object_is_told_for_what_it_is(
    tmp_path: Path, status: int, headers: dict[str, str], told: str
) -> None:
    """A store that answers has the object itself; who hears of a corrupt one should not have lost a connection."""

    class Odd(BaseHTTPRequestHandler):
        """Answers without a body."""

        def do_GET(self) -> None:
            self.send_response(status)
            for header in headers.items():
                self.send_header(*header)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with HTTPServer(("127.0.0.1", 0), Odd) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/x"
        try:
            with pytest.raises(StoreUnavailable, match=told):
                redeem(Ticket.read(_forged(file={"url": url})), tmp_path)
        finally:
            server.shutdown()
