"""Settings come from the environment, or from files as Docker and Kubernetes mount secrets."""

from pathlib import Path

import pytest

from registry.errors import SettingRefused
from registry.settings import RegistrySettings

URL = "postgresql+psycopg://lora_app:secret@db/lora"


@pytest.fixture
def secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of secrets that LORA_SECRETS names."""
    monkeypatch.setenv("LORA_SECRETS", str(tmp_path))
    monkeypatch.delenv("LORA_DATABASE_URL", raising=False)
    return tmp_path


def test_a_secret_may_be_a_file(secrets: Path) -> None:
    """With the newline that an editor leaves; what is no setting is not looked at."""
    (secrets / "lora_database_url").write_text(f"{URL}\n")
    (secrets / "aws_credentials").write_text("[default]\n")

    assert RegistrySettings.read().database == URL


def test_the_environment_goes_before_a_file(secrets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with every other place that settings come from."""
    (secrets / "lora_database_url").write_text("sqlite:///file.db")
    monkeypatch.setenv("LORA_DATABASE_URL", URL)

    assert RegistrySettings.read().database == URL


@pytest.mark.parametrize("kind", ["missing", "a file", "not text"])
def test_secrets_that_cannot_be_read_are_told(secrets: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A mount that was forgotten must not look like settings that were left out."""
    if kind == "not text":
        (secrets / "lora_database_url").write_bytes(b"\xff\xfe")
    else:
        (secrets / "file").touch()
        monkeypatch.setenv("LORA_SECRETS", str(secrets / ("file" if kind == "a file" else "nowhere")))

    with pytest.raises(SettingRefused, match="LORA_SECRETS"):
        RegistrySettings.read()


def test_a_wrong_value_in_a_file_is_told_by_its_setting(secrets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one of the environment is."""
    monkeypatch.delenv("LORA_HOME", raising=False)
    (secrets / "lora_home").write_text("~nobody-of-this-name/lora")

    with pytest.raises(SettingRefused, match="LORA_HOME"):
        RegistrySettings.read()
