"""What a valid row is: every format that people bring, read into one of four kinds of example."""

import difflib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lora_core.errors import BadRow

Role = Literal["system", "user", "assistant"]

# What other formats call the three roles (ShareGPT's names among them).
ROLES: Mapping[str, Role] = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "model": "assistant", "chatgpt": "assistant", "bot": "assistant",
}  # fmt: skip
KNOWN = (
    "messages", "conversations", "prompt", "completion", "text", "instruction", "input", "output", "chosen", "rejected",
)  # fmt: skip


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True)
class Conversation:
    """Turns, rendered with the base's chat template; every assistant turn is learnt.  Also ShareGPT and Alpaca rows."""

    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Completion:
    """A prompt and what follows it, as raw text; only what follows is learnt."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """Plain text, learnt whole."""

    text: str


@dataclass(frozen=True)
class Preference:
    """Two answers to one beginning, of which one was chosen: both conversations, or both completions of a prompt."""

    chosen: Conversation | Completion
    rejected: Conversation | Completion


Example = Conversation | Completion | Text | Preference


def parse_example(row: Mapping[str, object]) -> Example:
    """One row of any accepted format; null is as good as absent, as exports of tables write it.

    Raises BadRow with the field, why, and how to mend it.
    """
    row = {field: value for field, value in row.items() if value is not None} or row
    if "chosen" in row or "rejected" in row:
        return _preference(row)
    if "messages" in row:
        return Conversation(_opened(row, _turns(row["messages"], "messages", "role", "content")))
    if "conversations" in row:
        return Conversation(_opened(row, _turns(row["conversations"], "conversations", "from", "value")))
    if "instruction" in row:
        return _alpaca(row)
    if "prompt" in row or "completion" in row:
        return _completion(row)
    if "text" in row:
        return Text(_string(row, "text"))
    raise _unknown(row)


def canonical_line(example: Example) -> str:
    """The example as compact JSON without a line end; `parse_example` reads it back equal."""
    return json.dumps(_plain(example), ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _plain(example: Example) -> dict[str, object]:
    match example:
        case Conversation(messages):
            return {"messages": _plain_turns(messages)}
        case Completion(prompt, completion):
            return {"completion": completion, "prompt": prompt}
        case Text(text):
            return {"text": text}
        case Preference(Completion(prompt, chosen), Completion(_, rejected)):
            return {"chosen": chosen, "prompt": prompt, "rejected": rejected}
        case Preference(Conversation(chosen), Conversation(rejected)):
            return {"chosen": _plain_turns(chosen), "rejected": _plain_turns(rejected)}
    raise AssertionError("a preference has two answers of one kind")


def _plain_turns(turns: Sequence[Message]) -> list[dict[str, str]]:
    return [{"content": turn.content, "role": turn.role} for turn in turns]


def _turns(value: object, field: str, role_key: str, text_key: str) -> tuple[Message, ...]:
    return _checked(_listed(value, field, role_key, text_key), field)


def _listed(value: object, field: str, role_key: str = "role", text_key: str = "content") -> tuple[Message, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise BadRow(
            field, f"is {_shown(value)}, not a list of turns", f"give [{{{role_key!r}: ..., {text_key!r}: ...}}]"
        )
    return tuple(_turn(turn, f"{field}[{index}]", role_key, text_key) for index, turn in enumerate(value))


def _checked(turns: tuple[Message, ...], field: str) -> tuple[Message, ...]:
    for index, turn in enumerate(turns):
        if turn.role == "system" and index:
            raise BadRow(f"{field}[{index}]", "a system turn after the first", "move it to the front")
    if not any(turn.role == "assistant" for turn in turns):
        raise BadRow(field, "has no assistant turn, so there is nothing to learn", "add the answer")
    return turns


def _turn(turn: object, field: str, role_key: str, text_key: str) -> Message:
    if not isinstance(turn, Mapping):
        raise BadRow(field, f"is {_shown(turn)}, not an object", f"give {role_key!r} and {text_key!r}")
    role = turn.get(role_key)
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise BadRow(f"{field}.{role_key}", f"is {_shown(role)}", "use system, user or assistant")
    known = ROLES[role.lower()]
    if known == "assistant":
        _check_is_said(turn, field)
    content = _joined(turn.get(text_key), f"{field}.{text_key}")
    return Message(known, _text(content, f"{field}.{text_key}", blank=known != "assistant"))


def _joined(content: object, field: str) -> object:
    """Parts of text as one, where a turn's content is a list of them (OpenAI's newer layout); else as it is."""
    if not isinstance(content, Sequence) or isinstance(content, str) or not content:
        return content
    texts = []
    for index, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise BadRow(f"{field}[{index}]", f"is {_shown(part)}, not a part of text", "drop the part, or the row")
        texts.append(_text(part.get("text"), f"{field}[{index}].text", blank=True))
    return "".join(texts)


def _check_is_said(turn: Mapping[str, object], field: str) -> None:
    """Refuse an answer that is more than its words or shall not be learnt: it would be learnt as it is not meant."""
    for call in ("tool_calls", "function_call"):
        if turn.get(call):
            raise BadRow(
                f"{field}.{call}", "calls a tool, which is not learnt", "write the call as text, or drop the row"
            )
    if turn.get("weight") == 0:
        raise BadRow(
            f"{field}.weight", "is 0, and every answer is learnt", "end the conversation before it, or drop the row"
        )


def _completion(row: Mapping[str, object]) -> Completion | Conversation:
    """A text and how it goes on, or as TRL documents both, lists of turns."""
    prompt = row.get("prompt")
    if all(isinstance(row.get(field), str | None) for field in ("prompt", "completion")):
        return Completion(_string(row, "prompt", blank=True), _string(row, "completion"))
    if not isinstance(prompt, str | None) and any(turn.role == "assistant" for turn in _listed(prompt, "prompt")):
        raise BadRow("prompt", "holds an answer, and every answer is learnt", "give all turns as messages, or drop it")
    return _side(row, "completion")


def _preference(row: Mapping[str, object]) -> Preference:
    """A pair as TRL documents it: two texts or two lists of turns; the prompt apart, or what both begin with."""
    texts = all(isinstance(row.get(field), str | None) for field in ("prompt", "chosen", "rejected"))
    if texts:
        return _two_texts(row)
    chosen, rejected = _side(row, "chosen"), _side(row, "rejected")
    _check_apart(chosen, rejected)
    if chosen.messages[0] != rejected.messages[0]:
        raise BadRow("rejected", "begins with another turn than chosen", "give two answers to one prompt")
    return Preference(chosen, rejected)


def _two_texts(row: Mapping[str, object]) -> Preference:
    chosen, rejected = _string(row, "chosen"), _string(row, "rejected")
    _check_apart(chosen, rejected)
    if row.get("prompt") is not None:
        prompt = _string(row, "prompt", blank=True)
    else:  # whole words of what both begin with
        shared = chosen[: shared_length(chosen, rejected)]
        prompt = shared[: max(shared.rfind(blank) for blank in " \n") + 1]
    at = 0 if row.get("prompt") is not None else len(prompt)
    sides = (_text(side[at:], field, blank=False) for side, field in ((chosen, "chosen"), (rejected, "rejected")))
    return Preference(*(Completion(prompt, side) for side in sides))


def shared_length(left: Sequence[object], right: Sequence[object]) -> int:
    """How long the beginning is that two sequences share."""
    differing = (index for index, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)
    return next(differing, min(len(left), len(right)))


def _check_apart(chosen: object, rejected: object) -> None:
    if chosen == rejected:
        raise BadRow("rejected", "is the same as chosen, so there is nothing to learn", "drop the row")


def _side(row: Mapping[str, object], field: str) -> Conversation:
    """One answer with all that goes before it: the list may hold the prompt's turns, or begin after them."""
    value, prompt = row.get(field), row.get("prompt")
    turns = (Message("assistant", _string(row, field)),) if isinstance(value, str | None) else _listed(value, field)
    if prompt is None:
        head: tuple[Message, ...] = ()
    elif isinstance(prompt, str):
        head = (Message("user", _text(prompt, "prompt", blank=False)),) if turns[0].role == "assistant" else ()
    else:
        head = _listed(prompt, "prompt")
    whole = _checked(turns if turns[: len(head)] == head else head + turns, field)
    if whole[-1].role != "assistant":
        raise BadRow(field, "does not end with an assistant turn", "add the answer")
    if whole[0].role == "assistant":
        raise BadRow("prompt", "is missing", "add what was asked, as 'prompt' or as the first turns of both answers")
    return Conversation(whole)


