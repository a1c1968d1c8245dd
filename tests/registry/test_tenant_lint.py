"""The lint sees every tenant filter that is taken away."""

import ast

import pytest

from infra.tenant_lint import complaints, main, owned_tables
from tests.registry.mutants import Mutant, mutants

OWNED = owned_tables()


def test_the_code_passes() -> None:
    """As `make check` runs it."""
    assert main() == 0
    assert {"Tenant", "User", "AdapterVersion", "Upload"} <= OWNED
    assert not OWNED & {"SharedBase", "Run"}


@pytest.mark.parametrize("mutant", mutants(), ids=str)
def test_a_removed_filter_is_told_by_line(mutant: Mutant) -> None:
    """Wherever it stood; unless the same statement is filtered once more, in front of it."""
    path = f"registry/{mutant.module}.py"

    found = complaints(path, ast.unparse(mutant.tree), OWNED)

    assert found or str(mutant) in JOINED


# Filters of joined tables, behind the one that the statement begins with.
JOINING = {("queries", "version"), ("queries", "listing"), ("fleet", "promote_all"), ("fleet", "_carry_out")}
JOINED = {
    str(mutant)
    for mutant in mutants()
    for table in ("User", "Adapter", "AdapterVersion", "current")
    if (mutant.module, mutant.function) in JOINING
    and mutant.text.startswith(f"{table}.")
    and (mutant.function, table) not in (("version", "AdapterVersion"), ("listing", "User"))
}

SLIPS = [
    "select(User)",
    "select(User).where(User.name == name)",
    "select(User).where(User.name == name, User.tenant_id == tenant)",
    "select(User.id, User.tenant_id).order_by(User.tenant_id)",
    "select(Run, Job).where(Job.id == name)",
    "update(Job).values(state='queued')",
    "delete(Upload).where(Upload.prefix == name)",
    "select(aliased(Job)).where(True)",
    "session.get(Schedule, name)",
    "session.get_one(AdapterVersion, name)",
    "session.execute(text('SELECT * FROM users'))",
    "select(User).where(User.tenant_id != tenant)",
    "select(User).where((User.tenant_id == tenant) | (User.name == name))",
]
FINE = [
    "select(User).where(User.tenant_id == tenant, User.name == name)",
    "select(Run).where(Run.id == name)",
    "update(Job).where(Job.tenant_id == tenant).values(state='queued')",
    "session.get(Run, name)",
    "select(Tenant.id).where(Tenant.name == name)",
]


@pytest.mark.parametrize("statement", SLIPS)
def test_a_statement_without_its_tenant_first_is_told(statement: str) -> None:
    """Also a filter that comes second, that is no filter, or that lies behind an `or`."""
    assert complaints("registry/x.py", f"def ask(session, tenant, name):\n    return {statement}", OWNED)


@pytest.mark.parametrize("statement", FINE)
def test_a_statement_that_begins_with_its_tenant_is_fine(statement: str) -> None:
    """And one on rows that are nobody's."""
    assert not complaints("registry/x.py", f"def ask(session, tenant, name):\n    return {statement}", OWNED)


def test_columns_and_sources_that_have_names_are_seen() -> None:
    """Named in the file, or chosen by a helper."""
    code = (
        "_COLUMNS = (User.id, User.name)\n"
        "def chosen(wanted):\n    return User if wanted else Job\n"
        "def ask(session, wanted, tenant):\n    source = chosen(wanted)\n    return {}\n"
    )
    for slip in ("select(*_COLUMNS).where(User.name == 'x')", "select(source.id).where(source.id == 1)"):
        assert complaints("registry/x.py", code.format(slip), OWNED)
    assert not complaints("registry/x.py", code.format("select(*_COLUMNS).where(source.tenant_id == tenant)"), OWNED)


def test_work_that_spans_tenants_says_so() -> None:
    """In a block that names it."""
    inside = (
        "def ask(session):\n    with across(session, Across.SWEEP):\n        return session.scalars(select(Upload))"
    )

    assert not complaints("registry/x.py", inside, OWNED)
    assert complaints("registry/x.py", inside.replace("across(session, Across.SWEEP)", "reading(session)"), OWNED)
