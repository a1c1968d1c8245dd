"""Pull one version by a ticket: no database, no store credentials, only URLs that were signed for its files.

What a ticket says is checked like anything that comes from outside: it decides where files are written.
"""

from collections.abc import Iterator, Mapping
from datetime import datetime
from http.client import HTTPException, HTTPResponse, IncompleteRead
from pathlib import Path
from typing import Annotated, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, build_opener

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from registry.errors import KeyRefused, NameRefused, ObjectMissing, StoreUnavailable, TicketRefused
from registry.keys import checked_key
from registry.names import Reference, check_file, check_served
from registry.pulling import Puller
from registry.resolved import Resolved
from registry.signing import Verifier

_CHUNK = 1 << 20
_SECONDS = 60  # of silence, before a server counts as gone
LARGEST = 1 << 20  # bytes of a ticket
_MOST_FILE = 1 << 36  # bytes that a ticket may have written to this disk under one name
_AGAIN = "ask for a new ticket"


def _web(url: str) -> str:
    """A URL that leads to a server: a ticket must not read this machine's files."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("is no http or https URL")
    return url


Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
FileName = Annotated[str, AfterValidator(check_file)]


class File(BaseModel):
    """One file of a version, and the URL that gives it for a while."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: Sha256
    size: int = Field(ge=0, le=_MOST_FILE)
    url: Annotated[str, AfterValidator(_web)] = Field(repr=False)  # as good as a password while it lasts


class Ticket(BaseModel):
    """Leave to pull one version until a moment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reference: str
    number: int = Field(ge=1)
    state: str
    served_name: Annotated[str, AfterValidator(check_served)]
    prefix: Annotated[str, AfterValidator(checked_key)]
    sha256: Sha256  # of the manifest
    until: datetime
    files: dict[FileName, File]

    @classmethod
    def read(cls, text: str) -> "Ticket":
        """A ticket from its JSON.  Raises TicketRefused."""
        if len(text) > LARGEST:
            raise TicketRefused(f"it has {len(text)} characters", _AGAIN)
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            wrong = error.errors()[0]
            where = ".".join(ascii(part).strip("'") for part in wrong["loc"])[:80]
            raise TicketRefused(
                f"{where or 'it'}: {wrong['msg'].removeprefix('Value error, ')[:120]}", _AGAIN
            ) from None
        except (NameRefused, KeyRefused) as error:
            raise TicketRefused(str(error), _AGAIN) from None

    @property
    def resolved(self) -> Resolved:
        """What it gives leave to, as the registry would say it."""
        files: Mapping[str, Mapping[str, int | str]] = {
            name: {"sha256": file.sha256, "size": file.size} for name, file in self.files.items()
        }
        wanted = Reference.parse(self.reference)
        return Resolved(wanted, self.number, self.state, self.served_name, self.prefix, self.sha256, files)


class SignedSource:
    """The objects that a ticket names, by their signed URLs."""

    def __init__(self, ticket: Ticket) -> None:
        self._urls = {f"{ticket.prefix}/{name}": file.url for name, file in ticket.files.items()}
        self._open = build_opener(_Straight).open

    def stream(self, key: str) -> Iterator[bytes]:
        """The object in pieces.  Raises ObjectMissing, StoreUnavailable."""
        url = self._urls.get(key)
        if url is None:
            raise ObjectMissing(key, "the ticket")
        server = str(urlsplit(url).hostname)  # never the whole URL: it is as good as a password
        try:
            with self._open(url, timeout=_SECONDS) as response:
                yield from _pieces(response)
        except HTTPError as error:
            if error.code == 404:
                raise ObjectMissing(key, server) from None
            if error.code >= 500:
                raise StoreUnavailable(server, f"it has trouble with {key} ({error.code})", "try again") from None
            why = f"{key} is refused ({error.code}); the ticket's time may be over"
            raise StoreUnavailable(server, why, _AGAIN) from None
        except (URLError, HTTPException, OSError) as error:
            raise StoreUnavailable(server, f"{key} broke off ({type(error).__name__})", "try again") from None


def redeem(ticket: Ticket, cache: Path, verify: bool = False, limit: int = 0, verifier: Verifier | None = None) -> Path:
    """The local folder of the version that a ticket gives leave to, verified.  Raises as `Client.pull` does."""
    return Puller(SignedSource(ticket), cache, limit, verifier).fetch(ticket.resolved, verify)


class _Straight(HTTPRedirectHandler):
    """Goes nowhere but where the URL says."""

    def redirect_request(self, *_: Any, **__: Any) -> None:  # urllib's own arguments
        """Refuse: a store that answers has the object itself."""


def _pieces(response: HTTPResponse) -> Iterator[bytes]:
    while piece := response.read(_CHUNK):
        yield piece
    if response.length:  # http.client takes the end of a connection for that of the answer
        raise IncompleteRead(b"", response.length)
