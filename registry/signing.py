"""Signatures of versions, as OpenSSF model-signing makes and checks them: at publish and pull, where keys are set.

A signature is one more file of the version: a sigstore bundle over all its other files, which upstream's own
`model_signing verify key` takes.  The library is imported when there is something to sign or to check, never before.
"""

import base64
import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from registry.errors import SignatureRefused
from registry.key_files import VERIFY_KEY, PublicKey, public_half, public_key, read_key

SIGNATURE = "model.sig"
_MOST = 1 << 20  # bytes of a signature
_STATEMENT = "https://model_signing/signature/v1.0"
_FIX = "have it published anew with LORA_SIGNING_KEY set, or take another version"


class Signer:
    """Signs versions with one private key."""

    def __init__(self, key: Path) -> None:
        """Read the key: a wrong one is told before any work.  Raises SettingRefused."""
        self._key, self.public = key, public_half(key)

    def sign(self, served_name: str, files: Mapping[str, bytes]) -> bytes:
        """The signature of a version's files under its served name; never the same bytes twice."""
        from model_signing.signing import Config

        with tempfile.TemporaryDirectory(prefix="lora-sign-") as aside:
            signature, config = Path(aside, SIGNATURE), Config().set_hashing_config(_hashing())
            config.use_elliptic_key_signer(private_key=self._key).sign(_laid_out(aside, served_name, files), signature)
            return signature.read_bytes()

    def check(self, served_name: str, files: Mapping[str, bytes]) -> None:
        """Whether the signature among these files is of this key and of all the others.  Raises SignatureRefused."""
        with tempfile.TemporaryDirectory(prefix="lora-sign-") as aside:
            _check(_laid_out(aside, served_name, files), [self.public])


class Verifier:
    """Takes only versions that one of some public keys has signed; without keys it takes any."""

    def __init__(self, keys: Sequence[Path] = ()) -> None:
        """Read the keys' files.  Raises SettingRefused for one that cannot be read."""
        self._files = {key: hashlib.sha256(read_key(VERIFY_KEY, key)).hexdigest()[:16] for key in keys}

    @property
    def keys(self) -> list[PublicKey]:
        """The keys.  Raises SettingRefused for a file that holds none."""
        return [public_key(path) for path in self._files]

    def check(self, folder: Path) -> None:
        """Whether a key has signed exactly the files of this folder, under its name.  Raises SignatureRefused."""
        if self._files:
            _check(folder, self.keys)

    def knows(self, folder: Path) -> bool:
        """Whether this folder passed `check` under these keys; looked up beside it, so that it is hashed once."""
        marks = [folder.parent / f".signed-{folder.name}-{digest}" for digest in self._files.values()]
        if not marks or any(mark.exists() for mark in marks):
            return True
        for path, mark in zip(self._files, marks, strict=True):
            if _fits(folder, public_key(path)):
                with suppress(OSError):  # a cache that this process may only read
                    mark.touch()
                return True
        return False


def _fits(folder: Path, key: PublicKey) -> bool:
    try:
        _check(folder, [key])
    except SignatureRefused:
        return False
    return True


def _check(folder: Path, keys: Sequence[PublicKey]) -> None:
    """Whether the signature in a folder is one of these keys', of all its other files and of its name."""
    from model_signing.verifying import Config

    bundle = _bundle(folder)
    hint = bundle["verificationMaterial"]["publicKey"]["hint"]
    key = next((key for key in keys if key.hint == hint), None)
    if key is None:
        trusted = ", ".join(known.hint[:16] for known in keys)
        raise SignatureRefused(folder.name, f"it is signed with key {hint[:16]}, and only {trusted} is trusted", _FIX)
    config = Config().set_hashing_config(_hashing(SIGNATURE))
    try:
        with tempfile.NamedTemporaryFile(suffix=".pem") as file:
            file.write(key.pem)
            file.flush()
            config.use_elliptic_key_verifier(public_key=Path(file.name)).verify(folder, folder / SIGNATURE)
        _check_covers(folder, json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"])))
    except Exception as error:  # upstream raises whatever Python does for what is no signature of these files
        why = f"its signature does not fit it ({type(error).__name__}: {ascii(str(error))[1:160]})"
        raise SignatureRefused(folder.name, why, _FIX) from None


def _check_covers(folder: Path, statement: Mapping[str, Any]) -> None:  # JSON that a trusted key has signed
    """Whether each file but the signature is signed, under this name: upstream lets a signer leave files out."""
    signed = sorted(one["name"] for one in statement["predicate"]["resources"])
    there = sorted(path.name for path in folder.iterdir() if path.name != SIGNATURE)
    if statement["predicateType"] != _STATEMENT or signed != there:
        raise ValueError("other files are signed than are there")
    if (name := statement["subject"][0]["name"]) != folder.name:
        raise ValueError(f"it was made for {name}")


def _bundle(folder: Path) -> dict[str, Any]:  # JSON, of the shape that is checked here
    """A signature in the one spelling that there is of it: a byte that changes nothing counts as tampering too."""
    path = folder / SIGNATURE
    if path.is_symlink() or not path.is_file():
        raise SignatureRefused(folder.name, "it is not signed", _FIX)
    try:
        if path.stat().st_size > _MOST:
            raise ValueError
        data = path.read_bytes()
        bundle = _exactly(json.loads(data))
        if json.dumps(bundle, separators=(",", ":")).encode() != data:
            raise ValueError
    except (ValueError, LookupError, TypeError, RecursionError):
        why = "its signature is no bundle of model-signing, or was changed"
        raise SignatureRefused(folder.name, why, _FIX) from None
    return bundle


def _exactly(given: Any) -> dict[str, Any]:  # JSON from outside
    """A bundle with nothing in it but what model-signing writes for a key."""
    envelope = given["dsseEnvelope"]
    (signature,) = envelope["signatures"]
    return {
        "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
        "verificationMaterial": {
            "publicKey": {"hint": str(given["verificationMaterial"]["publicKey"]["hint"])},
            "tlogEntries": [],
        },
        "dsseEnvelope": {
            "payload": _recoded(envelope["payload"]),
            "payloadType": "application/vnd.in-toto+json",
            "signatures": [{"sig": _recoded(signature["sig"]), "keyid": ""}],
        },
    }


def _recoded(text: str) -> str:
    """Base64 as one would write it: its last letter has bits that decode to nothing."""
    return base64.b64encode(base64.b64decode(text, validate=True)).decode()


def _laid_out(aside: str, name: str, files: Mapping[str, bytes]) -> Path:
    folder = Path(aside, name)
    folder.mkdir()
    for file, data in files.items():
        (folder / file).write_bytes(data)
    return folder


def _hashing(*ignored: str) -> Any:  # model_signing.hashing.Config, imported late
    from model_signing.hashing import Config

    return Config().set_ignored_paths(paths=ignored, ignore_git_paths=False)
