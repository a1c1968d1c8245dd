"""What happened in a storm, from the registry's own rows: whose cohort ran when on which worker; and its picture."""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, select

from registry.models import Job, Run
from tests.conftest import looking

Facts = Mapping[str, Any]  # JSON
Span = tuple[str, float | None, float | None]  # what, from when to when, in seconds of the storm
_PAGE = 200  # as many as Prefect's server gives at once
COLOURS = {"prepare": "#8da0cb", "train": "#66c2a5", "judge": "#a6d854", "publish": "#fc8d62", "": "#bbbbbb"}
_KILLED = "#d62728"


def runs(engine: Engine, began: float, phases: Mapping[str, list[Span]]) -> list[dict[str, Any]]:
    """Every cohort's run: worker, start and end in seconds of the storm (end None: its worker died), and phases."""
    with looking(engine) as session:
        found = session.scalars(select(Run).order_by(Run.started_at)).all()
        return [
            {
                "worker": run.worker, "start": _since(began, run.started_at), "end": _since(began, run.finished_at),
                "phases": phases.get(str(run.id)[:8], []),
            }
            for run in found
        ]  # fmt: skip


def phases(began: float) -> Mapping[str, list[Span]]:
    """What Prefect recorded of every cohort's steps, by the beginning of the run's id, with which its name ends."""
    from prefect.client.orchestration import get_client  # imported late: it reads the environment

    found: dict[str, list[Span]] = defaultdict(list)
    with get_client(sync_client=True) as client:
        names = {run.id: run.name.rpartition("-")[2] for run in _all(client.read_flow_runs) if "-users-" in run.name}
        for step in _all(client.read_task_runs):
            if step.flow_run_id in names and step.start_time:
                span = (step.name.rpartition("-")[0], _since(began, step.start_time), _since(began, step.end_time))
                found[names[step.flow_run_id]].append(span)
    return found


def _all(read: Callable[..., Sequence[Any]]) -> Iterator[Any]:  # Prefect's runs
    """Every page of an answer."""
    for start in itertools.count(0, _PAGE):
        page = read(limit=_PAGE, offset=start)
        yield from page
        if len(page) < _PAGE:
            return


def finished(engine: Engine, began: float) -> list[tuple[str, float]]:
    """Every job's worker and the moment it was over, in seconds of the storm."""
    with looking(engine) as session:
        rows = session.execute(select(Job.worker, Job.finished_at).where(Job.finished_at.is_not(None))).tuples()
        return sorted(((str(worker), float(_since(began, at) or 0)) for worker, at in rows), key=lambda one: one[1])


def draw(told: Facts, path: Path) -> Path:
    """Workers as lanes of cohorts, servers as lanes of absences, and below them who waits, works and is done."""
    from matplotlib.figure import Figure  # imported late: a second to load
    from matplotlib.patches import Patch

    figure = Figure(figsize=(13, 7.5), layout="constrained")
    lanes, crowd = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    names = told["services"]
    _draw_runs(lanes, names, told)
    _draw_kills(lanes, names, told["kills"])
    lanes.set_yticks(range(len(names)), names)
    lanes.set(title=told["title"], ylim=(len(names) - 0.5, -0.5), xlim=(0, told["wall_seconds"]))
    shown = {phase for run in told["runs"] for phase, *_ in run["phases"]}
    lanes.legend(handles=[Patch(color=colour, label=name) for name, colour in COLOURS.items() if name in shown])
    _draw_crowd(crowd, told["samples"], told["finished"])
    figure.savefig(path, dpi=110)
    return path


def _draw_runs(axes: Any, names: Sequence[str], told: Facts) -> None:  # matplotlib's
    for run in told["runs"]:
        if run["worker"] not in names:
            continue
        lane, spans = names.index(run["worker"]), run["phases"] or [["", run["start"], run["end"]]]
        for phase, start, end in spans:
            width = (_end_of(run, told["kills"], told["wall_seconds"]) if end is None else end) - start
            axes.broken_barh([(start, width)], (lane - 0.35, 0.7), facecolors=COLOURS.get(phase, COLOURS[""]))


def _end_of(run: Facts, kills: Sequence[Facts], wall: float) -> float:
    """When the worker of a run that never closed was killed; the storm's end where it was not."""
    after = [kill["at"] for kill in kills if kill["service"] == run["worker"] and kill["at"] >= run["start"]]
    return float(min(after, default=wall))


def _draw_kills(axes: Any, names: Sequence[str], kills: Sequence[Facts]) -> None:  # matplotlib's
    for kill in kills:
        lane = names.index(kill["service"])
        axes.broken_barh([(kill["at"], kill["away"])], (lane - 0.12, 0.24), facecolors=_KILLED, alpha=0.45)
        axes.plot(kill["at"], lane, marker="x", color=_KILLED, markersize=6)


def _draw_crowd(axes: Any, samples: Sequence[Facts], finished_: Sequence[tuple[str, float]]) -> None:  # matplotlib's
    at = [sample["at"] for sample in samples]
    for name in ("due", "queued", "running"):
        axes.plot(at, [sample[name] for sample in samples], label=name)
    axes.plot([moment for _, moment in finished_], range(1, len(finished_) + 1), label="done", color="black")
    axes.set(xlabel="seconds of the storm", ylabel="users")
    axes.legend(loc="center right")
    axes.grid(alpha=0.3)


def _since(began: float, moment: datetime | None) -> float | None:
    return None if moment is None else round(moment.timestamp() - began, 2)
