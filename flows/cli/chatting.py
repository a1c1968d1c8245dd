"""`lora chat` and `lora matrix`: hear what adapters make of their base, and whose serves whom."""

import sys
from typing import Annotated

import typer

from flows.cli.printing import AsJson, VersionReference, answer, console, say
from flows.factory import Factory


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(chat)
    app.command()(matrix)


def chat(
    reference: VersionReference,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Answer this and stop; else prompts are asked for.")
    ] = None,
    base: Annotated[str | None, typer.Option("--base", help="Where the base is now, if it has moved.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Show the bare base's answer as well.")] = False,
    tokens: Annotated[int, typer.Option(min=1, max=4096, help="Longest answer.")] = 64,
) -> None:
    """Ask a user's adapter something.  Each prompt stands alone.

    lora chat acme/alice -p "When is the team lunch?" --compare
    """
    from flows.talk import Voice

    voice = Voice.of(reference, base)
    while True:
        text = prompt if prompt is not None else _asked()
        if not text:
            return
        own, plain = voice.answers(text, tokens)
        if compare:
            say(f"base     {plain}")
        say(f"{'adapter  ' if compare else ''}{own}")
        if prompt is not None:
            return


def matrix(
    references: Annotated[list[str], typer.Argument(metavar="REFERENCE...", help="Two users or more, of one base.")],
    as_json: AsJson = False,
) -> None:
    """Held-out loss of each user's data under the base, the user's own adapter and the others' (mean).

    lora matrix acme/alice acme/bob globex/eve
    """
    from flows.matrix import cross

    found = cross(Factory.from_environment(), references)
    answer([*found.rows(), found.mean()], as_json, "")


def _asked() -> str:
    try:
        return console.input("> ").strip() if sys.stdin.isatty() else sys.stdin.readline().strip()
    except EOFError:
        return ""
