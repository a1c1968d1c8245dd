"""Names that nobody should give, through every door: one clear line, an exit code, no traceback, nothing written."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session

from flows.settings import FactorySettings
from registry import aliases, fleet, protection, publishing, queries
from registry.broker import Broker
from registry.client import Client
from registry.errors import KeyRefused, NameRefused, SettingRefused
from registry.fleet import Where
from registry.names import Reference, TenantId
from registry.session import open_database, transaction
from registry.store import FolderStore
from tests.flows.conftest import LoraHere, write_user
from tests.registry.conftest import NOW

BAD = {
    "parent": "..",
    "traversal": "../../etc/passwd",
    "traversal inside": "a/../../b",
    "percent": "a%2e%2e%2fb",
    "backslash": "a\\..\\b",
    "absolute": "/etc/passwd",
    "home": "~root",
    "null": "a\x00b",
    "newline": "a\nb",
    "escape": "a\x1b[31mb",
    "bell": "a\x07",
    "delete": "a\x7f",
    "zero width": "al\u200bice",
    "right to left": "a\u202eecila",
    "Cyrillic": "аlice",
    "full width": "ａlice",
    "combining": "alic\u0065\u0301",
    "Roman numeral": "ⅷ",
    "surrogate": "a\ud800",
    "emoji": "a😀",
    "quote": "x' OR '1'='1",
    "statement": "x'; DROP TABLE users; --",
    "wildcard": "%",
    "underscore": "_",
    "shell": "$(id)",
    "backtick": "`id`",
    "key": "a//b",
    "question": "a?versionId=x",
    "hash": "a#b",
    "space": "a b",
    "dot": ".",
    "dash": "-a",
    "long": "a" * 5000,
}


@pytest.fixture
def registry(home: Path) -> Engine:
    """A registry in LORA_HOME with acme's alice."""
    opened = open_database(f"sqlite:///{home / 'registry.db'}")
    with transaction(opened) as session:
        queries.ensure_adapter(session, Reference.parse("acme/alice"), NOW)
    return opened


COMMANDS = [
    "list X", "status X", "cost X", "schedule list X", "latest acme/X", "latest X/alice", "latest acme/alice/X",
    "history acme/X",
    "show acme/alice@X", "show acme/alice:X", "pull acme/X", "pull X/alice", "promote acme/X:1",
    "promote acme/alice:1 --alias X", "rollback acme/alice --alias X", "rollback X/alice", "promote X --all",
    "promote acme --all --alias X", "promote acme --all --from X", "promote acme --all --where user=X",
    "promote acme --all --where adapter=X", "promote acme --all --where base=X", "promote acme --all --where since=X",
    "promote acme --all --where X", "rollback X --all", "rollback acme --all --alias X", "protect X", "protect acme X",
    "protect acme X --off", "grant X", "ticket X/alice --grant g", "redeem X", "data add X/alice FILE",
    "data add acme/X FILE", "data add acme/alice/X FILE", "train X/alice --base BASE", "train acme/X --base BASE",
    "schedule set acme/X --every 1d --base BASE", "schedule set acme/alice --cron X --base BASE",
    "schedule set acme/alice --every X --base BASE", "schedule pause acme/X", "schedule remove X/alice",
    "schedule list acme --user X",
    "chat acme/X -p hello", "matrix acme/X acme/alice", "reproduce acme/X",
]  # fmt: skip


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_refuses_every_bad_name_in_one_line(
    lora_here: LoraHere, registry: Engine, base_folder: Path, tmp_path: Path, words: str
) -> None:
    """ASCII where the name was odd, short where it was long, and no terminal is steered."""
    file = write_user(tmp_path / "a.jsonl", "hello", count=3)
    for what, name in BAD.items():
        if what == "dash" and words.split()[-1] == "X":
            continue  # an option to the command line, which says so by itself
        given = [word.replace("X", name) for word in words.split()]
        given = [{"FILE": str(file), "BASE": str(base_folder)}.get(word, word) for word in given]

        said = lora_here(*given, LORA_GRANT_SECRET="s" * 40)

        assert said.code in (1, 2, 3), (what, said)
        assert "Traceback" not in said.err + said.out, what
        assert said.err.strip(), what
        assert said.err.count("\n") == 1 or said.code == 2, (what, said.err)
        assert not set(said.err) & set("\x00\x07\x1b\x7f\u200b\u202e"), what
        assert len(said.err) < (1000 if said.code == 2 else 500), what
    assert [path.name for path in (tmp_path / "home").glob("store/t/*")] == []
    assert counted(registry) == {"tenants": 1, "users": 1, "adapters": 1}


def counted(engine: Engine) -> dict[str, int]:
    """What there is by name."""
    with engine.connect() as connection:
        names = ("tenants", "users", "adapters")
        return {name: int(connection.exec_driver_sql(f"SELECT count(*) FROM {name}").scalar_one()) for name in names}


