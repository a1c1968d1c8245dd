"""What a valid row is: every format that people bring, read into one of four kinds of example."""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lora_core.data.fields import first_keys, joined, shown, string, text_of
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
        return Text(string(row, "text"))
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
            field, f"is {shown(value)}, not a list of turns", f"give [{{{role_key!r}: ..., {text_key!r}: ...}}]"
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
        raise BadRow(field, f"is {shown(turn)}, not an object", f"give {role_key!r} and {text_key!r}")
    role = turn.get(role_key)
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise BadRow(f"{field}.{role_key}", f"is {shown(role)}", "use system, user or assistant")
    known = ROLES[role.lower()]
    if known == "assistant":
        _check_is_said(turn, field)
    content = joined(turn.get(text_key), f"{field}.{text_key}")
    return Message(known, text_of(content, f"{field}.{text_key}", blank=known != "assistant"))


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
        return Completion(string(row, "prompt", blank=True), string(row, "completion"))
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
    chosen, rejected = string(row, "chosen"), string(row, "rejected")
    _check_apart(chosen, rejected)
    if row.get("prompt") is not None:
        prompt = string(row, "prompt", blank=True)
    else:  # whole words of what both begin with
        shared = chosen[: shared_length(chosen, rejected)]
        prompt = shared[: max(shared.rfind(blank) for blank in " \n") + 1]
    at = 0 if row.get("prompt") is not None else len(prompt)
    sides = (text_of(side[at:], field, blank=False) for side, field in ((chosen, "chosen"), (rejected, "rejected")))
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
    turns = (Message("assistant", string(row, field)),) if isinstance(value, str | None) else _listed(value, field)
    if prompt is None:
        head: tuple[Message, ...] = ()
    elif isinstance(prompt, str):
        head = (Message("user", text_of(prompt, "prompt", blank=False)),) if turns[0].role == "assistant" else ()
    else:
        head = _listed(prompt, "prompt")
    whole = _checked(turns if turns[: len(head)] == head else head + turns, field)
    if whole[-1].role != "assistant":
        raise BadRow(field, "does not end with an assistant turn", "add the answer")
    if whole[0].role == "assistant":
        raise BadRow("prompt", "is missing", "add what was asked, as 'prompt' or as the first turns of both answers")
    return Conversation(whole)


def _alpaca(row: Mapping[str, object]) -> Conversation:
    instruction, output = string(row, "instruction"), string(row, "output")
    more = string(row, "input", blank=True) if row.get("input") is not None else ""
    asked = f"{instruction}\n\n{more}" if more.strip() else instruction
    return Conversation(_opened(row, (*_history(row), Message("user", asked), Message("assistant", output))))


def _opened(row: Mapping[str, object], turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """Turns behind the system turn that a row may have apart from them, as LLaMA-Factory and Axolotl write it."""
    if row.get("system") is None or turns[0].role == "system":
        return turns
    system = string(row, "system", blank=True)
    return (Message("system", system), *turns) if system.strip() else turns


def _history(row: Mapping[str, object]) -> tuple[Message, ...]:
    """What was said before an instruction: LLaMA-Factory's list of questions with their answers."""
    pairs = row.get("history") or ()
    if not isinstance(pairs, list | tuple) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs
    ):
        raise BadRow("history", f"is {shown(pairs)}, not questions with answers", "give [[question, answer], ...]")
    roles: tuple[Role, ...] = ("user", "assistant")
    return tuple(
        Message(role, text_of(text, f"history[{index}]", blank=role == "user"))
        for index, pair in enumerate(pairs)
        for role, text in zip(roles, pair, strict=True)
    )


def _unknown(row: Mapping[str, object]) -> BadRow:
    for key in first_keys(row):
        near = difflib.get_close_matches(key, KNOWN, n=1, cutoff=0.75)
        if near:
            return BadRow(key, "is not a known field", f"did you mean {near[0]!r}?")
    given = ", ".join(map(repr, first_keys(row)[:6])) or "nothing"
    return BadRow(
        "row",
        f"has {given}",
        "give messages, prompt and completion, chosen and rejected, text, instruction or conversations",
    )