def _alpaca(row: Mapping[str, object]) -> Conversation:
    instruction, output = _string(row, "instruction"), _string(row, "output")
    more = _string(row, "input", blank=True) if row.get("input") is not None else ""
    asked = f"{instruction}\n\n{more}" if more.strip() else instruction
    return Conversation(_opened(row, (*_history(row), Message("user", asked), Message("assistant", output))))


def _opened(row: Mapping[str, object], turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """Turns behind the system turn that a row may have apart from them, as LLaMA-Factory and Axolotl write it."""
    if row.get("system") is None or turns[0].role == "system":
        return turns
    system = _string(row, "system", blank=True)
    return (Message("system", system), *turns) if system.strip() else turns


def _history(row: Mapping[str, object]) -> tuple[Message, ...]:
    """What was said before an instruction: LLaMA-Factory's list of questions with their answers."""
    pairs = row.get("history") or ()
    if not isinstance(pairs, list | tuple) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs
    ):
        raise BadRow("history", f"is {_shown(pairs)}, not questions with answers", "give [[question, answer], ...]")
    roles: tuple[Role, ...] = ("user", "assistant")
    return tuple(
        Message(role, _text(text, f"history[{index}]", blank=role == "user"))
        for index, pair in enumerate(pairs)
        for role, text in zip(roles, pair, strict=True)
    )


