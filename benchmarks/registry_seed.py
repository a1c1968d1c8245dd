"""A registry of a million users, made in minutes: rows as the code writes them, in numbers that it would take weeks to.

Every user has `versions` versions of one adapter, trained in turn, a dataset every second version.  All are accepted,
`latest` is at the newest and `production` at the one before it.  Some users stand out, so that questions have answers:
one in 100 has data that `latest` was not trained on, one in 200 is still on the old base, one in 250 on an older
recipe, one in 1000 has a `canary`.  Left out are what no question here reads: scores but those of `latest`, moves and
events but the last one's.

Constraints and indexes are dropped, and made again once the rows are there; foreign keys are not checked again, since
every id is made from the user's number.
"""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import create_engine, make_url, text
from sqlalchemy.engine import Connection, Engine

from registry.schema import migrate
from registry.session import open_database
from tests.servers import APPLICATION, execute, running_postgres

_WHOLE = "seeded to its end"  # what a database says of itself then
ROLE = APPLICATION
MUCH_WAL = "8GB"  # of a PostgreSQL that a million users are put into
TENANT = "acme"
SEED = """
INSERT INTO tenants SELECT id('t', 0), 'acme', now();
INSERT INTO bases SELECT id('b', n), sha('b', n), (ARRAY['meta-llama/Llama-3.2-1B', 'Qwen/Qwen3-1.7B'])[n], 'main', '',
    1235814400, now() FROM generate_series(1, 2) n;
INSERT INTO users SELECT id('u', n), id('t', 0), 'user-' || n, md5('o' || n), now() FROM generate_series(1, :users) n;
INSERT INTO adapters SELECT id('a', n), id('t', 0), id('u', n), 'default', :versions, now()
  FROM generate_series(1, :users) n;
INSERT INTO datasets SELECT id('d' || d, n), id('t', 0), id('u', n), sha('d' || d, n),
    't/acme/u/' || md5('o' || n) || '/datasets/' || sha('d' || d, n) || '-1', 200, 48000, day(n, 2 * d)
  FROM generate_series(1, :users) n, generate_series(1, (:versions + 1) / 2) d;
INSERT INTO datasets SELECT id('new', n), id('t', 0), id('u', n), sha('new', n),
    't/acme/u/' || md5('o' || n) || '/datasets/' || sha('new', n) || '-1', 210, 50000, day(n, :versions + 1)
  FROM generate_series(100, :users, 100) n;
INSERT INTO jobs (id, tenant_id, adapter_id, dataset_id, base_id, recipe, recipe_digest, fingerprint, cohort_group,
    state, attempts, fence, worker, created_at, in_line_since, finished_at)
  SELECT id('j' || v, n), id('t', 0), id('a', n), id('d' || (v + 1) / 2, n), base(n), recipe(), recipe_of(n),
    sha('f' || v, n), 'g', 'published', 1, 1, 'gpu-' || n % 8, day(n, v), day(n, v), day(n, v)
  FROM generate_series(1, :users) n, generate_series(1, :versions) v;
INSERT INTO adapter_versions (id, tenant_id, adapter_id, number, state, reason, served_name, prefix, sha256, files,
    size, parameters, recipe, recipe_digest, code_version, loss, gain, base_id, dataset_id, job_id, created_at)
  SELECT id('v' || v, n), id('t', 0), id('a', n), v, 'accepted',
    'gain +0.4127 nats a token over the base, p = 3.1e-05, 20 held-out examples',
    'default-' || left(sha(v, n), 20),
    't/acme/u/' || md5('o' || n) || '/default/default-' || left(sha(v, n), 20), sha('m' || v, n), files(v, n),
    5734400, 1376256, recipe(), recipe_of(n), '0.1.0', 2.6 - gain(v, n), gain(v, n), base(n), id('d' || (v + 1) / 2, n),
    id('j' || v, n), day(n, v)
  FROM generate_series(1, :users) n, generate_series(1, :versions) v;
INSERT INTO aliases (adapter_id, name, tenant_id, version_id, base_id, created_at, gain, loss)
  SELECT id('a', n), name, id('t', 0), id('v' || v, n), base(n), day(n, v), gain(v, n), 2.6 - gain(v, n)
  FROM generate_series(1, :users) n,
    (VALUES ('latest', :versions), ('production', :versions - 1), ('canary', :versions)) pointed (name, v)
  WHERE name <> 'canary' OR n % 1000 = 0;
INSERT INTO freshness SELECT id('a', n), id('t', 0),
    CASE WHEN n % 100 = 0 THEN id('new', n) ELSE id('d' || (:versions + 1) / 2, n) END,
    id('d' || (:versions + 1) / 2, n), base(n), recipe_of(n)
  FROM generate_series(1, :users) n;
INSERT INTO evaluations SELECT id('e' || subject, n), id('t', 0), id('v' || :versions, n), subject,
    json_build_object('loss', 2.6 - CASE subject WHEN 'base' THEN 0 ELSE gain(:versions, n) END, 'accuracy', 0.61)
  FROM generate_series(1, :users) n, unnest(ARRAY['base', 'candidate']) subject;
INSERT INTO alias_moves (tenant_id, adapter_id, name, kind, from_id, to_id, actor, reason, at)
  SELECT id('t', 0), id('a', n), 'latest', 'moved', id('v' || :versions - 1, n), id('v' || :versions, n), 'gate',
    'better', day(n, :versions)
  FROM generate_series(1, :users) n;
INSERT INTO events (tenant_id, kind, subject, body, at, txid)
  SELECT id('t', 0), kind, id('v' || :versions, n)::text, json_build_object('number', :versions, 'alias', 'latest'),
    day(n, :versions), 3
  FROM generate_series(1, :users) n, unnest(ARRAY['version published', 'alias moved']) kind
"""
RECIPE = """{"method": "lora", "rank": 8, "alpha": 16, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"], \
"learning_rate": 0.0002, "epochs": 3, "batch_size": 4, "row_tokens": 512, "dropout": 0.05, \
"seed": 0, "schedule": "cosine", "clip": 1.0}"""
FUNCTIONS = {
    "id(kind text, n bigint) RETURNS uuid": "md5(kind || n::text)::uuid",
    "sha(kind text, n bigint) RETURNS text": "md5(kind || n::text) || md5(n::text || kind)",
    "sha(v bigint, n bigint) RETURNS text": "md5(v::text || '/' || n::text) || md5(n::text || '-' || v::text)",
    "base(n bigint) RETURNS uuid": "id('b', CASE WHEN n % 200 = 7 THEN 1 ELSE 2 END)",
    "recipe_of(n bigint) RETURNS text": "sha('r', CASE WHEN n % 250 = 9 THEN 1 ELSE 2 END)",
    "recipe() RETURNS json": f"'{RECIPE}'::json",
    "gain(v bigint, n bigint) RETURNS float8": "((hashint8(n * 31 + v) & 65535) / 65535.0) * 0.9 - 0.05",
    "day(n bigint, v bigint) RETURNS timestamptz": (
        "'2026-01-01Z'::timestamptz + v * interval '1 day' + (n % 86400) * interval '1 second'"
    ),
    "files(v bigint, n bigint) RETURNS json": (
        "json_build_object('README.md', json_build_object('sha256', sha('c' || v, n), 'size', 1841),"
        " 'adapter_config.json', json_build_object('sha256', sha('g' || v, n), 'size', 912),"
        " 'adapter_model.safetensors', json_build_object('sha256', sha('w' || v, n), 'size', 5730000),"
        " 'manifest.json', json_build_object('sha256', sha('m' || v, n), 'size', 2417))"
    ),
}
TABLES = (
    "users", "adapters", "datasets", "jobs", "adapter_versions", "aliases", "freshness", "evaluations", "alias_moves",
    "events",
)  # fmt: skip


