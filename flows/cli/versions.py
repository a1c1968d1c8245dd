"""`lora promote`, `rollback`, `export` and `reproduce`: move aliases, and make other things of versions."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.fleet import All, Conditions, Number, Override, Source, promote_all, roll_back_all
from flows.cli.printing import AsJson, OwnReference, VersionReference, answer_one, say, size
from flows.factory import Factory, now, who
from registry import aliases, queries
from registry.client import Client
from registry.names import LATEST, Reference
from registry.session import transaction

AliasOption = Annotated[str, typer.Option("--alias", help="Which alias to move.")]
Reason = Annotated[str, typer.Option("--reason", help="Kept in the alias's history.")]
Expected = Annotated[int | None, typer.Option("--expect", help="Only if it is at this version now; 0: if it is new.")]


class Kind(StrEnum):
    """What an adapter can be exported as."""

    GGUF = "gguf"
    MERGED = "merged"


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    for command in (promote, rollback, export, reproduce):
        app.command()(command)


def promote(
    reference: VersionReference,
    alias: AliasOption = "production",
    reason: Reason = "by hand",
    force: Annotated[bool, typer.Option("--force", help="Also a version that the gate refused.")] = False,
    expect: Expected = None,
    override: Override = False,
    all_: All = False,
    where: Conditions = None,
    source: Source = LATEST,
) -> None:
    """Point an alias at a version; with --all, of all adapters of a tenant at once.

    lora promote acme/alice:3

    lora promote acme/alice:2 --alias latest --reason "3 answers too curtly"

    lora promote acme --all --where "user=a*" --where base=9c3f
    """
    if all_:
        promote_all(reference, alias, source, where or [], reason, force=force, override=override)
        return
    if where or source != LATEST:
        raise typer.BadParameter("--where and --from go with --all")
    wanted = Reference.parse(reference)
    with transaction(Client.from_environment().engine) as session:
        tenant = queries.tenant_id(session, wanted.tenant)
        version = aliases.promote(
            session, tenant, wanted, alias, actor=who(), reason=reason, now=now(), force=force, expected=expect,
            override=override,
        )  # fmt: skip
    say(f"{wanted.label}@{alias} is now version {version.number}")


def rollback(
    reference: OwnReference,
    alias: AliasOption = LATEST,
    reason: Reason = "by hand",
    expect: Expected = None,
    override: Override = False,
    all_: All = False,
    number: Number = None,
) -> None:
    """Point an alias back at where it pointed before; with --all, take a whole tenant's move back.

    lora rollback acme/alice

    lora rollback acme/alice --alias production

    lora rollback acme --all --alias production
    """
    if all_:
        roll_back_all(reference, alias, number, reason, override=override)
        return
    adapter, at, other = reference.partition("@")
    if at:
        raise typer.BadParameter(f"name the alias apart: lora rollback {adapter} --alias {other}")
    wanted = Reference.parse_adapter(reference)
    with transaction(Client.from_environment().engine) as session:
        tenant = queries.tenant_id(session, wanted.tenant)
        version = aliases.rollback(
            session, tenant, wanted, alias, actor=who(), reason=reason, now=now(), expected=expect, override=override
        )
    say(f"{wanted.label}@{alias} is now version {version.number}")


def export(
    reference: VersionReference,
    to: Annotated[Path, typer.Option("--to", help="The GGUF file, or the folder of the merged model, to write.")],
    as_: Annotated[Kind, typer.Option("--as", help="A GGUF adapter for llama.cpp, or base and adapter as one model.")],
    base: Annotated[str | None, typer.Option("--base", help="Where the base is now, if it has moved.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a version for engines that do not read PEFT's files.

    lora export acme/alice --as gguf --to alice.gguf          then: llama-cli -m base.gguf --lora alice.gguf

    lora export acme/alice@production --as merged --to ./alice-model
    """
    from transformers.utils.logging import disable_progress_bar

    from flows.export import bytes_in, export_gguf, export_merged

    disable_progress_bar()
    write = {Kind.GGUF: export_gguf, Kind.MERGED: export_merged}[as_]
    origin = write(Factory.from_environment(), reference, to, force, base)
    facts = {"reference": origin.label, "as": str(as_), "to": to, "base": origin.base.name}
    written = bytes_in(to)
    answer_one({**facts, "size": written if as_json else size(written)}, as_json)


def reproduce(reference: VersionReference, as_json: AsJson = False) -> None:
    """Train a version again from what its manifest records, and compare the bytes; exit code 1 if they differ.

    lora reproduce acme/alice:3
    """
    from flows.reproduce import reproduce as run

    found = run(Factory.from_environment(), reference)
    facts = {"reference": found.reference, "equal": found.equal, "published": found.published, "again": found.again}
    differs = {name: f"{then} then, {now} now" for name, (then, now) in found.differs.items()}
    answer_one({**facts, **({"differs": differs} if as_json else differs)}, as_json)
    if not found.equal:
        raise typer.Exit(1)
