"""What `lora compare` works on and draws: a user's own data, or one person of the demo on the demo's base."""

from collections.abc import Callable, Sequence
from pathlib import Path

from flows.candidates import make_candidate
from flows.factory import Factory, pin_base, read_data
from flows.tune import newest_snapshot
from lora_core.base_model import BaseModel, load_base
from lora_core.compare import CONTENDERS, Compared
from lora_core.data.snapshot import Snapshot
from lora_core.learner import Learner
from lora_core.recipe import Recipe
from registry.names import Reference


def demo_task(factory: Factory, say: Callable[[str], None]) -> tuple[BaseModel, Learner]:
    """The demo's base (trained once, kept in the home) and the data of one of its people."""
    from flows.demo.people import write_people
    from flows.demo.run import recipe
    from flows.demo.tiny_base import make_base

    home = factory.settings.home_folder / "demo"
    base = load_base(str(make_base(home / "base", say=say)), device=factory.settings.device or None)
    person = write_people(home / "people")[0]
    snapshot, _ = read_data(factory, [str(person.file)])
    return base, _learner(base, snapshot, f"{person.tenant}/{person.user}", recipe())


def own_task(
    factory: Factory, text: str | None, data: Sequence[str], base: str | None, recipe: Recipe
) -> tuple[BaseModel, Learner]:
    """Files, or a user's newest dataset, on the base that is named.  Raises Unready, BaseModelError, NotFound."""
    pinned = pin_base(factory, base)
    loaded = load_base(pinned.name, pinned.revision, factory.settings.device or None, quantise=pinned.quantised)
    if data:
        snapshot, _ = read_data(factory, data)
        return loaded, _learner(loaded, snapshot, text or "these files", recipe)
    reference = Reference.parse_adapter(text or "")
    return loaded, _learner(loaded, newest_snapshot(factory, reference), reference.label, recipe)


def _learner(base: BaseModel, snapshot: Snapshot, label: str, recipe: Recipe) -> Learner:
    """A learner whose examples leave room for the virtual tokens of every contender."""
    room = base.room(max(spec.positions for spec in CONTENDERS.values()))
    shorter = recipe.model_copy(update={"max_length": min(recipe.max_length, room)})
    return make_candidate(label, shorter, snapshot, base).learner


def draw(results: Sequence[Compared], base_loss: float, path: Path) -> Path:
    """Held-out loss against numbers trained, and what each method costs in memory and time, as one PNG."""
    from matplotlib.figure import Figure  # imported late: a second to load, and only pictures need it

    figure = Figure(figsize=(14, 5), layout="constrained")
    quality, memory, time = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    quality.axhline(base_loss, color="grey", linestyle="--", label="the base itself")
    for one in results:
        quality.scatter(one.parameters, one.loss, s=60, label=one.method)
    quality.set(title="Quality", xlabel="numbers trained", ylabel="held-out loss, nats a token")
    quality.set(xscale="log", yscale="log")
    quality.legend(fontsize=8)
    names, colours = [one.method for one in results], [f"C{number}" for number in range(len(results))]
    memory.barh(names, [one.peak_bytes / 2**20 for one in results], color=colours)
    memory.set(title="Memory to train one user", xlabel="peak, MiB")
    time.barh(names, [one.seconds for one in results], color=colours)
    time.set(title="Time to train one user", xlabel="seconds", yticks=[])
    for axes in (memory, time):
        axes.invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
