"""`lora chat`: users of one base in one session, from a pipe."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from flows import talk as talking
from flows.errors import Unready
from flows.factory import Factory
from flows.settings import FactorySettings
from flows.talk import Talk, Version
from lora_core.banks.lora import LoraBank
from lora_core.base_model import BaseModel, load_base
from lora_core.data.examples import Message
from lora_core.decoding import Sampling
from lora_core.errors import PromptRefused
from lora_core.intake import AdapterFiles
from lora_core.methods import AnyMethod
from lora_core.serving import Request, Server
from registry.errors import NotFound
from registry.models import SharedBase
from tests.flows.conftest import QUICK, Lora, write_user
from tests.lora_core.conftest import lora_of, recipe
from tests.lora_core.test_peft_parity import random_row

SETTINGS = [word for one in QUICK for word in ("--set", one)]


@pytest.mark.long
def test_one_session_hears_several_users(lora: Lora, base_folder: Path, tmp_path: Path) -> None:
    """Each in their own voice; what cannot be done is told, does not end it, and shows in the exit code."""
    for name, habit in (("alice", "the quick brown fox"), ("bob", "hello to the lazy dog")):
        lora("data", "add", f"acme/{name}", str(write_user(tmp_path / f"{name}.jsonl", habit)))
    lora("train", "acme/alice", "acme/bob", "--base", str(base_folder), *SETTINGS)
    words = ("chat", "acme/alice", "--tokens", "12")

    heard = lora(
        *words, typed="say 5\n/user acme/bob\n\nsay 5\n/base\nsay 5\n/user acme/alice:1\n/new\nsay 5\n/quit\nsay 5\n"
    )
    stumbled = lora(*words, code=1, typed="/user acme/nobody\n/user\n/sing\n/user acme/../x\n\xff say 5")

    alice, bob, base, again = heard.stdout.splitlines()
    assert alice == again
    assert "fox" in alice
    assert "lazy dog" in bob
    assert "fox" not in base
    assert "dog" not in base
    assert "fox" in stumbled.stdout
    errors = " ".join(stumbled.stderr.split())
    for told in ("no version acme/nobody@latest", "/user needs a name", "no command /sing", "not a valid"):
        assert told in errors
    assert "fox" in lora(*words, "--compare", "-p", "say 7").stdout


class Shelf:
    """Versions as if pulled, by reference: their adapter, its rank, and the digest of their base."""

    def __init__(self, base: BaseModel) -> None:
        self.base = base
        self.held: dict[str, tuple[str, int, str]] = {
            "acme/alice": ("acme/alice:1", 2, base.digest), "acme/bob": ("acme/bob:1", 5, base.digest),
            "globex/eve": ("globex/eve:1", 2, "another"),
        }  # fmt: skip

    def find(self, factory: Factory, reference: str) -> Version:
        """As `find` does with a registry."""
        if reference not in self.held:
            raise NotFound("version", reference, "see `lora list`")
        name, _, digest = self.held[reference]
        return Version(reference, name, Path(name), SharedBase(digest=digest))

    def read(self, folder: Path, base: BaseModel, recorded: Sequence[AnyMethod]) -> AdapterFiles:
        """As `read_artifact` does with files."""
        rank, seed = next((held[1], sum(map(ord, held[0]))) for held in self.held.values() if held[0] == str(folder))
        spec = lora_of(recipe(rank=rank, alpha=16))
        bank = LoraBank(base.sites, rank)
        return AdapterFiles(spec, bank.to_tensors(2 * random_row(bank, spec, seed), spec))


@pytest.fixture
def shelf(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    """Instead of a registry and a store."""
    made = Shelf(load_base(str(base_folder), device="cpu"))
    monkeypatch.setattr(talking, "find", made.find)
    monkeypatch.setattr(talking, "read_artifact", made.read)
    return made


@pytest.fixture
def talk(shelf: Shelf) -> Talk:
    """A talk with acme/alice."""
    begun = Talk(Factory(FactorySettings.read()), shelf.base)
    begun.turn_to("acme/alice")
    return begun


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """What servers are asked from now on."""
    heard: list[Request] = []
    answer = Server.answer

    def listen(server: Server, asked: Sequence[Request]) -> list[list[int]]:
        heard.extend(asked)
        return answer(server, asked)

    monkeypatch.setattr(Server, "answer", listen)
    return heard


def read(talk: Talk, request: Request) -> str:
    """A prompt as text."""
    return str(talk.base.tokenizer.decode(request.prompt))


def test_each_user_has_a_conversation_of_their_own(talk: Talk, requests: list[Request]) -> None:
    """Who is turned to again goes on where they were; /new begins anew; the bare base beside them reads the same."""
    talk.turn_to("acme/bob")
    talk.ask("the dog", 4)
    talk.turn_to("acme/alice")
    talk.ask("the fox", 4)
    talk.turn_to("acme/bob")
    talk.ask("hello", 4, compare=True)
    talk.forget()
    talk.ask("quick", 4)

    texts = [read(talk, request) for request in requests]
    assert [request.adapter for request in requests] == ["acme/bob:1", "acme/alice:1", "acme/bob:1", None, "acme/bob:1"]
    assert "the dog" not in texts[1]
    assert "the dog" in texts[2]
    assert "fox" not in texts[2]
    assert texts[3] == texts[2]
    assert texts[4] == "<|im_start|>user\nquick<|im_end|>\n<|im_start|>assistant\n"


def test_a_user_answers_as_in_a_session_of_their_own(talk: Talk, shelf: Shelf) -> None:
    """Also where somebody of a higher rank joined in between, and when sampling."""
    style = Sampling(0.8, 0.9, 3)
    alone = Talk(talk.factory, shelf.base)
    alone.turn_to("acme/alice")
    wanted = [alone.ask(text, 12, style) for text in ("say", "the", "fox")]

    heard = []
    for text in ("say", "the", "fox"):
        talk.turn_to("acme/alice")
        heard.append(talk.ask(text, 12, style))
        talk.turn_to("acme/bob")
        talk.ask("hello", 5)
        talk.turn_to_base()
        talk.ask("dog", 5)

    assert heard == wanted


def test_a_new_version_answers_once_its_user_is_turned_to(talk: Talk, shelf: Shelf, requests: list[Request]) -> None:
    """The base stays loaded, and the conversation goes on."""
    before, _ = talk.ask("the fox", 10)
    talk.forget()
    shelf.held["acme/alice"] = ("acme/alice:2", 2, shelf.base.digest)

    assert talk.ask("the fox", 10)[0] == before
    talk.turn_to("acme/alice")
    talk.ask("the dog", 10)

    assert talk.base is shelf.base
    assert requests[-1].adapter == "acme/alice:2"
    assert "the fox" in read(talk, requests[-1])


@pytest.mark.parametrize(("reference", "error"), [("acme/nobody", NotFound), ("globex/eve", Unready)])
def test_who_cannot_be_turned_to_changes_nothing(talk: Talk, reference: str, error: type[Exception]) -> None:
    """An unknown user, or one of another base."""
    with pytest.raises(error):
        talk.turn_to(reference)

    assert (talk.who, talk.version) == ("acme/alice", "acme/alice:1")
    assert talk.ask("the fox", 4)


def test_a_conversation_that_grows_too_long_loses_its_oldest_turns(talk: Talk, requests: list[Request]) -> None:
    """So that the newest always fits; one line that is too long by itself is refused, and was never said."""
    for number in range(9):
        talk.ask(f"the quick brown fox says {number}", 12)

    assert all(len(request.prompt) + 12 <= talk.base.longest for request in requests)
    assert "says 8" in read(talk, requests[8])
    assert "says 7" in read(talk, requests[8])
    assert "says 0" not in read(talk, requests[8])

    with pytest.raises(PromptRefused):
        talk.ask("the dog " * 200, 12)
    assert len(talk.said["acme/alice"]) == 18


def test_an_answer_that_may_fill_the_base_leaves_the_conversation_half_of_it(
    talk: Talk, requests: list[Request]
) -> None:
    """Else whoever allows long answers would speak to somebody who forgets each line at once."""
    talk.said["acme/alice"] = [Message("user", "the fox"), Message("assistant", "the dog")]

    talk.ask("hello", talk.base.longest)

    assert "the fox" in read(talk, requests[0])


def test_a_base_without_a_chat_template_reads_each_line_by_itself(talk: Talk, requests: list[Request]) -> None:
    """As raw text, which is what its users' data is."""
    tokenizer = talk.base.tokenizer
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    tokenizer.chat_template = None
    talk.ask("the fox", 3)
    talk.ask("the dog", 3)

    assert read(talk, requests[1]) == "the dog"