def seed(url: str, users: int, versions: int = 10) -> Engine:
    """The tables with their rows in an empty database; returns the application's engine."""
    owner = open_database(url)
    with owner.begin() as connection:
        if connection.scalar(text("SELECT 1 FROM pg_roles WHERE rolname = :role"), {"role": ROLE}) is None:
            connection.execute(text(f"CREATE ROLE {ROLE} LOGIN"))
    migrate(owner, application=ROLE)
    with owner.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        connection.execute(text("SET synchronous_commit = off"))
        connection.execute(text("SET maintenance_work_mem = '1GB'"))
        connection.execute(text("SET search_path = pg_temp, public"))
        for signature, body in FUNCTIONS.items():
            made = f"CREATE FUNCTION pg_temp.{signature} LANGUAGE sql STABLE AS $$ SELECT {_local(body)} $$"
            connection.exec_driver_sql(made.replace("%", "%%"))
        with _bare(connection):
            for statement in _local(SEED).split(";\n"):
                given = {name: value for name, value in _numbers(users, versions).items() if f":{name}" in statement}
                connection.execute(text(statement), given)
        connection.execute(text("VACUUM ANALYZE"))
        connection.execute(text("CHECKPOINT"))
        connection.execute(text(f"COMMENT ON DATABASE \"{owner.url.database}\" IS '{_WHOLE}'"))
    owner.dispose()
    return application(url)


