"""Keys of signatures: read from the environment, and told in words where they cannot be used."""

import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from registry import key_files
from registry.errors import SettingRefused
from registry.key_files import LIBRARIES
from registry.settings import RegistrySettings
from registry.signing import Signer, Verifier
from tests.registry.test_signing import write_pair


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """The factory's keys."""
    return write_pair(tmp_path / "keys")


def ugly_keys(folder: Path) -> dict[str, Path]:
    """Files that are no private key that can be used."""
    folder.mkdir()
    (folder / "garbage").write_bytes(random.Random(0).randbytes(200))
    (folder / "empty").touch()
    (folder / "huge").write_bytes(b"-" * 100_000)
    return {
        "missing": folder / "nowhere", "a folder": folder, "empty": folder / "empty", "garbage": folder / "garbage",
        "huge": folder / "huge", "public": write_pair(folder / "a")[1],
        "encrypted": write_pair(folder / "b", password=b"secret")[0],
        "rsa": write_pair(folder / "c", rsa.generate_private_key(65537, 2048))[0],
        "curve": write_pair(folder / "d", ec.generate_private_key(ec.SECP256K1()))[0],
        "null": Path("a\0b"),
    }  # fmt: skip


def test_a_key_that_cannot_be_used_is_told_before_any_work(tmp_path: Path) -> None:
    """Which variable, which file, and why."""
    for what, path in ugly_keys(tmp_path / "ugly").items():
        with pytest.raises(SettingRefused, match="LORA_SIGNING_KEY") as caught:
            Signer(path)
        assert len(str(caught.value).splitlines()) == 1, what


@pytest.mark.parametrize("missing", LIBRARIES)
@pytest.mark.parametrize("use", [Signer, lambda key: Verifier([key])])
def test_a_missing_library_is_told_before_any_work(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, use: Callable[[Path], object], missing: str
) -> None:
    """With what to install: not when a version that was trained is to be signed."""
    monkeypatch.setattr(key_files, "find_spec", lambda name: None if name == missing else name)
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.serialization", None)

    with pytest.raises(SettingRefused, match=r"pip install 'lora-factory\[signing\]'"):
        use(pair[0])


def test_a_public_key_that_is_none_is_told(tmp_path: Path) -> None:
    """A private one in its place too: it should not lie about on every host."""
    for what, path in ugly_keys(tmp_path / "ugly").items():
        if what != "public":
            with pytest.raises(SettingRefused, match="LORA_VERIFY_KEY"):
                _ = Verifier([path]).keys


@pytest.mark.parametrize("given", ["{key},", ",{key}", "{key}, ,{key}", ",", " "])
def test_a_list_of_keys_with_a_gap_is_told_as_it_was_given(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    """Taking a rotated key out may leave its comma: neither a key called '.', nor no keys at all."""
    monkeypatch.setenv("LORA_VERIFY_KEY", given.format(key=pair[1]))

    with pytest.raises(SettingRefused, match="missing beside a comma") as told:
        _ = RegistrySettings.read().verifier

    assert told.value.args[:2] == ("LORA_VERIFY_KEY", given.format(key=pair[1]))


def test_keys_are_read_from_the_environment(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One private key; public ones with commas between."""
    _, other = write_pair(tmp_path / "other")
    monkeypatch.setenv("LORA_SIGNING_KEY", str(pair[0]))
    monkeypatch.setenv("LORA_VERIFY_KEY", f"{pair[1]}, {other}")
    settings = RegistrySettings.read()

    assert settings.signer
    assert settings.signer.public == settings.verifier.keys[0]
    assert len(settings.verifier.keys) == 2
