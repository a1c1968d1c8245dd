"""What of a user's examples is learnt and judged by, and what is said where nothing is left."""

import pytest

from flows.candidates import judge_candidates, make_candidate
from flows.lessons import read_lessons
from lora_core.base_model import BaseModel, freeze
from lora_core.data.examples import Completion, Conversation, Example, Message, Text
from lora_core.data.snapshot import Snapshot
from lora_core.errors import TrainingError
from lora_core.recipe import load_recipe
from lora_core.train import train
from tests.lora_core.conftest import CHATML, llama, make_tokenizer

REFUSING = "{{ raise_exception('No chats today') }}" + CHATML


@pytest.fixture(scope="module")
def reading_base() -> BaseModel:
    """A base whose template refuses every conversation, and whose tokenizer was given a token too many for it."""
    model, tokenizer = llama(), make_tokenizer(REFUSING)
    model.resize_token_embeddings(len(tokenizer))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return freeze(model, tokenizer, "llama")


def texts(count: int) -> list[Example]:
    """Different ones."""
    return [Text(f"hello {number}") for number in range(count)]


STRANGE: list[Example] = [Completion(f"say [PAD] {number}", " dog") for number in range(20)]
TWINS: list[Example] = [Text("the quick fox " * 40 + str(number)) for number in range(20)]
LONG: list[Example] = [Completion("the fox " * 40 + str(number), " dog") for number in range(20)]
TALKS: list[Example] = [
    Conversation((Message("user", f"say {number}"), Message("assistant", "dog"))) for number in range(20)
]


@pytest.mark.parametrize(
    ("examples", "settings", "said"),
    [
        (texts(1), [], "1 examples to learn from and 0 to judge by; add examples"),
        (LONG, [], r"0 .* 0 to judge by, 20 have nothing to learn in their first 64 tokens; raise max_length"),
        (TALKS, [], r"20 are refused by the base's chat template \(No chats today\); change their turns"),
        ([*TALKS, *LONG[:2]], [], "have nothing to learn .*, 20 are refused .*; change their turns"),
        (STRANGE, [], r"20 have tokens that the base has no embedding for \(\[PAD\]\); leave those words out"),
        (TWINS, [], "0 examples .* 12 are read like one to judge by in their first 64 tokens; raise max_length"),
        (texts(20), ["max_tokens=2"], r"max_tokens 2 is less than the last example has, \d+; raise it"),
    ],
)
def test_where_nothing_is_left_it_is_said_what_became_of_it(
    reading_base: BaseModel, examples: list[Example], settings: list[str], said: str
) -> None:
    """More examples of the same kind would not help."""
    recipe = load_recipe(None, ["row_tokens=64", "max_length=64", *settings])

    with pytest.raises(TrainingError, match=said):
        read_lessons("acme/alice", tuple(examples), recipe, reading_base)


def test_what_nothing_comes_of_is_counted(reading_base: BaseModel) -> None:
    """The others are learnt and judged by."""
    recipe = load_recipe(None, ["row_tokens=64", "max_length=64"])

    found = read_lessons("acme/alice", (*texts(30), *TALKS[:3], *STRANGE[:2]), recipe, reading_base)

    assert (len(found.learned) + len(found.judged), found.dropped, found.cut) == (30, 5, 0)


def test_whoever_writes_a_token_that_the_base_does_not_know_is_judged_without_it(reading_base: BaseModel) -> None:
    """One such token ends a whole cohort's forward pass, in judging and answering too."""
    recipe = load_recipe(None, ["row_tokens=64", "max_length=64", "holdout.share=0.5", "epochs=1", "rank=2"])
    plain = [Completion(f"say {number}", " dog") for number in range(30)]
    candidate = make_candidate("acme/alice", recipe, Snapshot("", (*plain, *STRANGE)), reading_base)
    candidate.trained = next(train(reading_base, [candidate.learner], 1, 64))

    judge_candidates(reading_base, [candidate], 1, 64)

    assert candidate.dropped == len(STRANGE)
    assert set(candidate.tasks) == {"base", "candidate"}


def test_what_is_read_like_an_example_to_judge_by_is_not_learnt(reading_base: BaseModel) -> None:
    """Texts that differ behind what is read only, or that the tokenizer makes equal, would be judged by as learnt."""
    recipe = load_recipe(None, ["row_tokens=64", "max_length=64"])
    twins = [Text(f"{number} " + "the quick fox " * 40 + end) for number in range(20) for end in ("dog", "fox")]

    found = read_lessons("acme/alice", tuple(twins), recipe, reading_base)

    assert not {one.tokens for one in found.learned} & {one.tokens for one in found.judged}
    assert len(found.learned) + len(found.judged) + found.dropped == len(twins)
