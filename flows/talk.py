"""Pulled adapters on their base, ready to answer: one base, users by name, a conversation for each of them."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flows.errors import Unready
from flows.factory import Factory
from flows.fitting import place_recorded
from flows.records import recorded_methods
from lora_core.banks.table import make_bank
from lora_core.base_model import BaseModel, load_base
from lora_core.data.examples import Message
from lora_core.data.rendering import turns_to_prompt
from lora_core.decoding import GREEDY, Sampling
from lora_core.intake import AdapterFiles, read_artifact
from lora_core.methods import AnyMethod, LoraSpec
from lora_core.serving import Adapter, Request, Server
from registry import queries
from registry.models import SharedBase
from registry.names import Reference
from registry.session import reading

BASE = "base"  # the bare base's name where a user's would stand
SLOTS = 2  # an adapter, and the bare base beside it


@dataclass(frozen=True)
class Version:
    """A version that a reference means now: its adapter's and its own name, its files, and what made it."""

    label: str
    name: str
    folder: Path
    made_on: SharedBase
    recorded: Sequence[AnyMethod] = ()  # settings that it can have been trained with


def find(factory: Factory, reference: str) -> Version:
    """Pull what a reference means now.  Raises NameRefused, NotFound and what pulling raises."""
    wanted = Reference.parse(reference)
    with reading(factory.engine) as session:
        tenant = queries.tenant_id(session, wanted.tenant)
        version = queries.version(session, tenant, wanted)
        _, made_on, _ = queries.lineage(session, tenant, version)
        name = f"{wanted.label}:{version.number}"
    return Version(wanted.label, name, factory.client.pull_living(name), made_on, recorded_methods(version.recipe))


class Talk:
    """Users of one base who are asked in turn; each has a conversation of their own, and so has the bare base.

    The base is loaded once.  A user who is turned to again answers with the version that is live by then.
    """

    def __init__(self, factory: Factory, base: BaseModel) -> None:
        self.factory, self.base = factory, base
        self.who, self.version = BASE, ""  # whose turn it is, and the version of theirs that answers
        self.said: dict[str, list[Message]] = {}
        self.files: dict[str, AdapterFiles] = {}  # by version
        self.servers: dict[Hashable, Server] = {}  # by the shape of the rows that they serve
        self.server = self._server(LoraSpec(rank=1))

    @classmethod
    def of(cls, reference: str, base_name: str | None = None) -> "Talk":
        """A talk that begins with a user, on the base of their adapter.  Raises Unready for another base."""
        factory = Factory.from_environment()
        made_on = find(factory, reference).made_on
        device = factory.settings.device or None
        name, revision = (base_name, made_on.revision) if base_name else place_recorded(factory.settings, made_on)
        base = load_base(name, revision, device, quantise=made_on.quantised)
        talk = cls(factory, base)
        talk.turn_to(reference)
        return talk

    def turn_to(self, reference: str) -> None:
        """Let a user answer from now on; whoever answered before goes on doing so where this raises.

        Raises NameRefused, NotFound, ArtifactRefused; Unready for an adapter of another base.
        """
        version = find(self.factory, reference)
        if version.made_on.digest != self.base.digest:
            raise Unready(
                f"{self.base.name} is not the base that {version.name} was trained on",
                f"pass that one with --base, or begin anew with `lora chat {version.label}`",
            )
        files = read_artifact(version.folder, self.base, version.recorded)
        self.files[version.name], self.server = files, self._server(files.spec)
        self.who, self.version = version.label, version.name

    def turn_to_base(self) -> None:
        """Let the bare base answer from now on."""
        self.who, self.version = BASE, ""

    def forget(self) -> None:
        """Begin the conversation with whoever answers anew."""
        self.said.pop(self.who, None)

    def ask(self, text: str, tokens: int, sampling: Sampling = GREEDY, compare: bool = False) -> tuple[str, str]:
        """What whose turn it is says next in their conversation; and what the bare base would (`compare`), or nothing.

        Both are generated in one batch.  Raises PromptRefused, TemplateRefused; then nothing was said.
        """
        turns = [*self.said.get(self.who, []), Message("user", text)]
        prompt = self._prompt(turns, tokens)
        names = [self.version or None, *([None] if compare else [])]
        answers = self.server.answer([Request(name, prompt, tokens, sampling) for name in names])
        own, *plain = (self.base.tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers)
        self.said[self.who] = [*turns, Message("assistant", own)]
        return own, plain[0] if plain else ""

    def _prompt(self, turns: Sequence[Message], tokens: int) -> list[int]:
        """The conversation as the base reads it; its oldest exchanges are left out where it would be too long.

        Half of what the base can read is the conversation's, however long an answer may get.
        """
        prompt, longest = turns_to_prompt(turns, self.base.tokenizer), self.server.longest
        while len(prompt) > longest - min(tokens, longest // 2) and len(turns) > 1:
            turns = turns[2:]
            prompt = turns_to_prompt(turns, self.base.tokenizer)
        return prompt

    def _server(self, spec: AnyMethod) -> Server:
        if spec.shape in self.servers:
            return self.servers[spec.shape]
        bank = make_bank(self.base, [spec])

        def load(version: str) -> Adapter:
            files = self.files[version]
            return Adapter(bank.from_tensors(files.tensors, files.spec), files.spec.scale)

        return self.servers.setdefault(spec.shape, Server(self.base, bank, SLOTS, load, spec.positions))
