"""What a valid row is; snapshots; splits; rows of tokens."""

import json
import pickle
import random
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_core.data.examples import (
    Completion,
    Conversation,
    Example,
    Message,
    Preference,
    Text,
    canonical_line,
    parse_example,
    shared_length,
)  # fmt: skip
from lora_core.data.packing import epoch_batches, pack
from lora_core.data.rendering import IGNORED, Rendered, RenderedPair
from lora_core.data.snapshot import SkipPolicy, load_snapshot, take_snapshot
from lora_core.data.splits import split
from lora_core.errors import BadRow, DatasetRefused

TALK = Conversation((Message("user", "hi"), Message("assistant", "hello")))
words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20).filter(
    str.strip
)
conversations = st.lists(words, min_size=1, max_size=3).map(
    lambda said: Conversation(tuple(m for s in said for m in (Message("user", s), Message("assistant", s))))
)
two = st.tuples(words, words).filter(lambda pair: pair[0] != pair[1])
text_pairs = st.builds(lambda prompt, pair: Preference(*(Completion(prompt, one) for one in pair)), words, two)
talk_pairs = st.builds(
    lambda talk, pair: Preference(
        *(Conversation((*talk.messages, Message("user", "and?"), Message("assistant", one))) for one in pair)
    ),
    conversations,
    two,
)
some_example = st.one_of(
    st.builds(Completion, words, words), st.builds(Text, words), conversations, text_pairs, talk_pairs
)


PARTS = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]  # of one turn
ASKED, GOOD, POOR = Message("user", "2+2?"), Message("assistant", "4"), Message("assistant", "5")


def turns(*messages: Message) -> list[dict[str, str]]:
    """As rows have them."""
    return [{"role": message.role, "content": message.content} for message in messages]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        {"instruction": "hi", "input": "", "output": "hello"},
        {"instruction": "hi", "output": "hello"},
        {"prompt": turns(Message("user", "hi")), "completion": turns(Message("assistant", "hello"))},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": PARTS}]},
    ],
)
def test_chats_of_every_format_are_one_kind_of_example(row: dict[str, object]) -> None:
    """What they mean is the same."""
    assert parse_example(row) == TALK


@pytest.mark.parametrize("row", [
    {"messages": turns(Message("user", "hi"), Message("assistant", "hello")), "text": None, "chosen": None},
    {"messages": None, "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
    {"chosen": None, "rejected": None, "prompt": None, "messages": None, "instruction": "hi", "output": "hello"},
    {"instruction": "hi", "output": "hello", "system": " ", "history": None},
])  # fmt: skip
def test_a_field_that_is_null_is_absent(row: dict[str, object]) -> None:
    """Tables of several formats have every column in every row, and JSON lines made of them say null."""
    assert parse_example(row) == TALK


@pytest.mark.parametrize("row", [
    {"system": "be brief", "messages": turns(Message("user", "hi"), Message("assistant", "hello"))},
    {"system": "be brief", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
    {"system": "be brief", "instruction": "hi", "output": "hello", "history": []},
    {"system": "other", "messages": turns(Message("system", "be brief"), *TALK.messages)},
])  # fmt: skip
def test_a_rows_own_system_text_opens_its_conversation(row: dict[str, object]) -> None:
    """As LLaMA-Factory and Axolotl write it; without it other answers would be right."""
    assert parse_example(row) == Conversation((Message("system", "be brief"), *TALK.messages))


def test_alpacas_history_goes_before_the_instruction() -> None:
    """An answer to the second question is none to the first."""
    row = {"instruction": "hi", "output": "hello", "history": [["2+2?", "4"]]}

    assert parse_example(row) == Conversation((ASKED, GOOD, *TALK.messages))


def test_alpacas_input_follows_the_instruction() -> None:
    """With a blank line between."""
    row = {"instruction": "Sum up.", "input": "Long text.", "output": "Short."}

    assert parse_example(row) == Conversation(
        (Message("user", "Sum up.\n\nLong text."), Message("assistant", "Short."))
    )


BETTER = Preference(Conversation((ASKED, GOOD)), Conversation((ASKED, POOR)))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": turns(ASKED), "chosen": turns(GOOD), "rejected": turns(POOR)},
        {"chosen": turns(ASKED, GOOD), "rejected": turns(ASKED, POOR)},
        {
            "prompt": "2+2?",
            "chosen": turns(ASKED, GOOD),
            "rejected": turns(ASKED, POOR),
            "messages": turns(ASKED, GOOD),
        },
        {"prompt": turns(ASKED), "chosen": turns(ASKED, GOOD), "rejected": turns(ASKED, POOR)},
        {"prompt": turns(ASKED), "chosen": "4", "rejected": "5"},
        {"prompt": "2+2?", "chosen": turns(GOOD), "rejected": turns(POOR), "score_chosen": 0.9},
    ],
)
def test_pairs_of_every_layout_are_one_kind_of_example(row: dict[str, object]) -> None:
    """The prompt apart, as a shared head, or both."""
    assert parse_example(row) == BETTER


