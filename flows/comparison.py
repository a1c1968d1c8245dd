"""What `lora compare` works on and draws: a user's own data, or one person of the demo on the demo's base."""

from collections.abc import Callable, Sequence
from pathlib import Path

from flows.candidates import make_candidate
from flows.factory import Factory, pin_base, read_data
from flows.tune import newest_snapshot
from lora_core.base_model import BaseModel, load_base
from lora_core.compare import CONTENDERS, Compared
from lora_core.curriculum import Learner
from lora_core.data.snapshot import Snapshot
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
    room = base.longest - max(spec.positions for spec in CONTENDERS.values())
    shorter = recipe.model_copy(update={"max_length": min(recipe.max_length, room)})
    return make_candidate(label, shorter, snapshot, base).learner


def draw(results: Sequence[Compared], base_loss: float, path: Path) -> Path:
    """Held-out loss against numbers trained, and what each method costs in memory and time, as one PNG."""
    from matplotlib.figure import Figure  # imported late: a second to load, and only pictures need it

    figure = Figure(figsize=(13, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.axhline(base_loss, color="grey", linestyle="--", label="the base itself")
    for one in results:
        left.scatter(one.parameters, one.loss, s=60)
        left.annotate(one.method, (one.parameters, one.loss), xytext=(6, 4), textcoords="offset points", fontsize=8)
    left.set(title="Quality", xscale="log", xlabel="numbers trained", ylabel="held-out loss, nats a token")
    left.margins(x=0.25)
    left.legend(fontsize=8)
    places = range(len(results))
    right.barh([place - 0.2 for place in places], [one.peak_bytes / 2**20 for one in results], 0.4, label="peak, MiB")
    right.barh([place + 0.2 for place in places], [one.seconds for one in results], 0.4, label="training, seconds")
    right.set_yticks(places, [one.method for one in results], fontsize=8)
    right.set(title="Cost of training one user", xscale="log")
    right.invert_yaxis()
    right.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
