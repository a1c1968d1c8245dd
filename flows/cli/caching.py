"""`lora cache`: what has been pulled to this machine, and how much of it is kept."""

from datetime import UTC, datetime
from typing import Annotated

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError

from flows.cli.printing import AsJson, answer, remark, say, size
from registry.cache import Cache, Entry
from registry.settings import RegistrySettings

app = typer.Typer(help="The versions that this machine keeps: list them, make room.", no_args_is_help=True)


@app.command(name="list")
def list_(as_json: AsJson = False) -> None:
    """The versions that have been pulled, the one that was asked for longest ago first.

    lora cache list
    """
    settings = RegistrySettings.read()
    entries = Cache(settings.cache).entries()
    answer([_row(one, as_json) for one in entries], as_json, "nothing has been pulled yet")
    limit = f"of {size(settings.cache_size)}" if settings.cache_size else "without a limit"
    remark(f"versions: {len(entries)}; {_total(entries)} {limit}, in {settings.cache}")


@app.command()
def clear(
    keep: Annotated[str, typer.Option("--keep", metavar="SIZE", help="Keep the newest up to this, such as 10GB.")] = "",
) -> None:
    """Remove pulled versions from this machine, except those that a process holds; they can be pulled again.

    lora cache clear

    lora cache clear --keep 10GB
    """
    cache = Cache(RegistrySettings.read().cache)
    removed = cache.trim(_bytes(keep), fresh_seconds=0) if keep else cache.clear()
    left = cache.entries()
    say(f"removed {len(removed)} of {len(removed) + len(left)} versions, {_total(removed)}; {_total(left)} left")


def _bytes(text: str) -> int:
    try:
        return TypeAdapter(ByteSize).validate_python(text)
    except ValidationError:
        raise typer.BadParameter(f"{ascii(text)[:40]} is no size; write for example 10GB or 500MiB") from None


def _row(entry: Entry, as_json: bool) -> dict[str, object]:
    used = datetime.fromtimestamp(entry.used, UTC)
    return {
        "version": entry.served_name, "size": entry.size if as_json else size(entry.size), "asked for last": used,
        "folder": entry.folder,
    }  # fmt: skip


def _total(entries: list[Entry]) -> str:
    return size(sum(one.size for one in entries))
