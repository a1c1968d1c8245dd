"""One real cohort, seen from every side: the registry, logs, metrics, health, and the one screen."""

import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import yaml
from prometheus_client import generate_latest
from sqlalchemy import delete, insert, select
from sqlalchemy.orm import Session

from flows.cli.screen import lines
from flows.clock import Ticks
from flows.endpoint import Endpoint, moving, reachable, served
from flows.factory import Factory, add_data, now, pin_base, request_training
from flows.metrics import FactoryMetrics
from flows.presence import at_work
from flows.pulse import Look, Pulse, tell_all
from flows.reasons import ALL_KINDS, OTHER, grouped, kind_of
from flows.seen import look
from flows.settings import FactorySettings
from flows.work import run_cohort
from flows.worker_metrics import ASKED_FOR, WorkerMetrics
from lora_core.recipe import load_recipe
from lora_core.train import Pace
from registry import queries
from registry.models import Adapter, AdapterVersion, Job, Run, Tenant, User, Worker
from registry.names import Reference
from registry.overview import Failure
from registry.session import reading, transaction
from tests.conftest import looking
from tests.flows.conftest import QUICK, ROOT, LoraHere, samples, write_user

NAME = re.compile(r"\blora_[a-z_]+\b")
USERS = {"acme/alice": 60, "acme/bob": 60, "globex/tiny": 1}  # examples; one is too few to learn from


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the factory of this file keeps everything."""
    return tmp_path_factory.mktemp("seeing")


@pytest.fixture(scope="module")
def seen_metrics(home: Path, base_folder: Path) -> tuple[Factory, FactoryMetrics, list[Look]]:
    """A factory whose one cohort has run, the metrics that watched it, and the looks that it had."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("LORA_HOME", str(home))
        factory = Factory(FactorySettings(home=home, base=str(base_folder), slots=4, worker="gpu-1"))
    factory.set_up()
    metrics, looks = FactoryMetrics(factory.engine, now), list[Look]()
    metrics.refresh()
    recipe, pinned = load_recipe(None, [*QUICK, "epochs=2"]), pin_base(factory)
    for user, count in USERS.items():
        add_data(factory, Reference.parse(user), [str(write_user(home / "data.jsonl", "hello fox", count))])
        with transaction(factory.engine) as session:
            request_training(session, Reference.parse(user), pinned, recipe)
    with at_work(factory):
        assert run_cohort(factory, watch=lambda _: looks.append(factory.pulse.look))
    return factory, metrics, looks


Seeing = tuple[Factory, FactoryMetrics, list[Look]]


def test_a_versions_cost_is_its_share_of_the_cohorts_device_time(seen_metrics: Seeing) -> None:
    """Whoever dropped out before training pays nothing; the others pay for everything, by tokens."""
    factory, *_ = seen_metrics
    with looking(factory.engine) as session:
        versions, run = session.scalars(select(AdapterVersion)).all(), session.scalars(select(Run)).one()

    shares = [version.device_seconds or 0 for version in versions]
    assert len(versions) == 2
    assert sum(shares) == pytest.approx(run.facts["device_seconds"], rel=1e-9)
    assert min(shares) > 0
    assert all(version.tokens and version.tokens > 1000 for version in versions)


def test_a_look_says_how_far_a_cohort_is(seen_metrics: Seeing) -> None:
    """Never backwards, though curricula may end early."""
    *_, looks = seen_metrics

    shares = [one.share for one in looks]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(0.85, abs=0.05)  # judging and publishing are ahead
    assert {one.users for one in looks} == {3}
    assert max(one.training for one in looks) == 2
    assert looks[-1].finished == 2
    assert looks[-1].tokens_per_second > 0


def test_the_exporter_counts_what_happened_while_it_watched(seen_metrics: Seeing) -> None:
    """Claims, versions, failures by kind, waits: as Prometheus reads them."""
    _, metrics, _ = seen_metrics
    metrics.refresh()
    metrics.refresh()  # counts nothing twice
    found = samples(generate_latest(metrics.registry).decode())

    assert found["lora_versions_published_total", ("accepted", "acme")] == 2
    assert found["lora_jobs_failed_total", ("data", "globex")] == 1
    assert found["lora_jobs_claimed_total", ("globex",)] == 1
    assert found["lora_queue_wait_seconds_count", ()] == 3
    assert found["lora_time_to_publish_seconds_count", ()] == 2
    assert found["lora_tokens_total", ("acme",)] > 1000
    assert found["lora_versions_published_total", ("accepted", "globex")] == 0  # known before its first
    assert found["lora_registry_up", ()] == 1