PYTHON: dict[str, Callable[[Session, TenantId, str], object]] = {
    "tenant": lambda session, _, name: queries.tenant_id(session, name),
    "reference": lambda session, _, name: Reference("acme", name),
    "reference's tenant": lambda session, _, name: Reference(name, "alice"),
    "reference's adapter": lambda session, _, name: Reference("acme", "alice", name),
    "reference's alias": lambda session, _, name: Reference("acme", "alice", alias=name),
    "text": lambda session, _, name: Reference.parse(f"acme/{name}"),
    "promote": lambda session, mine, name: aliases.promote(
        session, mine, Reference("acme", "alice"), name, actor="me", reason="test", now=NOW
    ),
    "roll back": lambda session, mine, name: aliases.rollback(
        session, mine, Reference("acme", "alice"), name, actor="me", reason="test", now=NOW
    ),
    "fleet": lambda session, mine, name: fleet.promote_all(
        session, mine, name, "latest", Where(), actor="me", reason="test", now=NOW
    ),
    "fleet's source": lambda session, mine, name: fleet.promote_all(
        session, mine, "production", name, Where(), actor="me", reason="test", now=NOW
    ),
    "fleet back": lambda session, mine, name: fleet.roll_back_all(
        session, mine, name, actor="me", reason="test", now=NOW
    ),
    "condition": lambda session, _, name: Where.parse([f"user={name}"]),
    "protect": lambda session, mine, name: protection.protect(session, mine, name, actor="me", reason="x", now=NOW),
    "unprotect": lambda session, mine, name: protection.unprotect(session, mine, name, actor="me", reason="x", now=NOW),
}


@pytest.mark.parametrize("door", PYTHON.values(), ids=PYTHON)
def test_the_python_interface_refuses_every_one_too(
    registry: Engine, door: Callable[[Session, TenantId, str], object]
) -> None:
    """Nobody has to go through the command line to be checked."""
    for name in BAD.values():
        with pytest.raises(NameRefused) as caught, transaction(registry) as session:
            door(session, queries.tenant_id(session, "acme"), name)

        assert str(caught.value).isascii()
        assert len(str(caught.value)) < 300
    assert counted(registry) == {"tenants": 1, "users": 1, "adapters": 1}


def test_client_broker_and_store_refuse_every_one(registry: Engine, tmp_path: Path) -> None:
    """Whatever takes a name takes no other."""
    store = FolderStore(tmp_path / "store")
    store.set_up()
    for name in BAD.values():
        with pytest.raises(NameRefused):
            Client(registry, store, tmp_path / "cache").pull(f"acme/{name}")
        with pytest.raises(NameRefused):
            Broker(registry, store, "s" * 40).grant(name, timedelta(hours=1), NOW)
        with pytest.raises(NameRefused):
            publishing.upload(store, "t/acme", {name: b"x"})
        if name not in KEYS:
            with pytest.raises(KeyRefused):
                store.put_new(f"t/{name}/x", b"x")
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []


KEYS = ("_", "-a")  # odd for a name, plain in a key


@pytest.mark.parametrize("text", ["a\x00", "a\x1b]0;x\x07", "a\nb", "x" * 1001, "a\u202eb", "a\ud800"])
def test_the_words_of_a_move_are_checked_too(lora_here: LoraHere, registry: Engine, text: str) -> None:
    """They are stored, and shown in somebody else's terminal."""
    said = lora_here("promote", "acme/alice:1", "--reason", text)

    assert (said.code, said.err.count("\n")) == (1, 1)
    assert "is not a valid reason" in said.err
    assert said.err.isascii()


@pytest.mark.parametrize("name", ["a\x1b[31m", "", "x" * 129, "a\nb"])
def test_a_workers_name_is_checked(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """It stands in `lora status`, and in a column of 128."""
    monkeypatch.setenv("LORA_WORKER", name)
    if not name:
        assert FactorySettings.read().worker  # an empty variable is none
        return

    with pytest.raises(SettingRefused, match="LORA_WORKER"):
        FactorySettings.read()


RECIPES = {
    "unknown key": '"a\\e[31m": 1',
    "key with a null": '"ra\\0nk": 8',
    "look-alike key": "rаnk: 8",
    "target leads out": 'targets: ["../../etc"]',
    "target with a null": 'targets: ["q_proj\\0"]',
    "target as a pattern": 'targets: "(a+)+$"',
    "long target": f"targets: [{'q' * 5000}]",
    "object": "!!python/object/apply:os.system [id]",
    "endless": "a: &a [*a]",
    "not text": "rank: \x07",
}


@pytest.mark.parametrize("text", RECIPES.values(), ids=RECIPES)
def test_a_recipes_names_are_checked(
    lora_here: LoraHere, registry: Engine, base_folder: Path, tmp_path: Path, text: str
) -> None:
    """What is in a file is as foreign as what is typed."""
    lora_here("data", "add", "acme/alice", str(write_user(tmp_path / "a.jsonl", "hello")))
    (tmp_path / "recipe.yaml").write_text(text + "\n")

    said = lora_here("train", "acme/alice", "--base", str(base_folder), "--recipe", str(tmp_path / "recipe.yaml"))

    assert said.code == 1, said
    assert "Traceback" not in said.err + said.out
    assert not set(said.err + said.out) & set("\x00\x07\x1b"), said


@pytest.mark.parametrize("name", ["a\x1b[31m.jsonl", "a\u202eb.jsonl", "a\nb.jsonl"])
def test_a_files_name_steers_no_terminal(lora_here: LoraHere, registry: Engine, tmp_path: Path, name: str) -> None:
    """It is told as it is, in escapes."""
    path = write_user(tmp_path / name, "hello")
    path.write_text(path.read_text() + "nonsense\n")

    said = lora_here("data", "add", "acme/alice", str(path), str(tmp_path / f"missing-{name}"))

    assert said.code == 1
    assert not set(said.err + said.out) & set("\x1b\u202e")
