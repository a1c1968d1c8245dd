"""Leave to pull, for those who hold no credentials: a tenant's grant, and tickets for single versions.

A grant is a token that names a tenant and a moment, signed with the broker's secret: who holds it may ask for tickets
of that tenant until then.  A ticket holds presigned GETs of exactly one version's files.  The store checks those
itself: with another key, another method or too late, the signature does not fit.
"""

import hashlib
import hmac
from datetime import UTC, datetime, timedelta

from sqlalchemy.engine import Engine

from registry.client import Client
from registry.errors import GrantRefused, KeyRefused, NameRefused, SettingRefused
from registry.keys import user_prefix
from registry.names import Reference, check_plain
from registry.resolved import Resolved
from registry.session import open_database
from registry.settings import RegistrySettings
from registry.store import ObjectStore, open_store
from registry.tickets import File, Ticket

LONGEST_GRANT, LONGEST_TICKET = timedelta(days=1), timedelta(hours=1)
_SHORTEST_SECRET = 32  # characters


class Broker:
    """Gives out grants and tickets; holds the store's credentials, so that others need none."""

    def __init__(self, engine: Engine, store: ObjectStore, secret: str) -> None:
        if len(secret) < _SHORTEST_SECRET:
            allowed = f"give at least {_SHORTEST_SECRET} characters by chance"
            raise SettingRefused("LORA_GRANT_SECRET", "too short" if secret else "", allowed)
        self.engine, self.store, self._secret = engine, store, secret.encode()

    @classmethod
    def from_environment(cls) -> "Broker":
        """A broker from LORA_DATABASE_URL, LORA_STORE_URL and LORA_GRANT_SECRET.  Raises SettingRefused."""
        settings = RegistrySettings.read()
        return cls(open_database(settings.database), open_store(settings.store), settings.grant_secret)

    def grant(self, tenant: str, lasting: timedelta, now: datetime) -> str:
        """A token with which a tenant's tickets are given out for a while.  Raises GrantRefused, NameRefused."""
        if not timedelta(seconds=1) <= lasting <= LONGEST_GRANT:
            raise GrantRefused(f"it would last {lasting}", f"let it last between a second and {LONGEST_GRANT}")
        body = f"{check_plain('tenant', tenant)}.{int((now + lasting).timestamp())}"
        return f"{body}.{self._signed(body)}"

    def ticket(self, grant: str, reference: str, lasting: timedelta, now: datetime) -> Ticket:
        """Leave to pull what a reference means now, no longer than the grant lasts.

        Raises GrantRefused for a forged one, one that is over, and another tenant's; NotFound; and StoreUnavailable for
        a store that cannot sign.
        """
        tenant, until = self._checked(grant, now)
        wanted = Reference.parse(reference)
        if wanted.tenant != tenant:
            raise GrantRefused(f"it is of {tenant}, not of {wanted.tenant}", "ask for a version of its own tenant")
        if not timedelta(seconds=1) <= lasting <= LONGEST_TICKET:
            raise GrantRefused(f"a ticket of {lasting} was asked for", f"ask for a second to {LONGEST_TICKET}")
        found = Client(self.engine, self.store, RegistrySettings.read().cache).resolve(wanted)
        if not found.prefix.startswith(user_prefix(tenant, "")):
            raise KeyRefused(found.prefix, f"it does not lie below the keys of {tenant}")
        return self._ticket(found, min(until, now + lasting), now)

    def _ticket(self, found: Resolved, until: datetime, now: datetime) -> Ticket:
        seconds = max(1, int((until - now).total_seconds()))
        files = {
            name: File(
                sha256=str(facts["sha256"]),
                size=int(facts["size"]),
                url=self.store.signed_url(f"{found.prefix}/{name}", seconds),
            )
            for name, facts in found.files.items()
        }
        return Ticket(
            reference=f"{found.reference.label}:{found.number}", number=found.number, state=found.state,
            served_name=found.served_name, prefix=found.prefix, sha256=found.sha256, until=until, files=files,
        )  # fmt: skip

    def _checked(self, grant: str, now: datetime) -> tuple[str, datetime]:
        """Whose grant it is and until when.  Raises GrantRefused."""
        body, _, signature = grant.rpartition(".")
        if not hmac.compare_digest(self._signed(body).encode(), signature.encode(errors="replace")):
            raise GrantRefused("its signature does not fit", "ask for a new one")
        tenant, _, end = body.partition(".")
        try:
            until = datetime.fromtimestamp(int(end), UTC)
            check_plain("tenant", tenant)
        except (ValueError, OverflowError, OSError, NameRefused):  # signed, but by nothing that is this broker
            raise GrantRefused("it is none", "ask for a new one") from None
        if until <= now:
            raise GrantRefused(f"it was over at {until:%Y-%m-%d %H:%M:%S} UTC", "ask for a new one")
        return tenant, until

    def _signed(self, body: str) -> str:
        return hmac.new(self._secret, body.encode(errors="replace"), hashlib.sha256).hexdigest()
