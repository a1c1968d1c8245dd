"""Examples as tokens: the whole text as the tokenizer would have it, and loss on the answers alone."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lora_core.data.examples import Completion, Conversation, Message, Preference, Role, Text
from lora_core.data.rendering import (
    AnyRendered,
    Rendered,
    RenderedPair,
    render,
    render_prompt,
    turn_end,
    turns_to_prompt,
)
from lora_core.errors import TemplateRefused
from tests.lora_core.conftest import CHATML, make_tokenizer

INST = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
TRIMMING = CHATML.replace("m['content']", "m['content'] | trim")
TEMPLATES = {"chatml": CHATML, "inst": INST, "none": None, "trimming": TRIMMING, "no system": NO_SYSTEM}
TOKENIZERS = {name: make_tokenizer(template) for name, template in TEMPLATES.items()}
plain = st.text(st.sampled_from("abc XYZ.!?\n'é😀"), min_size=1, max_size=30).filter(lambda text: text.strip())


def learnt(rendered: AnyRendered | None, tokenizer: PreTrainedTokenizerFast) -> str:
    """The text of the tokens that count."""
    assert isinstance(rendered, Rendered)
    return str(tokenizer.decode([t for t, on in zip(rendered.tokens, rendered.trained, strict=True) if on]))


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_answers_are_learnt_with_what_ends_them_and_nothing_else(name: str) -> None:
    """With any template, or none."""
    tokenizer = TOKENIZERS[name]
    talk = Conversation(
        (
            Message("user", "the fox"),
            Message("assistant", "hello dog"),
            Message("user", "and"),
            Message("assistant", "the end"),
        )
    )

    text = learnt(render(talk, tokenizer, 200), tokenizer)

    assert text.split("<|im_end|>")[0].strip() == "hello dog"
    assert text.split("<|im_end|>")[1].strip() == "the end"
    assert text.count("<|im_end|>") == 2
    assert "fox" not in text
    assert "assistant" not in text


@given(plain, plain, st.sampled_from(sorted(TEMPLATES)))
def test_a_chat_is_the_tokens_of_its_whole_text(asked: str, said: str, name: str) -> None:
    """No boundary makes other tokens than inference will see; the answer is all there."""
    tokenizer = TOKENIZERS[name]
    talk = Conversation((Message("user", asked), Message("assistant", said)))

    rendered = render(talk, tokenizer, 10_000)

    assert rendered
    whole = tokenizer.decode(rendered.tokens)
    assert list(rendered.tokens) == tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert said.strip() in learnt(rendered, tokenizer)


def test_a_system_turn_goes_into_the_first_user_turn_where_a_template_knows_none() -> None:
    """As such templates' makers advise."""
    tokenizer = TOKENIZERS["no system"]
    talk = Conversation((Message("system", "be brief"), Message("user", "hello"), Message("assistant", "dog")))

    rendered = render(talk, tokenizer, 200)

    assert rendered
    assert "<|im_start|>user\nbe brief\n\nhello<|im_end|>" in tokenizer.decode(rendered.tokens)
    assert learnt(rendered, tokenizer).startswith("dog")


ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}{% endfor %}" + CHATML
)


@pytest.mark.parametrize("roles", [("user", "user", "assistant"), ("system", "user", "user", "assistant"), ("system",)])
def test_a_conversation_that_the_template_refuses_is_told_in_the_templates_words(roles: tuple[Role, ...]) -> None:
    """One of our own errors, so that one user's example cannot end a whole cohort."""
    tokenizer = make_tokenizer(ALTERNATING)
    talk = Conversation((*(Message(role, "hello") for role in roles), Message("assistant", "dog")))

    for attempt in (lambda: render(talk, tokenizer, 200), lambda: render_prompt(talk, tokenizer)):
        with pytest.raises(TemplateRefused, match=r"must alternate.*change its turns") as caught:
            attempt()

    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_of_a_completion_only_what_follows_the_prompt_is_learnt(tokenizer: PreTrainedTokenizerFast) -> None:
    """As raw text, with the end token."""
    rendered = render(Completion("the quick", " brown fox"), tokenizer, 100)

    assert learnt(rendered, tokenizer) == " brown fox<|im_end|>"


