"""Examples as tokens of one base, with a mark on each token that is to be learnt."""

import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

from jinja2 import TemplateError

from lora_core.data.examples import Completion, Conversation, Example, Message, Preference, Text, shared_length
from lora_core.errors import TemplateRefused

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


IGNORED = -100  # the target of a token whose prediction does not count
_MARK = "\ue0a7answer\ue0a7"  # letters of nobody's alphabet, which no template changes
_TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_DAY = date(2024, 7, 26)  # what stands for today: the day that Llama's templates fall back to

Numbers: TypeAlias = "array[int]"  # of 64 bits


def numbers(values: Iterable[int]) -> Numbers:
    """As an array, which is moved whole."""
    return array("q", values)


@dataclass(frozen=True)
class Rendered:
    """One example's tokens; `trained[i]` says that predicting token i counts."""

    tokens: tuple[int, ...]
    trained: tuple[bool, ...]
    truncated: bool = False

    @cached_property
    def targets(self) -> Numbers:
        """What each position must predict, the next token or IGNORED: read again in every epoch."""
        following = zip(self.tokens[1:], self.trained[1:], strict=True)
        return numbers([*(token if trained else IGNORED for token, trained in following), IGNORED])

    @property
    def documents(self) -> tuple["Rendered", ...]:
        """What is read as a document of its own."""
        return (self,)


@dataclass(frozen=True)
class RenderedPair:
    """Two answers, each a document.  What both begin with is marked as not learnt: it tells neither from the other."""

    chosen: Rendered
    rejected: Rendered

    @property
    def documents(self) -> tuple[Rendered, ...]:
        """The chosen one first."""
        return (self.chosen, self.rejected)

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        """Both documents' tokens."""
        return self.chosen.tokens + self.rejected.tokens

    @property
    def truncated(self) -> bool:
        """Whether either was cut."""
        return self.chosen.truncated or self.rejected.truncated


AnyRendered = Rendered | RenderedPair