def test_a_first_failure_is_a_counter_that_grows(seen_metrics: Seeing) -> None:
    """What begins at 1, or at the 64 of a cohort, has not grown as Prometheus sees it, and rings no alarm."""
    factory, metrics, _ = seen_metrics
    metrics.refresh()
    failed = {
        labels
        for name, labels in samples(generate_latest(metrics.registry).decode())
        if name == "lora_jobs_failed_total"
    }
    told = samples(generate_latest(WorkerMetrics(factory.pulse, 4).registry).decode())
    asked = re.findall(r'event=~?\\?"([^"\\]*)', (ROOT / "infra/grafana/lora-factory.json").read_text())
    asked += re.findall(r'event="([^"]*)"', (ROOT / "infra/prometheus/alerts.yaml").read_text())

    assert failed == {(kind, tenant) for kind in ALL_KINDS for tenant in ("acme", "globex")}
    assert {one for some in asked for one in some.split("|")} == set(ASKED_FOR)
    assert {("lora_worker_events_total", (one,)) for one in ASKED_FOR} <= set(told)


def test_a_worker_that_ends_in_order_is_not_listed(seen_metrics: Seeing) -> None:
    """And what it did is in its own metrics."""
    factory, *_ = seen_metrics
    with looking(factory.engine) as session:
        assert session.scalars(select(Worker)).all() == []

    found = samples(generate_latest(WorkerMetrics(factory.pulse, 4).registry).decode())
    assert found["lora_worker_tokens_total", ()] <= found["lora_worker_room_tokens_total", ()]
    assert found["lora_worker_events_total", ("version published",)] >= 2
    assert found["lora_worker_phase", ("idle",)] == 1


def test_every_metric_of_the_dashboard_and_the_alarms_is_exported(seen_metrics: Seeing) -> None:
    """A renamed metric would leave an empty panel, and an alarm that never rings."""
    factory, metrics, _ = seen_metrics
    metrics.refresh()
    exported = {name for name, _ in samples(generate_latest(metrics.registry).decode())}
    exported |= {name for name, _ in samples(generate_latest(WorkerMetrics(factory.pulse, 4).registry).decode())}
    exported |= {name for name, _ in samples(generate_latest(Ticks().registry).decode())}
    exported |= {"lora_queue_jobs", "lora_queue_oldest_seconds", "lora_queue_put_off_jobs", "lora_jobs_running"}
    dashboard = json.loads((ROOT / "infra" / "grafana" / "lora-factory.json").read_text())
    rules = yaml.safe_load((ROOT / "infra" / "prometheus" / "alerts.yaml").read_text())["groups"][0]["rules"]
    shown = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    variables = [one.get("definition", "") for one in dashboard["templating"]["list"]]

    wanted = {name for text in [*shown, *variables, *(rule["expr"] for rule in rules)] for name in NAME.findall(text)}

    assert len(shown) > 20
    assert len(rules) > 5
    assert wanted - exported == set()
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"] if "datasource" in panel} == {"${datasource}"}
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_the_screen_answers_for_a_handful(seen_metrics: Seeing) -> None:
    """Who failed, why, and what to do, is on it."""
    factory, *_ = seen_metrics
    with reading(factory.engine) as session:
        shown = lines(look(session, now(), now() - timedelta(hours=1), price=3.6))

    text = "\n".join(shown)
    assert "1 failed, 2 published" in text
    assert "1 examples to learn from and 0 to judge by" in text
    assert "do: add examples; such as globex/tiny" in text
    assert re.search(r"2 published, 0 refused by the gate; \d\.\d\d device hours, which cost \d", text)


