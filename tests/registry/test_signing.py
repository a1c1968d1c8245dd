"""Signed versions: upstream's own verifier takes them, and a pull with keys takes nothing else."""

import hashlib
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from sqlalchemy.engine import Engine

from registry import jobs
from registry.client import Client, Resolved
from registry.errors import ManifestRefused, ObjectDiffers, ObjectMissing, SignatureRefused
from registry.publishing import Published, declare, publish, signed
from registry.pulling import Puller
from registry.session import transaction
from registry.signing import SIGNATURE, Signer, Verifier
from registry.store import FolderStore
from registry.uploads import UPLOAD_LEASE, sweep
from tests.registry.conftest import LEASE, NOW, Claim, finished
from tests.registry.test_publishing import DyingStore

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


def write_pair(folder: Path, key: Key | None = None, password: bytes | None = None) -> tuple[Path, Path]:
    """A private key's file and its public one's."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    locked = pem.BestAvailableEncryption(password) if password else pem.NoEncryption()
    folder.mkdir(exist_ok=True)
    (folder / "key.pem").write_bytes(key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, locked))
    public = key.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo)
    (folder / "key.pub").write_bytes(public)
    return folder / "key.pem", folder / "key.pub"


@pytest.fixture
def database_url(tmp_path: Path) -> str:
    """One kind of database: signatures never come near it."""
    return f"sqlite:///{tmp_path / 'registry.db'}"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """The factory's keys."""
    return write_pair(tmp_path / "keys")


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A public key that signed nothing."""
    return write_pair(tmp_path / "other")[1]


@pytest.fixture
def published(engine: Engine, store: FolderStore, claim: Claim, pair: tuple[Path, Path]) -> Published:
    """Alice's version 1, signed."""
    return publish(engine, store, claim()[0], finished(), NOW, Signer(pair[0]))


Trusting = Callable[..., Client]


@pytest.fixture
def trusting(engine: Engine, store: FolderStore, tmp_path: Path) -> Trusting:
    """A client that trusts these keys, always on the same cache."""
    return lambda *keys: Client(engine, store, tmp_path / "cache", verifier=Verifier(keys))


def visible(cache: Path) -> list[Path]:
    """Every file that somebody could read in a cache."""
    return [
        path
        for path in cache.rglob("*")
        if path.is_file() and not path.name.startswith(".signed-") and path.suffix != ".lock"
    ]


def test_upstreams_verifier_takes_a_pulled_folder(
    published: Published, trusting: Trusting, pair: tuple[Path, Path]
) -> None:
    """None of our code runs in it."""
    folder = trusting().pull("acme/alice")

    command = [sys.executable, "-I", "-m", "model_signing", "verify", "key", str(folder)]
    options = ["--signature", str(folder / SIGNATURE), "--public_key", str(pair[1])]
    result = subprocess.run([*command, *options], capture_output=True, text=True, cwd=folder.parent)
    (folder / "weights.bin").write_text("weightz")
    again = subprocess.run([*command, *options], capture_output=True, text=True, cwd=folder.parent)

    assert (result.returncode, "succeeded" in result.stdout) == (0, True), result.stderr
    assert again.returncode != 0
    assert "weights.bin" in again.stderr


def test_a_signed_version_passes_the_factorys_key_among_several(
    published: Published, trusting: Trusting, pair: tuple[Path, Path], other: Path
) -> None:
    """So keys can be changed: the new one is trusted before the old one is not."""
    assert trusting(other, pair[1]).pull("acme/alice").name == published.served_name


def test_a_key_that_is_no_longer_trusted_vouches_for_nothing(
    published: Published, trusting: Trusting, pair: tuple[Path, Path], other: Path
) -> None:
    """Not for what it let into the cache either."""
    trusting(pair[1]).pull("acme/alice")

    with pytest.raises(SignatureRefused, match="is trusted"):
        trusting(other).pull("acme/alice")

    assert visible(trusting().cache.root) == []


def test_an_unsigned_version_is_refused_and_never_visible(
    engine: Engine, store: FolderStore, claim: Claim, trusting: Trusting, other: Path
) -> None:
    """Without keys it is what it always was."""
    publish(engine, store, claim()[0], finished(), NOW)

    with pytest.raises(SignatureRefused, match="not signed"):
        trusting(other).pull("acme/alice")

    assert visible(trusting().cache.root) == []
    assert trusting().pull("acme/alice").is_dir()


