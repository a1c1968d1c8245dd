"""`lora chat` and `lora matrix`: hear what adapters make of their base, and whose serves whom."""

import sys
from typing import Annotated

import typer

from flows.cli.printing import AsJson, VersionReference, answer
from flows.cli.typed import standard_input
from flows.factory import Factory


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(chat)
    app.command()(matrix)


def chat(
    reference: VersionReference,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Answer this and stop; else lines are read.")
    ] = None,
    base: Annotated[str | None, typer.Option("--base", help="Where the base is now, if it has moved.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Show the bare base's answer as well.")] = False,
    tokens: Annotated[int, typer.Option(min=1, max=4096, help="Longest answer.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, max=10, help="0: always the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.001, max=1, help="Sample among the likeliest tokens only.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed samples the same answers.")] = 0,
) -> None:
    """Talk to users' adapters, from a terminal or a pipe; /user, /base, /new, /help and /quit are commands.

    Each user has a conversation of their own.  A base without a chat template reads each line by itself.

    lora chat acme/alice -p "When is the team lunch?" --compare

    printf "Hello.\\n/user acme/bob\\nHello.\\n" | lora chat acme/alice --temperature 0.7 --top-p 0.9
    """
    from flows.cli.conversing import Conversation
    from flows.talk import Talk
    from lora_core.decoding import Sampling

    if prompt is None:
        standard_input("give a --prompt")
    talk = Talk.of(reference, base)
    conversation = Conversation(talk, tokens, Sampling(temperature, top_p, seed), compare)
    if prompt is not None:
        return conversation.ask(prompt.encode(errors="replace").decode())  # bytes that are no text, from a shell
    conversation.run()
    if conversation.failed and not sys.stdin.isatty():
        raise typer.Exit(1)
    return None


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
