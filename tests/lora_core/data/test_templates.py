"""Chat templates with ways of their own, as well-known bases have them: what is learnt is the answers all the same."""

from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from lora_core.data.examples import Conversation, Message
from lora_core.data.rendering import Rendered, render, render_prompt, turns_to_prompt
from tests.lora_core.conftest import CHATML, make_tokenizer

# Only the last answer has room for thoughts (Qwen3).
THINKING = (
    "{%- set ns = namespace(last=0) %}{%- for m in messages %}"
    "{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}"
    "{%- endif %}{%- endfor %}{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' and loop.index0 > ns.last %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{{- m.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
# The system turn stands before the last words of the user, where those are last (Mistral's Nemo and 7B v0.3).
SYSTEM_LAST = (
    "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}{%- set talk = messages[1:] %}"
    "{%- else %}{%- set talk = messages %}{%- endif %}{%- for m in talk %}{%- if m.role == 'user' %}"
    "{%- if loop.last and system is defined %}{{- '[INST]' + system + '\n\n' + m.content + '[/INST]' }}"
    "{%- else %}{{- '[INST]' + m.content + '[/INST]' }}{%- endif %}"
    "{%- else %}{{- m.content + '<|im_end|>' }}{%- endif %}{%- endfor %}"
)
# The end of the text is another token than that of a turn, and begins like the next turn does (Phi-3).
ENDED = (
    "{% for m in messages %}{{ '[INST]' if m.role == 'user' else '[/INST]' }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}[/INST]\n{% else %}[end]{% endif %}"
)
# A system turn where there is none (Qwen2.5).
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}" + CHATML
)
TEMPLATES = {"thinking": THINKING, "system last": SYSTEM_LAST, "ended": ENDED, "default system": DEFAULT_SYSTEM}


def learnt(talk: Conversation, tokenizer: PreTrainedTokenizerFast) -> str:
    """The text of the tokens that count."""
    rendered = render(talk, tokenizer, 1000)
    assert isinstance(rendered, Rendered)
    return str(tokenizer.decode([t for t, on in zip(rendered.tokens, rendered.trained, strict=True) if on]))


@pytest.mark.parametrize("first", [(), (Message("system", "be brief"),)], ids=["plain", "with a system turn"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_answer_is_learnt_and_no_word_of_anybody_else(name: str, first: tuple[Message, ...]) -> None:
    """Also where the template writes the last turn, or the turn before it, in a way of its own."""
    talk = Conversation(
        (*first, Message("user", "the fox"), Message("assistant", "hello dog"), Message("user", "and then"),
         Message("assistant", "quick"), Message("user", "so"), Message("assistant", "the end"))
    )  # fmt: skip

    text = learnt(talk, make_tokenizer(TEMPLATES[name]))

    bare = text.replace("<think>\n\n</think>\n\n", "").replace("[end]", "")
    assert [answer.strip() for answer in bare.split("<|im_end|>")] == ["hello dog", "quick", "the end", ""]


TOKENIZERS = {name: make_tokenizer(template) for name, template in TEMPLATES.items()}
odd = st.text(st.sampled_from("ab .<[é😀\n\t"), max_size=8)


@given(st.sampled_from(sorted(TEMPLATES)), st.lists(st.tuples(odd, odd), min_size=1, max_size=3), st.booleans())
def test_whatever_the_words_are_only_answers_are_learnt(name: str, said: list[tuple[str, str]], opened: bool) -> None:
    """Words that begin or end as a template's own do move no boundary."""
    turns = [Message("system", "SYSTEM")] if opened else []
    for before, after in said:
        turns += [Message("user", f"{before}USER{after}"), Message("assistant", f"{after}ANSWER{before}")]

    text = learnt(Conversation(tuple(turns)), TOKENIZERS[name])

    assert text.count("ANSWER") == len(said)
    assert all(turn.content in text for turn in turns if turn.role == "assistant")
    assert not {word for word in ("USER", "SYSTEM", "INST") if word in text}


def test_an_answer_is_compared_with_what_was_learnt() -> None:
    """A template's empty thoughts are learnt with the answer, and said before it."""
    talk = Conversation((Message("user", "the fox"), Message("assistant", "hello dog")))

    found = render_prompt(talk, make_tokenizer(THINKING))

    assert found
    assert found[1] == "<think>\n\n</think>\n\nhello dog"


@pytest.mark.parametrize("name", TEMPLATES)
def test_where_the_assistant_begins_nothing_before_its_words_is_learnt(name: str) -> None:
    """Neither a template's own system turn, nor the heading of the answer."""
    talk = Conversation((Message("assistant", "hello"), Message("user", "the fox"), Message("assistant", "dog")))

    text = learnt(talk, make_tokenizer(TEMPLATES[name]))

    assert text.startswith("hello<|im_end|>")
    assert not {"helpful", "system", "fox"} & set(text.replace("<|im_end|>", " ").split())


def test_the_day_on_which_it_is_rendered_changes_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 3.2's template writes today's date: then no version could be trained again on another day."""
    tokenizer = make_tokenizer("Today is {{ strftime_now('%d %b %Y') }}.\n" + CHATML)
    talk = Conversation((Message("user", "hi"), Message("assistant", "hello")))
    first = render(talk, tokenizer, 1000), turns_to_prompt(talk.messages[:1], tokenizer)

    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz: object = None) -> "Tomorrow":
            return cls(2031, 5, 17)

    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    again = render(talk, tokenizer, 1000), turns_to_prompt(talk.messages[:1], tokenizer)

    assert again == first