def test_what_was_pulled_before_there_was_a_key_is_checked_once(
    published: Published, trusting: Trusting, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """A warm pull then asks neither the store nor the signature again."""
    folder = trusting().pull("acme/alice")
    trusting(pair[1]).pull("acme/alice")
    (folder / SIGNATURE).unlink()  # would be missed by whoever checked it again

    assert trusting(pair[1]).pull("acme/alice") == folder


def test_what_was_changed_in_the_cache_before_there_was_a_key_is_fetched_anew(
    published: Published, trusting: Trusting, pair: tuple[Path, Path]
) -> None:
    """The signature finds it, where the digests are not looked at."""
    (trusting().pull("acme/alice") / "weights.bin").write_text("evil")

    assert (trusting(pair[1]).pull("acme/alice") / "weights.bin").read_text() == "weights"


def test_a_retry_of_the_same_job_is_the_same_version_with_the_first_signature(
    engine: Engine, store: FolderStore, claim: Claim, trusting: Trusting, pair: tuple[Path, Path]
) -> None:
    """Signatures of equal files differ: one that lies there after a crash is kept."""
    (job,), signer, done = claim(), Signer(pair[0]), finished()
    digest = hashlib.sha256(done.files["manifest.json"]).hexdigest()
    prefix = declare(engine, job, digest, NOW)
    first = signed(store, prefix, done.files, signer)[SIGNATURE]  # and here it was killed

    made = publish(engine, store, job, done, NOW, signer)

    assert publish(engine, store, job, done, NOW, signer) == made
    assert (made.prefix, (trusting(pair[1]).pull("acme/alice") / SIGNATURE).read_bytes()) == (prefix, first)


@pytest.mark.parametrize("writes", range(3))
@pytest.mark.parametrize("same_holder", [True, False])
def test_a_death_between_uploads_of_a_signed_version_leaves_one_version_and_no_orphan(
    engine: Engine, store: FolderStore, claim: Claim, trusting: Trusting, pair: tuple[Path, Path],
    writes: int, same_holder: bool,
) -> None:  # fmt: skip
    """Whoever goes on, the same holder or the next one, and whatever lay there already."""
    (job,), signer, later = claim(), Signer(pair[0]), NOW + 2 * UPLOAD_LEASE
    with pytest.raises(KeyboardInterrupt):
        publish(engine, DyingStore(store.root, writes), job, finished(), NOW, signer)
    if not same_holder:
        with transaction(engine) as session:
            (job,) = jobs.claim(session, "next", LEASE, 1, later)

    done = publish(engine, store, job, finished(), later, signer)
    sweep(engine, store, later)
    sweep(engine, store, later + 2 * UPLOAD_LEASE)

    names = sorted(key.removeprefix(f"{done.prefix}/") for key in store.keys(""))
    assert (done.number, names) == (1, ["manifest.json", SIGNATURE, "weights.bin"])
    assert trusting(pair[1]).pull("acme/alice").name == done.served_name


def test_a_signature_of_another_key_under_the_same_name_is_no_retrys(
    engine: Engine, store: FolderStore, claim: Claim, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """It is told; the job's next attempt has a name of its own."""
    (job,), done = claim(), finished()
    prefix = declare(engine, job, hashlib.sha256(done.files["manifest.json"]).hexdigest(), NOW)
    signed(store, prefix, done.files, Signer(write_pair(tmp_path / "old")[0]))

    with pytest.raises(SignatureRefused, match="is trusted"):
        publish(engine, store, job, done, NOW, Signer(pair[0]))


class Rewritten:
    """A store of which somebody rewrites one version, and a registry that says what they want it to say."""

    def __init__(self, found: Resolved, files: dict[str, bytes]) -> None:
        self.files = files
        named: dict[str, dict[str, int | str]] = {
            name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)} for name, data in files.items()
        }
        self.found = replace(found, sha256=str(named["manifest.json"]["sha256"]), files=named)

    def stream(self, key: str) -> Iterator[bytes]:
        """Their bytes."""
        yield self.files[key.rpartition("/")[2]]


def consistent(files: dict[str, bytes]) -> dict[str, bytes]:
    """With a manifest that names the bytes that are there now: all that is unsigned agrees with itself."""
    manifest = json.loads(files["manifest.json"])
    manifest["files"]["weights.bin"]["sha256"] = hashlib.sha256(files["weights.bin"]).hexdigest()
    return {**files, "manifest.json": json.dumps(manifest).encode()}


def tampered(files: dict[str, bytes], generator: random.Random) -> dict[str, bytes]:
    """One byte of one file changed."""
    name = generator.choice(sorted(files))
    data = bytearray(files[name])
    data[generator.randrange(len(data))] ^= generator.randrange(1, 256)
    return {**files, name: bytes(data)}


