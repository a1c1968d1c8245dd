"""`lora grant`, `ticket` and `redeem`: pulls for hosts that hold neither store credentials nor a database."""

import sys
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.printing import VersionReference, say
from flows.cli.typed import standard_input
from flows.errors import Unready
from flows.factory import now
from registry.broker import Broker
from registry.settings import RegistrySettings
from registry.tickets import LARGEST, Ticket
from registry.tickets import redeem as redeem_ticket


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    for command in (grant, ticket, redeem):
        app.command()(command)


def grant(
    tenant: Annotated[str, typer.Argument(help="Whose versions may be asked for.")],
    seconds: Annotated[int, typer.Option(min=1, max=86400, help="How long.")] = 3600,
) -> None:
    """Print a token with which this tenant's tickets are given out; needs LORA_GRANT_SECRET.

    lora grant acme --seconds 3600
    """
    say(Broker.from_environment().grant(tenant, timedelta(seconds=seconds), now()))


def ticket(
    reference: VersionReference,
    grant: Annotated[str, typer.Option("--grant", envvar="LORA_GRANT", help="A token of `lora grant`.")],
    seconds: Annotated[int, typer.Option(min=1, max=3600, help="How long.")] = 900,
) -> None:
    """Print a ticket: presigned URLs of exactly one version's files, as JSON.  Needs S3, and LORA_GRANT_SECRET.

    lora ticket acme/alice@production --grant "$TOKEN" > ticket.json
    """
    made = Broker.from_environment().ticket(grant, reference, timedelta(seconds=seconds), now())
    sys.stdout.write(made.model_dump_json(indent=2) + "\n")


def redeem(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A ticket; - reads it from stdin.")],
    verify: Annotated[bool, typer.Option("--verify", help="Hash a cached copy again.")] = False,
) -> None:
    """Pull what a ticket gives leave to, verified; prints the folder.  Needs no credentials and no database.

    lora redeem ticket.json
    """
    try:
        with standard_input("name a file").buffer if file == "-" else Path(file).open("rb") as stream:
            text = stream.read(LARGEST + 1).decode("utf-8-sig")
    except ValueError as error:  # no UTF-8, or a path with a null byte
        what = f"{ascii(file)[:80]} is no ticket ({type(error).__name__})"
        raise Unready(what, "give a file of `lora ticket`") from None
    settings = RegistrySettings.read()
    say(str(redeem_ticket(Ticket.read(text), settings.cache, verify, settings.cache_size, settings.verifier)))
