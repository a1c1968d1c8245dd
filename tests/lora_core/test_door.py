"""Who comes and goes while a cohort trains: nobody's bytes depend on it, and whoever is stopped goes on elsewhere."""

from pathlib import Path

import pytest
import torch

from lora_core.banks.lora import LoraBank
from lora_core.base_model import BaseModel
from lora_core.cohort import Cohort
from lora_core.data.rendering import Rendered
from lora_core.door import Door
from lora_core.learner import Learner, Trained
from lora_core.micro_step import read_rows
from lora_core.planner import Plan, train_planned
from lora_core.saves import Saves
from lora_core.train import train
from tests.lora_core.conftest import learner, recipe
from tests.lora_core.doors import OneByOne

T = 32


class Cupboard:
    """A shelf in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def put(self, name: str, of: str, lessons: int, path: Path, last: bool) -> None:
        """Keep the last save of each."""
        if last:
            (self.folder / f"{of[:16]}-{lessons}").write_bytes(path.read_bytes())

    def newest(self, name: str, of: str) -> int | None:
        """The one that is there."""
        return max((int(path.name.partition("-")[2]) for path in self.folder.glob(f"{of[:16]}-*")), default=None)

    def fetch(self, name: str, of: str, lessons: int, path: Path) -> None:
        """Copy it."""
        path.write_bytes((self.folder / f"{of[:16]}-{lessons}").read_bytes())


@pytest.fixture
def bank(llama_base: BaseModel) -> LoraBank:
    """For everybody here."""
    return LoraBank(llama_base.sites, 4)


def by_name(found: list[Trained]) -> dict[str, Trained]:
    """Results, by whose they are."""
    return {one.name: one for one in found}


def same(one: Trained, other: Trained) -> bool:
    """To the bit."""
    return torch.equal(one.row_P, other.row_P) and (one.losses, one.held_out) == (other.losses, other.held_out)


def alone(base: BaseModel, one: Learner, slots: int, bank: LoraBank) -> Trained:
    """As it is trained with nobody else."""
    (found,) = train(base, [one], slots, T, bank)
    return found


def test_a_newcomer_sits_down_at_once_and_is_the_same_as_alone(llama_base: BaseModel, bank: LoraBank) -> None:
    """A free slot is told of, and whoever comes for it does not wait."""
    door, late = OneByOne([learner(2)], after=2), learner(2)

    found = by_name(list(train(llama_base, [learner(1)], 2, T, bank, door=door)))

    assert door.places[0] >= 1
    assert found[late.name].waited <= 1
    assert same(found[late.name], alone(llama_base, late, 2, bank))


def test_a_long_user_is_in_nobodys_way_to_its_end(llama_base: BaseModel, bank: LoraBank) -> None:
    """However empty its rows are, it is no user of a few until it is one: its slot is a newcomer's."""
    half_rows = tuple(Rendered((1,) * (T // 2 + 1), (True,) * (T // 2 + 1)) for _ in range(16))
    long = Learner("long", recipe(batch_size=8, row_tokens=T, max_length=T, epochs=4), half_rows)
    door, late = OneByOne([learner(2, count=2)], after=45), learner(2, count=2)

    found = by_name(list(train(llama_base, [long], 1, T, bank, door=door)))

    assert door.places[44] == 0  # of 64 rows 19 are left
    assert found[late.name].waited <= 1
    assert same(found["long"], alone(llama_base, long, 1, bank))


def test_who_is_done_may_come_again_under_the_same_name(llama_base: BaseModel, bank: LoraBank) -> None:
    """A cohort that goes on for hours meets a user's newer data; two of one name at once are still refused."""
    found: list[Trained] = []
    newer = [learner(1)]

    class Returning(Door):
        def arrivals(self, places: int) -> list[Learner]:
            return [newer.pop()] if found and newer else []

    for one in train(llama_base, [learner(1)], 1, T, bank, door=Returning()):
        found.append(one)

    assert [one.name for one in found] == ["user1", "user1"]
    assert same(*found)
    with pytest.raises(ValueError, match="two learners"):
        list(train(llama_base, [learner(1)], 2, T, bank, door=OneByOne([learner(1)])))


def test_whom_nobody_wants_any_more_leaves_without_a_trace(llama_base: BaseModel, bank: LoraBank) -> None:
    """Its slot is free at once, and its neighbour's bytes are its own."""
    unwanted, other = learner(1), learner(2)

    found = by_name(list(train(llama_base, [unwanted, other], 2, T, bank, door=OneByOne(unwanted=[unwanted.name]))))

    assert found[unwanted.name].outcome == "dismissed"
    assert same(found[other.name], alone(llama_base, other, 2, bank))


@pytest.mark.parametrize("after", [1, 3, 6])
def test_whoever_is_stopped_by_a_closing_door_goes_on_on_another_machine(
    llama_base: BaseModel, bank: LoraBank, tmp_path: Path, after: int
) -> None:
    """What the first left on the shelf is all that the second has."""
    shelf, both = Cupboard(tmp_path / "shelf"), [learner(1), learner(2)]
    first, second = (Saves(tmp_path / name, "shape", lambda: False, shelf) for name in ("first", "second"))

    left = list(train(llama_base, both, 2, T, bank, door=OneByOne(closes=after), saves=first))
    seen: list[int] = []
    found = by_name(list(train(llama_base, both, 2, T, bank, lambda pace: seen.append(pace.micro_steps), saves=second)))

    whole: list[int] = []
    list(train(llama_base, both, 2, T, bank, lambda pace: whole.append(pace.micro_steps)))
    assert left == []
    assert len(seen) < len(whole)
    assert all(same(found[one.name], alone(llama_base, one, 2, bank)) for one in both)


def test_a_disk_that_takes_no_saves_costs_nothing_else(llama_base: BaseModel, bank: LoraBank, tmp_path: Path) -> None:
    """Full, or gone: the training goes on to the same bytes."""
    (tmp_path / "full").touch()
    nowhere = Saves(tmp_path / "full" / "saves", "shape", lambda: True)
    expected = next(train(llama_base, [learner(1)], 2, T, bank))

    (found,) = train(llama_base, [learner(1)], 2, T, bank, saves=nowhere)
    nowhere.drop("1")

    assert torch.equal(found.row_P, expected.row_P)


def test_a_newcomer_is_not_lost_when_memory_runs_out(llama_base: BaseModel, bank: LoraBank) -> None:
    """The room gets smaller, and everybody who had come in is still there."""
    early, late = learner(1), learner(2)
    steps = 0

    def full(base: BaseModel, cohort: object, *rest: object) -> list[list[float]]:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise torch.OutOfMemoryError("full")
        return read_rows(base, cohort, *rest)  # type: ignore[arg-type]  # the engine's own

    found = {
        trained.name
        for trained, _ in train_planned(
            llama_base, [early], Plan(2, T), bank, compute=full, door=OneByOne([late], after=1)
        )
    }

    assert found == {early.name, late.name}


def test_a_twin_reads_as_the_base_does_while_the_base_trains(llama_base: BaseModel, bank: LoraBank) -> None:
    """It has the same tensors and takes no memory of them; what is attached to one is not to the other."""
    twin = llama_base.twin()
    ids = torch.arange(6)[None]
    before = twin.model(ids).logits
    cohort = Cohort(1, bank.width, llama_base.model.device, llama_base.model.dtype)
    cohort.weights_KP += 1
    cohort.scale_K11 += 1

    with bank.attached(llama_base, cohort):
        during = twin.model(ids).logits

    shared = {one.data_ptr() for one in llama_base.model.parameters()}
    assert torch.equal(before, during)
    assert {one.data_ptr() for one in twin.model.parameters()} == shared