@pytest.mark.parametrize("count", [150, pytest.param(1000, marks=pytest.mark.long)])
def test_a_byte_that_was_changed_anywhere_is_refused(
    published: Published, trusting: Trusting, pair: tuple[Path, Path], tmp_path: Path, count: int
) -> None:
    """In the store under the registry's digests, and with a registry rewritten to fit; nothing gets visible."""
    generator = random.Random(count)
    found = trusting().resolve("acme/alice")
    good = {path.name: path.read_bytes() for path in trusting().pull("acme/alice").iterdir()}
    refusals: dict[str, int] = {}
    for number in range(count):
        changed = tampered(good, generator)
        if number % 4 == 0:  # the registry stays as it was
            source, asked = Rewritten(found, changed), found
        else:
            source = Rewritten(found, consistent(changed) if changed["weights.bin"] != good["weights.bin"] else changed)
            asked = source.found
        with pytest.raises((SignatureRefused, ObjectDiffers, ObjectMissing, ManifestRefused)) as caught:
            Puller(source, tmp_path / "other-cache", verifier=Verifier([pair[1]])).fetch(asked)
        refusals[caught.type.__name__] = refusals.get(caught.type.__name__, 0) + 1

    assert visible(tmp_path / "other-cache") == []
    assert refusals["SignatureRefused"] > count / 3
    assert refusals["ObjectDiffers"] >= count // 4
    whole = Rewritten(found, good)
    assert Puller(whole, tmp_path / "other-cache", verifier=Verifier([pair[1]])).fetch(whole.found).is_dir()


def test_a_signature_that_leaves_a_file_out_is_refused(
    published: Published, trusting: Trusting, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """Upstream's own verifier takes it, since the signer wanted it so."""
    folder = trusting().pull("acme/alice")
    command = [sys.executable, "-I", "-m", "model_signing", "sign", "key", str(folder), "--private_key", str(pair[0])]
    left_out = ["--ignore-paths", str(folder / "weights.bin"), "--signature", str(folder / SIGNATURE)]
    subprocess.run([*command, *left_out], check=True, capture_output=True, cwd=folder.parent)

    with pytest.raises(SignatureRefused, match="other files are signed"):
        Verifier([pair[1]]).check(folder)


def test_a_signature_says_which_version_it_is_of(
    published: Published, trusting: Trusting, pair: tuple[Path, Path]
) -> None:
    """Under another name, an old version's files are not a new one's."""
    folder = trusting().pull("acme/alice")
    renamed = folder.rename(folder.with_name("default-newer"))

    with pytest.raises(SignatureRefused, match="made for"):
        Verifier([pair[1]]).check(renamed)


@pytest.mark.parametrize(
    "bundle",
    [
        b"", b"{}", b"[]", b"null", b"[" * 100_000, b"\xff\xfe", b" " * ((1 << 20) + 1), b'{"dsseEnvelope":{}}',
        b'{"dsseEnvelope":{"signatures":[1]},"verificationMaterial":[]}',
        b'{"dsseEnvelope":{"payload":1,"signatures":[{"sig":2}]},"verificationMaterial":{"publicKey":{"hint":3}}}',
    ],
    ids=range(10),
)  # fmt: skip
def test_what_is_no_signature_is_told_in_words(
    published: Published, trusting: Trusting, pair: tuple[Path, Path], bundle: bytes
) -> None:
    """Whatever stands in its place."""
    folder = trusting().pull("acme/alice")
    (folder / SIGNATURE).write_bytes(bundle)

    with pytest.raises(SignatureRefused, match="no bundle"):
        Verifier([pair[1]]).check(folder)


HOSTILE_MANIFESTS = {
    "deep": "[" * 50_000,
    "no files": "{}",
    "list": '{"files": []}',
    "no digest": '{"files": {"a": {}}}',
    "digest a number": '{"files": {"a": {"sha256": 5}}}',
    "digest a path": '{"files": {"a": {"sha256": "../../x"}}}',
    "traversal": '{"files": {"../../a": {"sha256": "' + "0" * 64 + '"}}}',
    "itself": '{"files": {"manifest.json": {"sha256": "' + "0" * 64 + '"}}}',
    "many": json.dumps({"files": {f"a{number}": {"sha256": "0" * 64} for number in range(1000)}}),
    "not UTF-8": "\udcff",
}


@pytest.mark.parametrize("kind", HOSTILE_MANIFESTS)
def test_a_hostile_manifest_is_told_in_words(
    published: Published, trusting: Trusting, tmp_path: Path, kind: str
) -> None:
    """It comes from outside where a ticket says that it is right."""
    content = HOSTILE_MANIFESTS[kind].encode(errors="surrogateescape")
    source = Rewritten(trusting().resolve("acme/alice"), {"manifest.json": content})

    with pytest.raises(ManifestRefused):
        Puller(source, tmp_path / "cache").fetch(source.found)


def test_without_keys_nothing_of_model_signing_is_imported() -> None:
    """An inference host that does not use it need not have it."""
    code = "import sys, registry.client, registry.publishing, flows.cli; print('model_signing' in sys.modules)"
    root = Path(__file__).parents[2]

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root).stdout == "False\n"
