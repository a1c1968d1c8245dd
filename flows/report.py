"""What people look at: a cohort as rows of a table, its curves, and whose adapter serves whose data, as pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flows.candidates import Candidate
from flows.cohort import Cohort
from flows.matrix import Matrix
from registry.publishing import Published

BARS = "▁▂▃▄▅▆▇█"

Row = dict[str, str]


def rows(cohort: Cohort) -> list[Row]:
    """One row a user: published, refused, failed, put off or put back, with what it scored."""
    table = [_row(candidate, cohort.versions.get(job.id)) for job, candidate in cohort.work.values()]
    failed = [{"user": label, "result": "failed", "why": reason} for label, reason in cohort.failed.items()]
    failed += [{"user": label, "result": "put off", "why": reason} for label, reason in cohort.put_off.values()]
    unfinished = "this worker was told to go; whoever takes the job next goes on from where it was"
    failed += [{"user": label, "result": "put back", "why": unfinished} for label in cohort.put_back.values()]
    return sorted(table + failed, key=lambda row: row["user"])


def _row(candidate: Candidate, published: Published | None) -> Row:
    trained, verdict = candidate.trained, candidate.verdict
    assert trained  # it came through training
    assert verdict  # and the gate
    base, own = candidate.scores["base"], candidate.scores["candidate"]
    return {
        "user": candidate.label,
        "result": "accepted" if verdict.accepted else "refused",
        "version": str(published.number) if published else "-",
        "base loss": f"{base.loss:.3f}",
        "adapter loss": f"{own.loss:.3f}",
        "gain": f"{base.loss - own.loss:+.3f}",
        "answers": _answers(candidate),
        "steps": str(trained.steps),
        "curve": sparkline([loss for _, loss in trained.held_out] or [loss for _, loss in trained.losses]),
        "why": verdict.reason,
    }


def _answers(candidate: Candidate) -> str:
    if "candidate" not in candidate.tasks:
        return "-"
    before, after = candidate.tasks["base"], candidate.tasks["candidate"]
    return f"chrF {before.chrf:.0f} → {after.chrf:.0f}, exact {before.exact:.0%} → {after.exact:.0%}"


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """Values as one line of bars, the highest the tallest."""
    if not values:
        return ""
    step = max(1, len(values) // width)
    shown = values[::step]
    low, high = min(shown), max(shown)
    return "".join(BARS[round((value - low) / ((high - low) or 1) * (len(BARS) - 1))] for value in shown)


def markdown(table: Sequence[Row]) -> str:
    """Rows as a Markdown table."""
    columns = list(dict.fromkeys(key for row in table for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(row.get(column, "").replace("|", "\\|") for column in columns) + " |" for row in table]
    return "\n".join(lines)


def draw(curves: Mapping[str, Sequence[tuple[int, float]]], matrix: Matrix, path: Path) -> Path:
    """Held-out loss by optimiser step for each user, and the matrix of whose adapter serves whom, as one PNG."""
    from matplotlib.figure import Figure  # imported late: a second to load, and only pictures need it

    figure = Figure(figsize=(13, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for label, points in curves.items():
        left.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    left.set(title="Held-out loss while training", xlabel="optimiser step", ylabel="nats a token")
    left.legend(fontsize=8)
    left.grid(alpha=0.3)
    _heat(figure, right, matrix)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def _heat(figure: Any, axes: Any, matrix: Matrix) -> None:  # matplotlib's
    """The base's loss as the first column, then every adapter's; the darkest is the lowest."""
    table = [[base, *losses] for base, losses in zip(matrix.base, matrix.losses, strict=True)]
    image = axes.imshow(table, cmap="viridis")
    axes.set_xticks(range(len(matrix.labels) + 1), ["(base)", *matrix.labels], rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(matrix.labels)), matrix.labels, fontsize=8)
    axes.set(title="Each user's data under each user's adapter", xlabel="adapter of", ylabel="held-out data of")
    middle = (min(map(min, table)) + max(map(max, table))) / 2
    for row, losses in enumerate(table):
        for column, loss in enumerate(losses):
            colour = "black" if loss > middle else "white"
            axes.text(column, row, f"{loss:.2f}", ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, ax=axes, label="nats a token")