def test_the_screen_is_one_screen_whatever_the_number_of_users(seen_metrics: Seeing) -> None:
    """10,000 jobs of 300 tenants on 40 workers in 40 lines of 100 letters; numbers in reasons do not split a group."""
    factory, *_ = seen_metrics
    moment = now()
    with transaction(factory.engine) as session:
        crowd(session, moment)
    try:
        with reading(factory.engine) as session:
            seen = look(session, moment, moment - timedelta(hours=1))
        shown = lines(seen, 100)
    finally:
        with transaction(factory.engine) as session:
            disperse(session)

    text = "\n".join(shown)
    assert len(shown) <= 40
    assert max(map(len, shown)) <= 100
    assert "waiting  6,000, the oldest for 3 h" in text
    assert re.search(r"workers  39, \d+ of 624 slots used", text)
    assert re.search(r"gpu-39 +silent +its lease ends in 4 min +6 of crowd\d+, 6 of crowd\d+, \+5$", text, re.MULTILINE)
    assert "and 294 tenants more" in text
    assert re.search(r"2,100x \d+ examples to learn from", text)


def crowd(session: Session, moment: datetime) -> None:
    """Jobs, users and workers by the thousand, beside what is there."""
    model = session.scalars(select(Job).limit(1)).one()
    same = {key: getattr(model, key) for key in ("dataset_id", "base_id", "recipe", "recipe_digest", "cohort_group")}
    for number in range(300):
        holder = queries.ensure_adapter(session, Reference.parse(f"crowd{number}/alice"), moment)
        states = ["queued"] * 20 + ["running"] * 6 + ["failed"] * 7
        rows = []
        for one, state in enumerate(states):
            rows.append({
                **same, "tenant_id": holder.tenant_id, "adapter_id": holder.adapter.id, "fingerprint": f"{one:064}",
                "state": state, "worker": f"gpu-{number % 40}" if state == "running" else None,
                "lease_until": moment + timedelta(minutes=4) if state == "running" else None,
                "error": f"crowd{number}/alice: {one + number} examples to learn from; add some" if state == "failed"
                else None,
                "created_at": moment - timedelta(hours=3, seconds=-number),
                "finished_at": moment - timedelta(minutes=one) if state == "failed" else None,
            })  # fmt: skip
        session.execute(insert(Job), rows)
    facts = Look("train", 16, 12, 4, 0, 100, 200, 5, 321.5, 0.4, 100.0).facts()
    for number in range(39):
        session.add(
            Worker(name=f"gpu-{number}", device="cuda", slots=16, started_at=moment, seen_at=moment, facts=facts)
        )


def disperse(session: Session) -> None:
    """Everybody of the crowd goes again."""
    crowds = select(Tenant.id).where(Tenant.name.like("crowd%"))
    for table in (Job, Adapter, User):
        session.execute(delete(table).where(table.tenant_id.in_(crowds)))
    session.execute(delete(Tenant).where(Tenant.name.like("crowd%")))
    session.execute(delete(Worker))


def test_status_starts_neither_torch_nor_prefect() -> None:
    """They cost seconds, and an operator's machine may have neither; the same of the exporter."""
    code = (
        "import sys, flows.cli, flows.metrics, flows.endpoint, flows.seen; print({'torch','prefect'} & {*sys.modules})"
    )

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)

    assert done.stdout == "set()\n", done.stderr


def test_metrics_and_health_are_answered_over_http(seen_metrics: Seeing, monkeypatch: pytest.MonkeyPatch) -> None:
    """Live while something moves, ready while database and store answer; else 503, and why."""
    factory, *_ = seen_metrics
    wrong: dict[str, str] = {}
    metrics = WorkerMetrics(factory.pulse, 4)
    factory.pulse.rest()
    monkeypatch.setattr("flows.endpoint.READY_SECONDS", 0.0)
    endpoint = Endpoint(metrics.registry, moving(factory), lambda: dict(wrong))
    with served(endpoint, 0, "127.0.0.1") as port:
        assert "lora_worker_slots 4.0" in ask(port, "/metrics")[1]
        assert ask(port, "/healthz") == (200, '{"status": "ok"}\n')
        assert ask(port, "/readyz")[0] == 200
        assert ask(port, "/nothing")[0] == 404
        monkeypatch.setattr(factory.pulse, "moved_at", factory.pulse.moved_at - 10_000)
        assert ask(port, "/healthz")[0] == 503
        wrong["store"] = "no such bucket"
        assert ask(port, "/readyz") == (503, '{"store": "no such bucket"}\n')