def application(url: str) -> Engine:
    """The engine of the role that owns nothing, on a database that is seeded already."""
    return open_database(create_engine(url).url.set(username=ROLE).render_as_string(hide_password=False))


@contextmanager
def database(url: str, folder: Path | None = None, max_wal_size: str = "1GB") -> Iterator[str]:
    """The URL of an empty database, and its PostgreSQL for as long as the block lasts, however it ends."""
    if url:
        yield url
        return
    with tempfile.TemporaryDirectory(dir=folder) as home:
        Path(home).chmod(0o755)  # PostgreSQL runs as a user of its own where we are root
        with running_postgres(Path(home) / "postgres") as made:
            execute(made, f"ALTER SYSTEM SET max_wal_size = '{max_wal_size}'")
            execute(made, "SELECT pg_reload_conf()")
            yield made


def new_database(server: str, name: str) -> tuple[str, bool]:
    """The URL of a database on a server, and whether it was there already: seeded by an earlier run.

    Raises SystemExit for one whose seeding was cut short.
    """
    admin = create_engine(server, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        said = "SELECT coalesce(shobj_description(oid, 'pg_database'), '') FROM pg_database WHERE datname = :name"
        words = connection.scalar(text(said), {"name": name})
        if words is None:
            connection.execute(text(f"CREATE DATABASE {name}"))
    admin.dispose()
    if words not in (None, _WHOLE):
        raise SystemExit(f"the database {name} is there and is not {_WHOLE}; drop it, and it is made anew")
    return make_url(server).set(database=name).render_as_string(hide_password=False), words is not None


@contextmanager
def _bare(connection: Connection) -> Iterator[None]:
    """In this block the tables have no keys and no indexes."""
    named = f"ARRAY[{', '.join(repr(name) for name in TABLES)}]::regclass[]"
    keys = connection.execute(
        text(
            "SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid), contype FROM pg_constraint"
            f" WHERE contype IN ('f', 'p', 'u') AND (conrelid = ANY({named}) OR confrelid = ANY({named}))"
            " ORDER BY contype = 'f', conname"
        )
    ).all()
    for table, name, _, _ in reversed(keys):
        connection.execute(text(f"ALTER TABLE {table} DROP CONSTRAINT {name}"))
    listed = (
        f"SELECT indexrelid::regclass::text, pg_get_indexdef(indexrelid) FROM pg_index WHERE indrelid = ANY({named})"
    )
    indexes = connection.execute(text(listed)).all()
    for name, _ in indexes:
        connection.execute(text(f"DROP INDEX {name}"))
    yield
    for _, definition in indexes:
        connection.execute(text(definition))
    for table, name, definition, kind in keys:
        loose = " NOT VALID" if kind == "f" else ""
        connection.execute(text(f"ALTER TABLE {table} ADD CONSTRAINT {name} {definition}{loose}"))


def _numbers(users: int, versions: int) -> dict[str, int]:
    return {"users": users, "versions": versions}


def _local(code: str) -> str:
    """The seed's functions are the connection's own: PostgreSQL looks for them there only when told."""
    names = "|".join({signature.partition("(")[0] for signature in FUNCTIONS})
    return re.sub(rf"(?<![\w.])({names})\(", r"pg_temp.\1(", code.removeprefix("\n"))
