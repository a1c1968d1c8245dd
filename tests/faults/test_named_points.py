"""What a reader sees when a worker dies at the points that `docs/guarantees.md` names; what a stopped one may do."""

import hashlib
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import select

from registry import queries
from registry.errors import LeaseLost
from registry.models import AdapterVersion
from registry.names import Reference
from registry.session import reading
from registry.uploads import UPLOAD_LEASE
from tests.conftest import looking
from tests.faults.points import Fault
from tests.faults.trials import Site, count_points, finish, wait_until_stopped
from tests.faults.worker import finished

ALICE = Reference.parse("acme/alice")
OLD, NEW = 1, 2

# Where it is killed (which time it comes there), and the versions at `latest` and `production` then.
TABLE = [
    ("ingest: after COMMIT", 1, OLD, OLD),
    ("ingest: after put examples.jsonl", 1, OLD, OLD),
    ("ingest: after COMMIT", 2, OLD, OLD),
    ("ask: after COMMIT", 1, OLD, OLD),
    ("claim: after COMMIT", 1, OLD, OLD),
    ("publish: after COMMIT", 1, OLD, OLD),
    ("publish: before put weights.bin", 1, OLD, OLD),
    ("publish: after put weights.bin", 1, OLD, OLD),
    ("publish: after put manifest.json", 1, OLD, OLD),
    ("publish: after UPDATE jobs", 1, OLD, OLD),
    ("publish: after INSERT adapter_versions", 1, OLD, OLD),
    ("publish: after SELECT aliases", 1, OLD, OLD),
    ("publish: before COMMIT", 2, OLD, OLD),
    ("publish: after COMMIT", 2, NEW, OLD),
    ("promote: before COMMIT", 1, NEW, OLD),
    ("promote: after COMMIT", 1, NEW, NEW),
    ("sweep: before clear", 1, NEW, NEW),
    ("sweep: after clear", 1, NEW, NEW),
]


@pytest.fixture
def site(database_url: str, tmp_path: Path) -> Site:
    """A registry of each kind in turn and a folder, where alice has version 1 at `latest` and `production`."""
    made = Site(database_url, str(tmp_path / "store"), tmp_path)
    count_points(made, ALICE.label)
    return made


def seen(site: Site) -> dict[str, int]:
    """What each alias points to."""
    with reading(site.engine) as session:
        tenant = queries.tenant_id(session, ALICE.tenant)
        return queries.aliases(session, tenant, queries.holder(session, tenant, ALICE.user, ALICE.adapter).adapter.id)


def test_a_reader_sees_the_old_or_the_new_and_nothing_between(site: Site) -> None:
    """Before the one COMMIT that makes the version exist everything is as it was; after it, all of it is there."""
    found = []
    for where, time, _, _ in TABLE:
        before = seen(site)["latest"]
        errand = site.errand(ALICE.label)
        code, told = site.go(replace(errand, fault=Fault(time, "kill", where)))
        assert (code, told.get("fault")) == (-signal.SIGKILL, where), told
        at = seen(site)
        found.append((where, time, at["latest"] - before + OLD, at["production"] - before + OLD))
        code, told = site.go(replace(errand, moment=errand.moment + 2 * UPLOAD_LEASE))
        assert (code, told.get("error"), told["published"]) == (0, None, before + 1), told
        finish(site, errand, told)

    assert found == TABLE


@pytest.mark.parametrize("where", ["publish: before put weights.bin", "publish: after put manifest.json"])
def test_a_worker_stopped_past_its_lease_publishes_nothing_once_another_has(site: Site, where: str) -> None:
    """SIGSTOP, as a suspended laptop or a paused container: on waking it is told that its result does not count."""
    errand = site.errand(ALICE.label)
    child = site.start(replace(errand, fault=Fault(1, "stop", where)))
    child.listen(until="fault")
    wait_until_stopped(child.process.pid)
    code, rival = site.go(replace(errand, moment=errand.moment + 2 * UPLOAD_LEASE, content="the rival's"))
    os.kill(child.process.pid or 0, signal.SIGCONT)

    assert (code, child.end()) == (0, 0)

    assert isinstance(child.told["error"], LeaseLost)
    assert "published" not in child.told
    with looking(site.engine) as session:
        newest = session.scalars(select(AdapterVersion).order_by(AdapterVersion.number.desc())).first()
    assert newest
    digest = hashlib.sha256(finished("the rival's").files["manifest.json"]).hexdigest()
    assert (newest.number, newest.sha256) == (rival["published"], digest)
    finish(site, errand, child.told)
