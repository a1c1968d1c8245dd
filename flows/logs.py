"""Logs as events with fields: one line each, JSON for machines or words for people, to standard error.

A user is named by its opaque id alone, so that logs need no change when a person is forgotten.  What a training row
says is never logged; secrets and signatures in what libraries say are blotted out.

LORA_LOG.  `json`: JSON lines.  `text`: the same in words.  Empty: JSON lines where standard error is no terminal; on a
terminal warnings alone, in words, since commands show their own progress there.
"""

import json
import logging
import re
import sys
import threading
from collections import Counter
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flows.settings import FactorySettings
    from registry.jobs import ClaimedJob
    from registry.names import Reference

LOG = logging.getLogger("lora")
LOG.addHandler(logging.NullHandler())  # where nobody asked for logs there are none
TALLY: Counter[str] = Counter()  # events of this process so far, logged or not
_COUNTING = threading.Lock()  # publishers, entrance and trainer all have something to tell
# Signatures and keys of presigned URLs, passwords in URLs, and credentials in headers.
_SECRETS = (
    re.compile(r"(?i)([?&](?:x-amz-[a-z-]+|signature|awsaccesskeyid|token|password|expires)=)[^&\s\"'\\]+"),
    re.compile(r"(://[^/\s:@\"'\\]*:)[^@/\s\"'\\]+(?=@)"),
    re.compile(r"(?i)(authorization[\"'\\]*\s*[:=]\s*[\"'\\]*(?:bearer|basic|aws4-hmac-sha256)\s+)[^\s\"'\\]+"),
)


def event(
    what: str,
    job: "ClaimedJob | None" = None,
    level: int = logging.INFO,
    whose: "tuple[Reference, str] | None" = None,
    **fields: object,
) -> None:
    """Log what happened, to whose job, or to whose adapter and opaque id; reasons name the user by that id."""
    if job:
        whose, fields = (job.reference, job.opaque), {"job": job.id, "attempt": job.attempts} | fields
    if whose:
        reference, opaque = whose
        named = {name: _nameless(value, reference.user, opaque) for name, value in fields.items()}
        fields = {"tenant": reference.tenant, "user": opaque, "adapter": reference.adapter} | named
    with _COUNTING:
        TALLY[what] += 1
    LOG.log(level, what, extra={"fields": fields})


def set_up_logs(settings: "FactorySettings") -> None:
    """Send events to standard error, once a process, as LORA_LOG says."""
    terminal = sys.stderr.isatty()
    kind = settings.log or ("text" if terminal else "json")
    handler = _ToStandardError()
    handler.setFormatter(Lines(settings.worker) if kind == "json" else Words())
    LOG.handlers = [handler]
    LOG.setLevel(logging.WARNING if terminal and not settings.log else logging.INFO)
    LOG.propagate = False


class Lines(logging.Formatter):
    """One JSON object a line: time, level, event, worker, and the event's fields."""

    def __init__(self, worker: str) -> None:
        super().__init__()
        self.worker = worker

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        facts = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(), "event": record.getMessage(), "worker": self.worker, **_fields(record),
        }  # fmt: skip
        if record.exc_info:
            facts["error"] = self.formatException(record.exc_info)
        return blot(json.dumps(facts, default=str, ensure_ascii=False))


class Words(logging.Formatter):
    """The event and its fields on one line, for a person."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        fields = " ".join(f"{name}={json.dumps(value, default=str)}" for name, value in _fields(record).items())
        trace = f"\n{self.formatException(record.exc_info)}" if record.exc_info else ""
        return blot(f"{record.getMessage()}  {fields}".rstrip() + trace)


def blot(text: str) -> str:
    """The text without secrets that libraries may have put into it."""
    for pattern in _SECRETS:
        text = pattern.sub(r"\1...", text)
    return text


class _ToStandardError(logging.StreamHandler[Any]):  # whatever stands for standard error
    """The standard error of this moment: a progress bar puts its own there, above which lines appear."""

    @property
    def stream(self) -> Any:  # a text stream
        return sys.stderr

    @stream.setter
    def stream(self, _: Any) -> None:  # the constructor's
        pass


def _fields(record: logging.LogRecord) -> dict[str, object]:
    fields: dict[str, object] = getattr(record, "fields", {})
    return {name: value for name, value in fields.items() if value is not None}


def _nameless(value: object, user: str, opaque: str) -> object:
    """A text without the user's name, which stands there as a word: `acme/eve`, or `no dataset of eve`."""
    word = rf"(?<![\w.=-]){re.escape(user)}(?![\w=-]|\.\w)"
    return re.sub(word, opaque, value) if isinstance(value, str) else value
