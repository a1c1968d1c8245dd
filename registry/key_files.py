"""Keys of signatures in files: elliptic-curve keys as PEM, checked before they are used.  Raises SettingRefused."""

import hashlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from registry.errors import SettingRefused

SIGNING_KEY, VERIFY_KEY = "LORA_SIGNING_KEY", "LORA_VERIFY_KEY"
CURVES = ("secp256r1", "secp384r1", "secp521r1")  # what model-signing takes
LIBRARIES = ("cryptography", "model_signing", "OpenSSL")
_MOST = 1 << 14  # bytes of a key file


@dataclass(frozen=True)
class PublicKey:
    """One public key: its PEM bytes, and what a sigstore bundle calls it."""

    pem: bytes
    curve: str

    @property
    def hint(self) -> str:
        """SHA-256 of the PEM, as bundles name it."""
        return hashlib.sha256(self.pem).hexdigest()

    def __str__(self) -> str:
        return f"{self.curve} {self.hint[:16]}"


def public_half(path: Path) -> PublicKey:
    """The public key of a private one's file."""
    data = read_key(SIGNING_KEY, path)
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        return _public(load_pem_private_key(data, None).public_key())
    except Exception as error:  # of bytes that are no key, cryptography raises errors of many kinds
        why = f"it is no private key in PEM, unencrypted ({_on(error)})"
        raise SettingRefused(SIGNING_KEY, str(path), why) from None


def public_key(path: Path) -> PublicKey:
    """The public key in a file."""
    data = read_key(VERIFY_KEY, path)
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        return _public(load_pem_public_key(data))
    except Exception as error:  # as above
        raise SettingRefused(VERIFY_KEY, str(path), f"it is no public key in PEM ({_on(error)})") from None


def read_key(variable: str, path: Path) -> bytes:
    """What is in a key's file; also refused where the libraries that would use it are missing."""
    if any(find_spec(library) is None for library in LIBRARIES):
        raise SettingRefused(variable, str(path), "it needs another package: pip install 'lora-factory[signing]'")
    try:
        with path.open("rb") as file:
            data = file.read(_MOST + 1)
    except (OSError, ValueError) as error:  # a path with a null byte
        why = error.strerror if isinstance(error, OSError) else error
        raise SettingRefused(variable, str(path), f"the file cannot be read ({why})") from None
    if len(data) > _MOST:
        raise SettingRefused(variable, str(path), f"the file has more than {_MOST:,} bytes, so it is no key")
    return data


def _public(key: object) -> PublicKey:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    if not isinstance(key, EllipticCurvePublicKey) or key.curve.name not in CURVES:
        raise TypeError(f"take a key on a curve of {', '.join(CURVES)}")
    return PublicKey(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), key.curve.name)


def _on(error: Exception) -> str:
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__