def test_plain_text_is_learnt_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    """From its first token to its end."""
    rendered = render(Text("hello dog"), tokenizer, 100)

    assert learnt(rendered, tokenizer) == "hello dog<|im_end|>"


def test_what_is_too_long_is_cut_and_says_so(tokenizer: PreTrainedTokenizerFast) -> None:
    """And an example whose answer is cut away altogether is none."""
    example = Completion("the quick " * 5, "brown fox")

    whole = render(example, tokenizer, 1000)
    assert whole
    cut = render(example, tokenizer, len(whole.tokens) - 1)

    assert cut
    assert (len(cut.tokens), cut.truncated, whole.truncated) == (len(whole.tokens) - 1, True, False)
    assert render(example, tokenizer, 3) is None


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_is_what_the_answer_follows(name: str) -> None:
    """The same tokens that training saw before the answer."""
    tokenizer = TOKENIZERS[name]
    talk = Conversation((Message("user", "the fox"), Message("assistant", "hello")))
    rendered, prompt = render(talk, tokenizer, 100), render_prompt(talk, tokenizer)

    assert isinstance(rendered, Rendered)
    assert prompt
    tokens, reference = prompt
    assert list(rendered.tokens[: len(tokens)]) == tokens
    assert reference == "hello"
    assert rendered.trained.index(True) == len(tokens)
    assert not tokenizer.chat_template or turns_to_prompt(talk.messages[:1], tokenizer) == tokens
    assert render_prompt(Text("the fox"), tokenizer) is None


def pair(prompt: str, chosen: str, rejected: str) -> Preference:
    """Two answers in a conversation."""
    asked = (Message("user", prompt),)
    return Preference(*(Conversation((*asked, Message("assistant", answer))) for answer in (chosen, rejected)))


@pytest.mark.parametrize("name", TEMPLATES)
def test_of_a_pair_only_what_differs_is_learnt(name: str) -> None:
    """Each with what ends it; the prompt and the words that both begin with tell neither from the other."""
    tokenizer = TOKENIZERS[name]

    found = render(pair("the fox", "hello dog", "hello fox, the end"), tokenizer, 300)

    assert isinstance(found, RenderedPair)
    texts = [learnt(side, tokenizer).split("<|im_end|>")[0].strip() for side in found.documents]
    assert texts == ["dog", "fox, the end"]
    assert found.tokens == found.chosen.tokens + found.rejected.tokens
    assert not found.truncated


def test_a_pair_is_cut_as_a_whole_and_a_short_answer_leaves_its_room_to_the_longer() -> None:
    """What is left of both fits; a pair that says no difference in that length is none."""
    tokenizer = TOKENIZERS["chatml"]
    short, long = pair("the fox", "dog", "x " * 100), pair("the fox " * 50, "dog", "hello")
    whole = render(short, tokenizer, 1000)
    assert isinstance(whole, RenderedPair)

    cut = render(short, tokenizer, len(whole.chosen.tokens) + 60)

    assert isinstance(cut, RenderedPair)
    assert cut.chosen == whole.chosen
    assert (len(cut.rejected.tokens), cut.truncated) == (60, True)
    assert render(long, tokenizer, 60) is None
    assert render_prompt(short, tokenizer) == render_prompt(short.chosen, tokenizer)


REFUSING = "{{ raise_exception('no') }}"


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"), (INST, "<|im_end|>"), (TRIMMING, "<|im_end|>"), (CHATML.replace("<|im_end|>", "."), ""),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", ""), (REFUSING, ""), (None, ""),
    ],
)  # fmt: skip
def test_a_template_tells_what_ends_a_turn(template: str | None, end: str) -> None:
    """Where that is a special token: no other is nothing but an end."""
    tokenizer = make_tokenizer(template)
    tokenizer.eos_token = "<|endoftext|>"

    assert turn_end(tokenizer) == (tokenizer.convert_tokens_to_ids(end) if end else None)
