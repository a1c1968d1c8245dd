"""A conversation line by line, from a terminal or a pipe: what is typed goes to a user's adapter or is a command."""

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from flows.cli.printing import console, fail, say
from flows.errors import FlowError, Unready
from flows.talk import Talk
from lora_core.decoding import Sampling
from lora_core.errors import LoraError
from registry.errors import RegistryError

HELP = """\
/user acme/bob   the adapter of acme/bob answers from now on; also acme/bob/notes, acme/bob:3, acme/bob@production
/base            the bare base answers from now on
/new             begin the conversation with whoever answers anew
/help            this
/quit            end; so does the end of the input"""


@dataclass
class Conversation:
    """Who is asked how, until somebody says that it is over."""

    talk: Talk
    tokens: int
    sampling: Sampling
    compare: bool
    over: bool = False
    failed: bool = False
    commands: dict[str, Callable[[str], None]] = field(init=False)

    def __post_init__(self) -> None:
        self.commands = {
            "/user": self._user, "/base": lambda _: self.talk.turn_to_base(), "/new": lambda _: self.talk.forget(),
            "/help": lambda _: say(HELP), "/quit": self._quit,
        }  # fmt: skip

    def run(self) -> None:
        """Line by line until the input ends; what cannot be done is told, and the conversation goes on."""
        if isinstance(sys.stdin, io.TextIOWrapper):  # bytes that are no text, from a pipe
            sys.stdin.reconfigure(errors="replace")
        while not self.over:
            line = read_line(f"{self.talk.who}> ")
            if line is None:
                return
            try:
                self.take(line.strip())
            except (FlowError, LoraError, RegistryError) as error:
                self.failed = True
                fail(error, 0)

    def take(self, line: str) -> None:
        """Obey a command, or pass on what is said; a blank line is neither."""
        word, _, rest = line.partition(" ")
        if word.startswith("/"):
            if word not in self.commands:
                raise Unready(f"there is no command {word}", "type /help for those there are")
            self.commands[word](rest.strip())
        elif line:
            self.ask(line)

    def ask(self, text: str) -> None:
        """Say something to whoever answers, and print the answer."""
        spoken = len(self.talk.said.get(self.talk.who, ()))
        sampling = replace(self.sampling, seed=self.sampling.seed + spoken)  # else each turn would draw the same
        own, plain = self.talk.ask(text, self.tokens, sampling, self.compare)
        if self.compare:
            say(f"base     {plain}")
        say(f"{'adapter  ' if self.compare else ''}{own}")

    def _user(self, reference: str) -> None:
        if not reference:
            raise Unready("/user needs a name", "write it as in /user acme/bob")
        self.talk.turn_to(reference)

    def _quit(self, _: str) -> None:
        self.over = True


def read_line(prompt: str) -> str | None:
    """A line of the input, asked for where a person types; None at its end."""
    try:
        return console.input(prompt, markup=False) if sys.stdin.isatty() else sys.stdin.readline() or None
    except EOFError:
        return None
