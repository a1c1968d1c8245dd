"""Events as lines: whose they are, and what they must never say."""

import json
import logging
import sys
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Literal

import pytest

from flows.logs import LOG, TALLY, blot, event, set_up_logs
from flows.settings import FactorySettings
from registry.jobs import ClaimedJob
from registry.names import AdapterId, DatasetId, JobId, Reference, TenantId

OPAQUE = "0123456789abcdef0123456789abcdef"
SECRETS = {
    "presigned": "GET https://s3/b/k?X-Amz-Credential=AKIA/x&X-Amz-Signature=5ec2e7f00d&X-Amz-Date=1 failed",
    "presigned, the old way": "https://s3/b/k?AWSAccessKeyId=5ec2e7f00d&Expires=1&Signature=5ec2e7f00d%3D",
    "database": "cannot reach postgresql+psycopg://lora_app:5ec2e7f00d@db:5432/lora",
    "header": "sent {'Authorization': 'Bearer 5ec2e7f00d'}",
}


@pytest.fixture(autouse=True)
def _no_logs_afterwards() -> Iterator[None]:
    """Other tests begin without logs."""
    kept = LOG.handlers, LOG.level, LOG.propagate
    yield
    LOG.handlers, LOG.level, LOG.propagate = kept


def job() -> ClaimedJob:
    """Alice's, in somebody's hands."""
    now, id_ = datetime.now(UTC), uuid.uuid4()
    return ClaimedJob(
        JobId(id_), 3, 1, now, TenantId(id_), AdapterId(id_), DatasetId(id_), id_, Reference.parse("acme/alice"),
        OPAQUE, "key", "d" * 64, "tiny", "main", "", "b" * 64, {}, "r" * 64, "g",
    )  # fmt: skip


def test_an_event_says_whose_it_is_without_the_users_name(capsys: pytest.CaptureFixture[str]) -> None:
    """One JSON line, also where the reason spells the user; a person who is forgotten leaves no name in any log."""
    set_up_logs(FactorySettings(worker="w1"))
    alices, before = job(), TALLY["job failed"]

    event("job failed", alices, logging.WARNING, run=alices.base_id, reason="acme/alice: 3 examples\nare too few; add")

    said = capsys.readouterr().err
    line: dict[str, Any] = json.loads(said)  # as written: strings and numbers
    assert {key: line[key] for key in ("event", "level", "worker", "tenant", "user", "adapter", "attempt")} == {
        "event": "job failed", "level": "warning", "worker": "w1", "tenant": "acme", "user": OPAQUE,
        "adapter": "default", "attempt": 1,
    }  # fmt: skip
    assert (line["job"], line["run"]) == (str(alices.id), str(alices.base_id))
    assert (said.count("\n"), "alice" in said) == (1, False)
    assert f"acme/{OPAQUE}" in line["reason"]
    assert TALLY["job failed"] == before + 1


def test_a_name_without_its_tenant_goes_too_and_longer_ones_stay(capsys: pytest.CaptureFixture[str]) -> None:
    """Some reasons name the user alone; who is named alike is somebody else."""
    set_up_logs(FactorySettings())

    event(
        "job failed", job(), reason="no dataset of alice; adapter alice/notes. See alice. But alice-b, malice, alice.c"
    )

    reason = json.loads(capsys.readouterr().err)["reason"]
    assert reason == f"no dataset of {OPAQUE}; adapter {OPAQUE}/notes. See {OPAQUE}. But alice-b, malice, alice.c"


@pytest.mark.parametrize("text", SECRETS.values(), ids=SECRETS)
@pytest.mark.parametrize("kind", ["json", "text"])
def test_secrets_that_a_library_says_are_blotted_out(
    capsys: pytest.CaptureFixture[str], text: str, kind: Literal["json", "text"]
) -> None:
    """In fields and in tracebacks; the line stays one that machines read."""
    set_up_logs(FactorySettings(log=kind))
    try:
        raise RuntimeError(text)
    except RuntimeError:
        LOG.error("broke", exc_info=True, extra={"fields": {"reason": text}})

    said = capsys.readouterr().err
    assert "broke" in said
    assert "5ec2e7f00d" not in said
    if kind == "json":
        assert json.loads(said)["level"] == "error"


def test_what_is_no_secret_stays() -> None:
    """Ports, times and paths look a little like it."""
    plain = "s3://bucket/t/acme at http://minio:9000, 12:30:00, user@example"

    assert blot(plain) == plain


def test_on_a_terminal_only_warnings_are_told_unless_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There a bar and a table show the rest."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    set_up_logs(FactorySettings())
    event("job claimed")
    event("not published", level=logging.ERROR, reason="full")
    assert capsys.readouterr().err == 'not published  reason="full"\n'

    set_up_logs(FactorySettings(log="text"))
    event("job claimed")
    assert "job claimed" in capsys.readouterr().err
