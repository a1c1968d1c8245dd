"""Where registry, store and cache are: read once from the environment, frozen, passed down."""

import os
from pathlib import Path
from typing import Annotated, Self

from pydantic import ByteSize, Field, StringConstraints, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from registry.errors import SettingRefused
from registry.key_files import VERIFY_KEY
from registry.signing import Signer, Verifier

# A blank or an end of line around it, as a secret's file may have, is no part of a URL.
Url = Annotated[str, StringConstraints(strip_whitespace=True)]


class RegistrySettings(BaseSettings):
    """Settings of everything that talks to the registry; names begin with LORA_ in the environment.

    Each may also be a file of the same name (lora_database_url) in the folder that LORA_SECRETS names, as Docker and
    Kubernetes mount secrets; the environment goes before it.
    """

    model_config = SettingsConfigDict(env_prefix="LORA_", frozen=True, extra="ignore", env_ignore_empty=True)

    home: Path = Path("~/.lora")  # caches, and registry and store where no URL says otherwise
    cache_size: ByteSize = ByteSize(50 * 1024**3)  # of pulled adapters, such as 20GB; 0: as many as are pulled
    database_url: Url = Field(default="", repr=False)  # may hold a password
    database_owner_url: Url = Field(default="", repr=False)  # PostgreSQL: whose tables they are; for `lora setup` only
    store_url: Url = ""
    gpu_hour_cost: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None  # shown as what versions cost
    grant_secret: str = Field(default="", repr=False)  # with which a broker signs its grants
    signing_key: Path | None = None  # a private key (PEM, elliptic curve), with which versions are signed at publish
    verify_key: str = ""  # public keys, commas between: only versions that one of them signed are pulled
    receipt_secret: str = Field(default="", repr=False)  # without it nobody can tell whom a receipt is about; keep it

    @classmethod
    def read(cls, **given: object) -> Self:
        """The settings as the environment says, but for those that are given.  Raises SettingRefused."""
        given = {name: value for name, value in given.items() if value is not None}
        try:
            return cls(**{"_secrets_dir": _secrets(), **given})  # type: ignore[arg-type]  # pydantic reads them itself
        except ValidationError as error:
            wrong = error.errors()[0]
            named = "_".join(map(str, wrong["loc"]))
            variable = f"--{named}" if named in given else f"LORA_{named}".upper()
            raise SettingRefused(variable, str(wrong["input"]), wrong["msg"].removeprefix("Value error, ")) from None
        except SettingsError as error:  # a file that is no text
            raise SettingRefused("LORA_SECRETS", str(_secrets()), str(error)) from None

    @field_validator("home")
    @classmethod
    def _of_somebody(cls, home: Path) -> Path:
        try:
            home.expanduser()
        except RuntimeError:  # pathlib's word for a home that it does not know
            raise ValueError("it begins with the home of nobody") from None
        return home

    @property
    def home_folder(self) -> Path:
        """The home folder, absolute."""
        return self.home.expanduser().absolute()

    @property
    def database(self) -> str:
        """The registry's URL: by default SQLite in the home folder, for one trusted machine."""
        return self.database_url or f"sqlite:///{self.home_folder / 'registry.db'}"

    @property
    def store(self) -> str:
        """The object store's URL: by default a folder in the home folder."""
        return self.store_url or (self.home_folder / "store").as_uri()

    @property
    def cache(self) -> Path:
        """Where pulled adapters are kept."""
        return self.home_folder / "pulled"

    @property
    def signer(self) -> Signer | None:
        """What signs versions, if anything does.  Raises SettingRefused."""
        return Signer(_path(self.signing_key)) if self.signing_key else None

    @property
    def verifier(self) -> Verifier:
        """What a version must pass before it is used: without keys, nothing.  Raises SettingRefused."""
        if not self.verify_key:
            return Verifier()
        named = [part.strip() for part in self.verify_key.split(",")]
        if not all(named):  # never as if there were no keys
            raise SettingRefused(VERIFY_KEY, self.verify_key, "a key's path is missing beside a comma")
        return Verifier([_path(Path(one)) for one in named])


def _path(given: Path) -> Path:
    """A path of a setting, with the home that it may begin with."""
    try:
        return given.expanduser()
    except RuntimeError:  # pathlib's word for a home that it does not know
        return given


def _secrets() -> Path | None:
    """The folder of secrets, where one is named.  Raises SettingRefused: a forgotten mount is not an empty folder."""
    named = os.environ.get("LORA_SECRETS")
    if not named:
        return None
    try:
        for file in Path(named).iterdir():
            if file.is_file():
                file.open("rb").close()
    except OSError as error:
        raise SettingRefused("LORA_SECRETS", named, f"{error.filename} cannot be read ({error.strerror})") from None
    return Path(named)