def _string(row: Mapping[str, object], field: str, blank: bool = False) -> str:
    if field not in row:
        near = difflib.get_close_matches(field, _first_keys(row), n=1)
        raise BadRow(field, "is missing", f"rename {near[0]!r} to {field!r}" if near else f"add {field!r}")
    return _text(row[field], field, blank)


def _text(value: object, field: str, blank: bool) -> str:
    if value is None:
        raise BadRow(field, "is missing", "add the text")
    if not isinstance(value, str):
        fix = "write it as one text" if isinstance(value, list | tuple | Mapping) else "put it in quotes"
        raise BadRow(field, f"is {_shown(value)}, not text", fix)
    if not blank and not value.strip():
        raise BadRow(field, "is empty", "write the text that is to be learnt, or drop the row")
    if "\0" in value:
        raise BadRow(field, "holds a NUL character", "remove it")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(field, "holds half of a surrogate pair", "write the character itself") from None
    return value


def _unknown(row: Mapping[str, object]) -> BadRow:
    for key in _first_keys(row):
        near = difflib.get_close_matches(key, KNOWN, n=1, cutoff=0.75)
        if near:
            return BadRow(key, "is not a known field", f"did you mean {near[0]!r}?")
    given = ", ".join(map(repr, _first_keys(row)[:6])) or "nothing"
    return BadRow(
        "row",
        f"has {given}",
        "give messages, prompt and completion, chosen and rejected, text, instruction or conversations",
    )


def _first_keys(row: Mapping[str, object]) -> list[str]:
    """A few keys' beginnings: likenesses take time, and a hostile row has a hundred thousand keys."""
    return [str(key)[:40] for key in itertools.islice(row, 50)]


def _shown(value: object) -> str:
    return "missing" if value is None else f"{type(value).__name__} {str(value)[:30]!r}"
