"""`lora chat`: talk to the base as one user's adapter makes it."""

import sys
from typing import Annotated

import typer

from flows.cli.printing import VersionReference, console, say


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(chat)


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


def _asked() -> str:
    try:
        return console.input("> ").strip() if sys.stdin.isatty() else sys.stdin.readline().strip()
    except EOFError:
        return ""