def render(example: Example, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> AnyRendered | None:
    """An example as tokens, cut to `max_length` from the end (a pair: both together); None when nothing is left.

    Loss on the answers only, with the token that ends them; on everything for plain text.
    Raises TemplateRefused for a conversation that the base's chat template does not take.
    """
    if isinstance(example, Preference):
        return _pair(example, tokenizer, max_length)
    return _single(example, tokenizer, max_length)


def _pair(example: Preference, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> RenderedPair | None:
    sides = [_single(side, tokenizer, max_length) for side in (example.chosen, example.rejected)]
    if None in sides:
        return None
    whole = [side for side in sides if side]
    shorter = min(len(side.tokens) for side in whole)
    each = max(max_length // 2, max_length - shorter)  # a short answer leaves its room to the longer one
    chosen, rejected = (_cut(side, each) for side in whole)
    shared = shared_length(chosen.tokens, rejected.tokens)
    if chosen.tokens == rejected.tokens or not any(chosen.trained[shared:] + rejected.trained[shared:]):
        return None
    return RenderedPair(_unlearnt(chosen, shared), _unlearnt(rejected, shared))


def _cut(rendered: Rendered, length: int) -> Rendered:
    if len(rendered.tokens) <= length:
        return rendered
    return Rendered(rendered.tokens[:length], rendered.trained[:length], truncated=True)


def _unlearnt(rendered: Rendered, count: int) -> Rendered:
    return replace(rendered, trained=(False,) * count + rendered.trained[count:])


def _single(
    example: Conversation | Completion | Text, tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> Rendered | None:
    match example:
        case Conversation(messages):
            text, spans = _conversation(messages, tokenizer)
            tokens, trained = _marked(text, spans, tokenizer, special=False)
        case Completion(prompt, completion):
            whole = prompt + completion + (tokenizer.eos_token or "")
            tokens, trained = _marked(whole, [(len(prompt), len(whole))], tokenizer, special=True)
        case Text(text):
            whole = text + (tokenizer.eos_token or "")
            tokens, trained = _marked(whole, [(0, len(whole))], tokenizer, special=True)
    cut = len(tokens) > max_length
    tokens, trained = tokens[:max_length], trained[:max_length]
    if not any(trained[1:]):  # the first token is never predicted
        return None
    return Rendered(tuple(tokens), tuple(trained), cut)


def render_prompt(example: Example, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], str] | None:
    """What to generate from, and the answer to compare with: the last assistant turn, the completion, or the chosen.

    The answer is as it was learnt, with what the template puts around the assistant's words.  Raises TemplateRefused.
    """
    match example:
        case Preference(chosen):
            return render_prompt(chosen, tokenizer)
        case Conversation(messages) if messages[-1].role == "assistant":
            asked = _template(messages[:-1], tokenizer, prompting=True)
            whole, (*_, last) = _conversation(messages, tokenizer)
            return _encode(asked, tokenizer, special=False), _read(whole[slice(*last)], tokenizer)
        case Completion(prompt, completion) if prompt:
            return _encode(prompt, tokenizer, special=True), completion
        case _:
            return None


def _read(text: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """A text as answers are read: without the tokens that end it."""
    return str(tokenizer.decode(_encode(text, tokenizer, special=False), skip_special_tokens=True)).strip()


def turns_to_prompt(turns: Sequence[Message], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """A conversation up to what a person typed last; where the base has no chat template, that alone as raw text.

    Raises TemplateRefused.
    """
    if not tokenizer.chat_template:
        return _encode(turns[-1].content, tokenizer, special=True)
    return _encode(_template(turns, tokenizer, prompting=True), tokenizer, special=False)


def turn_end(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The special token that ends an answer by the base's chat template: learnt as a part of it, and not always eos."""
    if not tokenizer.chat_template:
        return None
    try:
        whole = _template([Message("user", "asked"), Message("assistant", "answered")], tokenizer, prompting=False)
    except TemplateRefused:
        return None
    tokens = _encode(whole.rpartition("answered")[2], tokenizer, special=False)
    added = tokenizer.added_tokens_decoder.get(tokens[0]) if tokens else None
    return tokens[0] if added and added.special else None


def _conversation(
    messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered text, and where the assistant's words are in it, each with what ends its turn."""
    whole = _template(messages, tokenizer, prompting=False)
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    return whole, [_span(messages, index, whole, tokenizer) for index in answers]


def _span(messages: Sequence[Message], index: int, whole: str, tokenizer: "PreTrainedTokenizerBase") -> tuple[int, int]:
    """Where one answer is in the rendered text: behind what asks for it, up to what ends its turn.

    Templates may write the last turn in a way of its own: then another text in the answer's place shows where that is.
    """
    asked = _template(messages[:index], tokenizer, prompting=True) if index else ""
    until = _template(messages[: index + 1], tokenizer, prompting=False)
    if asked and whole.startswith(asked) and whole.startswith(until):
        return len(asked), len(until)
    before, after = _around(messages, index, tokenizer)
    start = shared_length(before, whole)
    end = max(start, len(whole) - shared_length(after[::-1], whole[::-1]))
    _, closing = _around(messages[: index + 1], index, tokenizer)
    end = len(until) if whole.startswith(until) else end + shared_length(closing, whole[end:])
    return len(asked) if asked and whole.startswith(asked) else start, end


def _around(messages: Sequence[Message], index: int, tokenizer: "PreTrainedTokenizerBase") -> tuple[str, str]:
    """What is rendered before one turn's words and after them."""
    marked = [*messages[:index], Message(messages[index].role, _MARK), *messages[index + 1 :]]
    before, _, after = _template(marked, tokenizer, prompting=False).partition(_MARK)
    return before, after


def _template(messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase", prompting: bool) -> str:
    turns = [{"role": message.role, "content": message.content} for message in messages]
    if not tokenizer.chat_template:
        return _plain(messages, tokenizer, prompting)
    if not turns:
        return tokenizer.bos_token or "" if prompting else ""
    try:
        template = _undated(tokenizer.get_chat_template())
        return str(
            tokenizer.apply_chat_template(
                turns, chat_template=template, tokenize=False, add_generation_prompt=prompting
            )
        )
    except TemplateError as error:
        if messages[0].role != "system" or len(messages) < 2:
            raise TemplateRefused((str(error) or type(error).__name__).splitlines()[0][:200]) from None
        # Some templates know no system turn (Gemma's): its words then open the first user turn, as their makers advise.
        first = Message(messages[1].role, f"{messages[0].content}\n\n{messages[1].content}")
        return _template([first, *messages[2:]], tokenizer, prompting)


@cache
def _undated(template: str) -> str:
    """The template with one day for every day, where it writes today's: the same examples are the same tokens."""
    return _TODAY.sub(lambda found: repr(_DAY.strftime(found[2])), template)


def _plain(messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase", prompting: bool) -> str:
    """Chat for a base without a template: `role: words`, a blank line between, the end token after each answer."""
    end = tokenizer.eos_token or ""
    turns = [f"{m.role}: {m.content}{end if m.role == 'assistant' else ''}\n\n" for m in messages]
    asks = "assistant:" if prompting else ""  # tokenizers join the blank behind it and what follows
    return (tokenizer.bos_token or "") + "".join(turns) + asks


def _encode(text: str, tokenizer: "PreTrainedTokenizerBase", special: bool) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    eos = tokenizer.eos_token_id
    return ids[:-1] if special and ids and ids[-1] == eos and not text.endswith(tokenizer.eos_token or "\0") else ids


def _marked(
    text: str, spans: Sequence[tuple[int, int]], tokenizer: "PreTrainedTokenizerBase", special: bool
) -> tuple[list[int], list[bool]]:
    """Tokens of the whole text, so that no boundary changes them, marked where they begin and end inside a span."""
    encoded: Any = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    tokens: list[int] = encoded["input_ids"]
    trained = [
        any(start <= _begin(text, first, last) < last <= end for start, end in spans)
        for first, last in encoded["offset_mapping"]
    ]
    end = tokenizer.eos_token_id
    if special and len(tokens) > 1 and tokens[-1] == tokens[-2] == end:  # the tokenizer adds its own as well
        return tokens[:-1], trained[:-1]
    return tokens, trained


def _begin(text: str, first: int, last: int) -> int:
    """Where a token's first letter is: one that begins with the blank before an answer belongs to the answer."""
    while first < last - 1 and text[first].isspace():
        first += 1
    return first