def ask(port: int, path: str) -> tuple[int, str]:
    """Status and body."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_ready_means_that_database_and_store_answer(seen_metrics: Seeing, tmp_path: Path) -> None:
    """Each is named when it does not."""
    factory, *_ = seen_metrics
    assert reachable(factory)() == {}

    away = {"database_url": f"sqlite:///{tmp_path}/none/x.db", "store_url": f"file://{tmp_path}/none"}
    assert set(reachable(Factory(FactorySettings(**away)))()) == {"registry", "store"}  # type: ignore[arg-type]  # texts


def test_a_pulse_that_begins_again_with_a_smaller_plan_counts_on() -> None:
    """Where memory ran out micro-steps begin at one again; totals never fall."""
    clock = [0.0]
    pulse = Pulse(lambda: clock[0])
    pulse.join(2)
    pulse.enter("train")
    for clock[0], steps, tokens in ((1.0, 1, 100), (2.0, 2, 200), (3.0, 1, 40), (4.0, 2, 80)):
        pulse.keep(Pace(steps, ("a",), 0, 0, tokens, 2 * tokens, steps, 10 - steps, {"a": 100}))

    assert (pulse.tokens_total, pulse.room_total, pulse.micro_steps_total) == (280, 560, 4)
    assert pulse.look.tokens_per_second == pytest.approx(60)
    assert pulse.look.seconds_left == pytest.approx(4 * 8 / 2)


def test_a_listener_that_fails_stops_neither_the_work_nor_the_others() -> None:
    """Whoever looks is never a reason to lose a training."""
    heard: list[Look] = []

    def failing(_: Look) -> None:
        raise RuntimeError("Prefect is away")

    tell_all([failing, heard.append], Look("train"))

    assert heard == [Look("train")]


WHY = {
    "data": "acme/u: 3 examples to learn from and 0 to judge by; add examples",
    "numbers": "loss is not finite after step 7; lower learning_rate or look for odd rows in the data",
    "attempts": "given up after 3 attempts: its worker died; mend it, then train again",
    "memory": "4 slots need 812.5 MiB and 500.0 are there; fewer slots",
    "base": "base ./tiny: its files have changed since the job was made; train again",
    "store": "no object t/x in s3://b; was it swept, or is LORA_STORE_URL another store?",
    OTHER: "something nobody thought of",
}


@pytest.mark.parametrize("kind", WHY)
def test_a_failure_has_one_of_a_few_kinds(kind: str) -> None:
    """They are labels of a metric."""
    assert kind_of(WHY[kind]) == kind
    assert kind in ALL_KINDS


def test_failures_that_differ_in_numbers_and_names_alone_are_one_reason() -> None:
    """The latest is the example; the most frequent comes first."""
    given = [Failure("acme", f"u{n}", "default", f"acme/u{n}: {n} rows, first 'x{n}'; add", now()) for n in range(3)]
    given.insert(1, Failure("acme", "v", "notes", "acme/v/notes: odd; look", now()))

    first, second = grouped(given)

    assert (first.count, first.example.user, first.what_to_do) == (3, "u0", "add")
    assert (second.count, second.why, second.what_to_do) == (1, "odd", "look")


UGLY = {
    "status --since yesterday": "is no time",
    "status --since 99999999d": "is no time",
    "cost --since 999999d": "is no time",
    "status --since 0001-01-01T00:00:00+05:00": "is no time",
    "status --since 9999-12-31T23:59:59-10:00": "is no time",
    "status --watch --every 1e300": "Invalid value",
    "status --watch --json": "one screen only",
    "status nobody": "there is no tenant",
    "cost nobody": "there is no tenant",
    "status --jobs -1": "Invalid value",
    "metrics --port 70000": "Invalid value",
    "status a/b": "not a valid tenant",
    "metrics --host 256.0.0.1": "cannot be listened on",
}


@pytest.mark.parametrize("words", UGLY)
def test_bad_input_is_told_in_words(lora_here: LoraHere, words: str) -> None:
    """No traceback, an exit code, and what was wrong."""
    lora_here("setup")

    said = lora_here(*words.split())

    assert said.code in (1, 2, 3)
    assert UGLY[words] in " ".join(said.err.replace("│", " ").split())


def test_a_price_that_is_none_is_refused(lora_here: LoraHere) -> None:
    """As every setting."""
    for value in ("-1", "free", "nan", "inf"):
        said = lora_here("cost", LORA_GPU_HOUR_COST=value)
        assert (said.code, "LORA_GPU_HOUR_COST" in said.err) == (1, True)
