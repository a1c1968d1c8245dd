"""What may be called what."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.errors import NameRefused, RegistryError
from registry.names import Reference, check_plain, check_user


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("acme/alice", Reference("acme", "alice")),
        ("acme/alice/notes", Reference("acme", "alice", "notes")),
        ("acme/alice:3", Reference("acme", "alice", number=3)),
        ("acme/alice/notes:12", Reference("acme", "alice", "notes", 12)),
        ("acme/alice@production", Reference("acme", "alice", alias="production")),
        ("acme-2/A.b_c=d/x", Reference("acme-2", "A.b_c=d", "x")),
    ],
)
def test_a_reference_is_read_as_a_person_writes_it(text: str, expected: Reference) -> None:
    """And written back so that it is read the same."""
    assert Reference.parse(text) == expected
    assert Reference.parse(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "", "acme", "acme/", "/alice", "acme/alice/x/y", "acme/alice:", "acme/alice:0", "acme/alice:-1",
        "acme/alice:1e3",
        "acme/alice:³", "acme/alice@", "acme/alice@a@b", "acme/..", "acme/a..b", "../etc", "acme/alice\n", "Acme/alice",
        "acme/al ice", "acme/alice;drop", "acme/%2e%2e", "ac\u200bme/alice", "аcme/alice", "acme/" + "x" * 129,
        "a" * 64 + "/alice", "acme--x/alice", "acme/alice:99999999999", "acme/alice\0", "acme\\alice",
    ],
)  # fmt: skip
def test_what_is_no_reference_is_refused(text: str) -> None:
    """Traversal, look-alikes, control characters and lengths end at the door, told in ASCII and in short."""
    with pytest.raises(NameRefused) as caught:
        Reference.parse(text)

    assert str(caught.value).isascii()
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("text", ["acme/alice:3", "acme/alice@production", "acme/alice@", "acme/alice/notes:x"])
def test_a_version_is_refused_where_an_adapter_is_meant(text: str) -> None:
    """Passing over it in silence would act on another version than was asked for."""
    with pytest.raises(NameRefused, match="without :3 or @alias"):
        Reference.parse_adapter(text)


def test_an_adapter_is_read_as_any_reference() -> None:
    """And checked as strictly."""
    assert Reference.parse_adapter("acme/alice/notes") == Reference("acme", "alice", "notes")
    with pytest.raises(NameRefused):
        Reference.parse_adapter("acme/../x")


@given(st.text(max_size=200))
def test_no_text_gets_through_that_a_path_or_key_could_misread(text: str) -> None:
    """Whatever is accepted is plain."""
    for check in (check_user, lambda name: check_plain("adapter", name)):
        try:
            name = check(text)
        except NameRefused:
            continue
        assert name.isascii()
        assert ".." not in name
        assert not set(name) & set("/\\:@%;'\" \0\n")


@pytest.mark.parametrize("kind", RegistryError.__subclasses__())
def test_errors_survive_the_way_between_processes(kind: type[RegistryError]) -> None:
    """Facts in args, prose in __str__: unpickled, an error says the same."""
    if kind.__init__ is Exception.__init__:
        kind = kind.__subclasses__()[0]
    arguments = kind.__init__.__code__.co_argcount - 1
    error = kind(*map(str, range(arguments)))

    assert str(pickle.loads(pickle.dumps(error))) == str(error)