def test_pairs_of_texts_have_a_prompt_or_begin_with_it() -> None:
    """Then whole words of what both begin with are the prompt."""
    expected = Preference(Completion("The sky is ", "blue."), Completion("The sky is ", "blond."))

    assert parse_example({"prompt": "The sky is ", "chosen": "blue.", "rejected": "blond."}) == expected
    assert parse_example({"chosen": "The sky is blue.", "rejected": "The sky is blond."}) == expected
    assert shared_length("abc", "ab") == 2


BAD: list[tuple[object, str, str]] = [
    ({}, "row", "give messages"),
    ({"mesages": []}, "mesages", "did you mean 'messages'"),
    ({"messages": "hi"}, "messages", "list of turns"),
    ({"messages": []}, "messages", "list of turns"),
    ({"messages": [{"role": "user", "content": "hi"}]}, "messages", "no assistant turn"),
    ({"messages": [{"role": "robot", "content": "hi"}]}, "messages[0].role", "use system, user or assistant"),
    ({"messages": [{"role": "assistant"}]}, "messages[0].content", "is missing; add"),
    ({"messages": [{"role": "assistant", "content": "  "}]}, "messages[0].content", "empty"),
    ({"messages": [{"role": "assistant", "content": "x"}, {"role": "system", "content": "y"}]}, "messages[1]", "front"),
    ({"messages": ["hi"]}, "messages[0]", "not an object"),
    ({"messages": [{"role": "assistant", "content": []}]}, "messages[0].content", "as one text"),
    ({"messages": [{"role": "assistant", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", "is missing"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]", "not a part of"),
    ({"messages": [{"role": "user", "content": ["hi"]}]}, "messages[0].content[0]", "not a part of text"),
    ({"messages": [{"role": "assistant", "content": [{"type": "text", "text": " "}]}]}, "messages[0].content", "empty"),
    ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls", "as text"),
    (
        {"messages": [{"role": "assistant", "content": "x", "weight": 0}]},
        "messages[0].weight",
        "every answer is learnt",
    ),
    ({"prompt": "q", "completion": 3}, "completion", "int"),
    ({"prompt": "q", "completion": ""}, "completion", "empty"),
    ({"prompt": "q", "completoin": "a"}, "completion", "rename 'completoin'"),
    ({"completion": "a"}, "prompt", "missing"),
    ({"completion": turns(GOOD)}, "prompt", "is missing; add what was asked"),
    ({"prompt": turns(ASKED, GOOD, ASKED), "completion": turns(GOOD)}, "prompt", "every answer is learnt"),
    ({"text": None}, "text", "is missing; add the text"),
    ({"text": ["a"]}, "text", "list"),
    ({"text": "a\0b"}, "text", "NUL"),
    ({"text": "\ud800"}, "text", "surrogate"),
    ({"instruction": "x"}, "output", "missing"),
    ({"instruction": "x", "output": "y", "history": [["q"]]}, "history", "give [[question, answer]"),
    ({"instruction": "x", "output": "y", "history": "q"}, "history", "not questions with answers"),
    ({"instruction": "x", "output": "y", "history": [["q", ""]]}, "history[0]", "empty"),
    ({"instruction": "x", "output": "y", "system": 3}, "system", "int"),
    ({"conversations": [{"from": "gpt", "value": {}}]}, "conversations[0].value", "dict"),
    ({"prompt": "q", "chosen": "a"}, "rejected", "is missing"),
    ({"prompt": "q", "rejected": "a"}, "chosen", "is missing"),
    ({"prompt": "q", "chosen": "a", "rejected": "a"}, "rejected", "same as chosen"),
    ({"prompt": "q", "chosen": "a", "rejected": " "}, "rejected", "empty"),
    ({"chosen": "same word", "rejected": "same "}, "rejected", "empty"),
    ({"prompt": "q", "chosen": 3, "rejected": "a"}, "chosen", "list of turns"),
    ({"chosen": turns(GOOD), "rejected": turns(POOR)}, "prompt", "add what was asked"),
    ({"chosen": turns(ASKED, GOOD), "rejected": turns(ASKED)}, "rejected", "no assistant turn"),
    ({"chosen": turns(ASKED, GOOD), "rejected": turns(ASKED, POOR, ASKED)}, "rejected", "not end with an assistant"),
    ({"chosen": turns(ASKED, GOOD), "rejected": turns(Message("user", "x"), POOR)}, "rejected", "two answers to one"),
    ({"prompt": [3], "chosen": "a", "rejected": "b"}, "prompt[0]", "not an object"),
    ({"prompt": "q", "chosen": turns(GOOD), "rejected": turns(GOOD)}, "rejected", "same as chosen"),
]


@pytest.mark.parametrize(("row", "field", "words_"), BAD)
def test_a_bad_row_is_told_by_field_with_a_fix(row: dict[str, object], field: str, words_: str) -> None:
    """And the error survives pickling."""
    with pytest.raises(BadRow) as caught:
        parse_example(row)

    assert caught.value.field == field
    assert words_ in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@given(some_example)
def test_the_canonical_line_says_the_same(example: Example) -> None:
    """It is what digests are taken of."""
    line = canonical_line(example)

    assert parse_example(json.loads(line)) == example
    assert "\n" not in line


def write(path: Path, rows: list[object]) -> str:
    """Rows as JSON lines; the path as text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(count: int) -> list[object]:
    """Different rows of plain text."""
    return [{"text": f"line {number}"} for number in range(count)]


def test_a_snapshot_is_named_by_its_content(tmp_path: Path) -> None:
    """However it was stored; and it reads back."""
    one, _ = take_snapshot([write(tmp_path / "a.jsonl", texts(5))])
    two, _ = take_snapshot([write(tmp_path / "b.jsonl", texts(3)), write(tmp_path / "c.jsonl", texts(5))])

    assert one == two
    assert load_snapshot(one.content, one.digest) == one
    with pytest.raises(DatasetRefused, match="another digest"):
        load_snapshot(one.content + b" ", one.digest)


@given(st.lists(some_example, min_size=1, max_size=8))
def test_a_snapshot_reads_back_whatever_line_ends_its_texts_hold(examples: list[Example]) -> None:
    """Unicode has more line ends than files do."""
    from lora_core.data.snapshot import Snapshot, _digest

    made = Snapshot("", tuple(examples))

    assert load_snapshot(made.content, _digest(made.content)).examples == made.examples


def test_duplicates_and_bad_rows_are_counted(tmp_path: Path) -> None:
    """First wins; what was skipped is told."""
    rows = [*texts(20), {"text": "line 3"}, {"txt": "x"}]

    snapshot, report = take_snapshot([write(tmp_path / "a.jsonl", rows)])

    assert len(snapshot.examples) == 20
    assert (report.rows, report.kept, report.duplicates, report.bad) == (22, 20, 1, 1)
    assert str(report.problems[0]) == f"{tmp_path}/a.jsonl:22 txt: is not a known field; did you mean 'text'?"


def test_too_many_bad_rows_refuse_the_dataset_with_the_first_of_them(tmp_path: Path) -> None:
    """A wrong export should not train a wrong adapter."""
    path = write(tmp_path / "a.jsonl", [*texts(8), {}, {}])

    with pytest.raises(DatasetRefused, match=r"2 of 10 rows.*the first: .*a.jsonl:9 row") as caught:
        take_snapshot([path])

    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert len(take_snapshot([path], SkipPolicy(0.2))[0].examples) == 8


def test_a_file_without_examples_is_refused(tmp_path: Path) -> None:
    """Nothing is not a dataset."""
    with pytest.raises(DatasetRefused, match="no example"):
        take_snapshot([write(tmp_path / "a.jsonl", [])])


def lines(count: int) -> list[Example]:
    """Different examples of plain text."""
    return [Text(f"line {number}") for number in range(count)]


@given(st.integers(2, 300), st.integers(1, 40), st.floats(0.05, 0.5), st.randoms())
def test_a_split_loses_nothing_and_looks_at_content_alone(n: int, least: int, share: float, rng: random.Random) -> None:
    """Order does not matter."""
    mixed = lines(n)
    rng.shuffle(mixed)

    one, two = split(lines(n), share, minimum=least), split(mixed, share, minimum=least)

    assert set(one.held_out) == set(two.held_out)
    assert sorted(map(repr, (*one.train, *one.held_out))) == sorted(map(repr, lines(n)))
    assert len(one.held_out) >= min(least, n // 2)


@given(st.integers(0, 40), st.integers(1, 1000), st.floats(0.01, 0.5), st.sampled_from(["content", "order"]), st.text())
def test_never_more_than_half_is_held_out(
    n: int, least: int, share: float, by: Literal["content", "order"], user: str
) -> None:
    """A few examples may all have low hashes, and their user still has something to learn."""
    halves = split([Text(f"{user} {number}") for number in range(n)], share, by, least)

    assert min(least, n // 2) <= len(halves.held_out) <= n // 2
    assert len(halves.train) >= min(n, 1)


def test_an_example_does_not_change_sides_as_the_data_grows() -> None:
    """Else tomorrow's adapter would have learnt what it is judged by."""
    small, large = split(lines(400), 0.1, minimum=1), split(lines(4000), 0.1, minimum=1)

    assert set(small.held_out) <= set(large.held_out)
    assert set(small.train) <= set(large.train)
    assert 0.07 < len(large.held_out) / 4000 < 0.13


def test_by_order_the_last_are_held_out() -> None:
    """For data in order of time."""
    halves = split(lines(10), 0.2, "order", minimum=1)

    assert halves.held_out == tuple(lines(10)[8:])


rendered = st.lists(st.tuples(st.integers(1, 90), st.booleans()), min_size=2, max_size=16).map(
    lambda pairs: Rendered(tuple(token for token, _ in pairs), tuple(on for _, on in pairs))
)


@given(st.lists(rendered, max_size=12))
def test_packing_loses_nothing_and_mixes_nothing(examples: list[Rendered]) -> None:
    """Every example once and whole; positions restart; a target is the next token of the same example."""
    rows = pack(list(enumerate(examples)), 32)

    found: dict[int, tuple[int, ...]] = {}
    for row in rows:
        assert len(row.tokens) == len(row.targets) == len(row.positions) == len(row.documents) == 32
        for number, index in enumerate(row.examples):
            places = [place for place, document in enumerate(row.documents) if document == number]
            found[index] = tuple(row.tokens[place] for place in places)
            assert [row.positions[place] for place in places] == list(range(len(places)))
            expected = [
                t if on else IGNORED
                for t, on in zip(examples[index].tokens[1:], examples[index].trained[1:], strict=True)
            ]
            assert [row.targets[place] for place in places] == [*expected, IGNORED]
        assert row.used == sum(len(examples[index].tokens) for index in row.examples)
    assert found == {index: one.tokens for index, one in enumerate(examples)}
    assert sum(row.counted for row in rows) == sum(sum(one.trained[1:]) for one in examples)


@given(st.lists(st.tuples(rendered, rendered), max_size=8))
def test_the_two_answers_of_a_pair_lie_one_after_the_other_in_one_row(sides: list[tuple[Rendered, Rendered]]) -> None:
    """Each a document of its own."""
    rows = pack([(index, RenderedPair(*pair)) for index, pair in enumerate(sides)], 40)

    for row in rows:
        assert row.examples[::2] == row.examples[1::2]
        lengths = [len(document.tokens) for index in row.examples[::2] for document in sides[index]]
        assert list(row.lengths) == lengths
        assert row.used == sum(lengths)
    assert sorted(index for row in rows for index in row.examples[::2]) == list(range(len(sides)))


def test_an_example_longer_than_a_row_is_an_error() -> None:
    """Rendering should have cut it."""
    with pytest.raises(ValueError, match="lower max_length"):
        pack([(0, Rendered((1,) * 40, (True,) * 40))], 32)


@given(st.integers(1, 50), st.integers(1, 9), st.integers(0, 99))
def test_an_epoch_is_everybody_once_in_an_order_of_its_own(count: int, size: int, seed: int) -> None:
    """Decided by seed and epoch alone."""
    batches = list(epoch_batches(count, size, seed, 3))

    assert sorted(index for batch in batches for index in batch) == list(range(count))
    assert batches == list(epoch_batches(count, size, seed, 3))
    assert all(len(batch) == size for batch in batches[:-1])
