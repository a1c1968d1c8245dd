"""A search is one user's trials in one pack: each learns as if alone, and the best go on."""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_core.banks.lora import LoraBank
from lora_core.base_model import BaseModel
from lora_core.cohort import Cohort
from lora_core.data.packing import pack
from lora_core.door import Door
from lora_core.errors import RecipeError, TrainingError
from lora_core.halving import Halving, Report, around, trials
from lora_core.learner import Learner, Lesson, Trained
from lora_core.methods import AnyMethod, LoraSpec
from lora_core.micro_step import read_rows
from lora_core.planner import Plan, train_planned
from lora_core.recipe import Recipe, make_recipe
from lora_core.referee import Answers
from lora_core.saves import Saves
from lora_core.train import train
from tests.lora_core.conftest import T, examples, learner, lora_of, pairs, recipe
from tests.lora_core.killing import Killed, doomed, resumed

K = 4
GRID: dict[str, object] = {
    "search.rank": [2, 8],
    "search.learning_rate": [1e-3, 5e-3, 2e-2],
    "search.layers": [None, [1]],
}


def searcher(seed: int = 1, settings: Mapping[str, object] | None = None, **more: object) -> Learner:
    """A user who searches over twelve trials."""
    chosen = {**GRID, "epochs": 4, **(settings or {}), **more}
    return Learner(f"user{seed}", recipe(seed=seed, **chosen), examples(seed, 12), examples(seed + 1000, 5))


def halving(of: Learner) -> Halving:
    """Its trials; a rank takes a kilobyte."""
    return Halving(of, lambda spec: 1000 * getattr(spec, "rank", 0))


def run(base: BaseModel, learners: Sequence[Learner], slots: int = K, saves: Saves | None = None) -> dict[str, Trained]:
    """Train them packed, in a bank that is wide enough for all tests; results by name."""
    return {one.name: one for one in train(base, learners, slots, T, LoraBank(base.sites, 8), saves=saves)}


def searched(base: BaseModel, of: Learner, others: Sequence[Learner] = (), slots: int = K) -> list[Report]:
    """What became of each trial, beside others."""
    search = halving(of)
    return search.reports(run(base, [*others, *search.trials.values()], slots))


@pytest.mark.parametrize("patience", [None, 3])
def test_a_trial_learns_what_its_plain_recipe_learns_alone(base: BaseModel, patience: int | None) -> None:
    """To the bit, dropout on, although it is measured more often and set aside at each rung: the winner reproduces."""
    reports = searched(base, searcher(patience=patience))

    for report in [report for report in reports if report.rung == 2]:
        alone = run(base, [replace(report.learner, referee=None)])[report.learner.name]
        assert report.trained.losses == alone.losses[: report.trained.steps]
        if report.ended:
            assert torch.equal(report.trained.row_P, alone.row_P)
            assert (report.trained.held_out, report.trained.outcome) == (alone.held_out, alone.outcome)
    assert [report.learner.recipe.search for report in reports] == [None] * 12


def test_a_dropped_trial_is_the_plain_one_as_it_was_at_that_step(llama_base: BaseModel) -> None:
    """Its row is that of a training that was to stop there."""
    reports = searched(llama_base, searcher(schedule="constant", warmup=0))

    for report in reports[::3]:
        if report.trained.outcome == "dropped":
            short = Recipe.model_validate(report.learner.recipe.model_dump() | {"max_steps": report.trained.steps})
            alone = run(llama_base, [replace(report.learner, referee=None, recipe=short)])[report.learner.name]
            assert torch.equal(report.trained.row_P, alone.row_P)


@pytest.mark.parametrize("seed", range(2))
def test_neighbours_change_neither_bytes_nor_verdicts(llama_base: BaseModel, seed: int) -> None:
    """Other users, another search, any order of seats."""
    generator = random.Random(seed)
    one, other = halving(searcher(seed)), halving(searcher(seed + 50, patience=2))
    crowd = [*one.trials.values(), *other.trials.values(), *(learner(seed + 10 + n, count=n + 1) for n in range(4))]
    generator.shuffle(crowd)

    packed = one.reports(run(llama_base, crowd))

    for found, expected in zip(packed, searched(llama_base, searcher(seed)), strict=True):
        assert torch.equal(found.trained.row_P, expected.trained.row_P)
        assert (found.won, found.rung, found.loss) == (expected.won, expected.rung, expected.loss)


@pytest.mark.parametrize(("steps", "patience"), [(3, None), (20, None), (1, 3), (30, 3)])
def test_a_search_that_was_killed_ends_the_same(
    llama_base: BaseModel, tmp_path: Path, steps: int, patience: int | None
) -> None:
    """Verdicts and rivals' readings that were heard stay; those that were not are found again."""
    of = searcher(patience=patience)
    with pytest.raises(Killed):
        run(llama_base, list(halving(of).trials.values()), saves=doomed(tmp_path, steps))
    again = halving(of)
    found_again = again.reports(run(llama_base, list(again.trials.values()), saves=resumed(tmp_path)))

    for found, expected in zip(found_again, searched(llama_base, of), strict=True):
        assert torch.equal(found.trained.row_P, expected.trained.row_P)
        assert found.trained.held_out == expected.trained.held_out
        assert (found.won, found.rung, found.loss) == (expected.won, expected.rung, expected.loss)


def test_rivals_that_start_from_one_row_have_it_examined_once(llama_base: BaseModel) -> None:
    """Of the grid's twelve four start alike: they differ in rank and layers, the others in the rate alone."""
    of = searcher(patience=3)
    rows = len(pack(list(enumerate(of.held_out)), T))
    examined = 0

    def count(base: BaseModel, cohort: Cohort, lessons: Sequence[Lesson | None], row_tokens: int) -> Answers:
        nonlocal examined
        examined += sum(lesson is not None and not lesson.weight for lesson in lessons)
        return read_rows(base, cohort, lessons, row_tokens)

    search = halving(of)
    bank = LoraBank(llama_base.sites, 8)
    trained = list(train(llama_base, search.trials.values(), K, T, bank, compute=count))
    reports = search.reports({one.name: one for one in trained})

    assert examined == rows * (4 + sum(report.rung + len(report.trained.held_out) - 1 for report in reports))
    assert all(report.trained.held_out[0][0] == 0 for report in reports)


@pytest.mark.parametrize("after", [1, 4, 9])
def test_a_search_that_begins_again_by_a_smaller_plan_remembers_no_reading_of_the_first(
    llama_base: BaseModel, after: int
) -> None:
    """Pairs are learnt against what the base thinks of them: by the first plan, which here rounds by whole nats."""
    of = searcher(objective="dpo", patience=3)
    of = replace(of, train=pairs(1, 9), held_out=pairs(2, 5))
    left = after

    def compute(base: BaseModel, cohort: Cohort, lessons: Sequence[Lesson | None], row_tokens: int) -> Answers:
        nonlocal left
        answers = read_rows(base, cohort, lessons, row_tokens)
        if left < 0:
            return answers
        left -= 1
        if left < 0:
            raise torch.OutOfMemoryError("full")
        return [[answer + number for answer in one] for number, one in enumerate(answers)]

    search, bank = halving(of), LoraBank(llama_base.sites, 8)
    plan = Plan(4, T, checkpointed=True)
    found = {
        one.name: one for one, _ in train_planned(llama_base, [*search.trials.values()], plan, bank, compute=compute)
    }

    for again, expected in zip(search.reports(found), searched(llama_base, of, slots=2), strict=True):
        assert torch.equal(again.trained.row_P, expected.trained.row_P)
        assert again.trained.held_out == expected.trained.held_out
        assert (again.won, again.rung, again.loss) == (expected.won, expected.rung, expected.loss)


class Counting(Door):
    """Lets nobody in; how many would have been."""

    def __init__(self) -> None:
        self.places: list[int] = []

    def arrivals(self, places: int) -> list[Learner]:
        """Nobody."""
        self.places.append(places)
        return []


def test_who_waits_for_a_rivals_examination_keeps_a_place(llama_base: BaseModel) -> None:
    """Four of twelve trials read, the others come next: of 16 slots four are left for newcomers."""
    door, of = Counting(), replace(searcher(patience=3), held_out=examples(1001, 40))

    list(train(llama_base, halving(of).trials.values(), 16, T, LoraBank(llama_base.sites, 8), door=door))

    assert door.places[0] == 4


def test_a_save_of_another_search_is_not_used(tmp_path: Path) -> None:
    """Its verdicts came elsewhere in the stream."""
    early, late = (next(iter(halving(searcher(settings={"search.rungs": [at]})).trials.values())) for at in (0.2, 0.5))

    assert early.recipe == late.recipe
    assert early.digest != late.digest


def test_the_lowest_losses_go_on_and_the_tokens_are_few(llama_base: BaseModel) -> None:
    """Twelve, then four, then three; together at most two fifths of what the grid would read."""
    of = searcher()
    spec = of.recipe.search
    assert spec

    reports = searched(llama_base, of)

    planned = 12 * max(report.trained.tokens for report in reports)
    assert sum(report.trained.tokens for report in reports) <= 0.4 * planned
    assert sorted(report.rung for report in reports) == [1] * 8 + [2] * 4
    assert (spec.points, spec.last) == (len(reports), sum(report.ended for report in reports)) == (12, 3)
    assert (
        max(report.loss for report in reports if report.rung == 2)
        <= min(report.loss for report in reports if report.rung == 1) + 0.05
    )


def tell_all(search: Halving, rung: int, losses: Sequence[float]) -> list[bool | None]:
    """Tell the losses of all trials in the order of the grid; who goes on."""
    for name, loss in zip(search.trials, losses, strict=True):
        assert search.goes_on(name, rung) is None  # not before everybody is known
        search.tell(name, rung, loss)
    return [search.goes_on(name, rung) for name in search.trials]


def test_equals_go_on_by_fewest_bytes_then_in_the_order_of_the_grid() -> None:
    """A tie must not be broken by who came first."""
    search = halving(
        searcher(settings={"search.rank": [8, 2], "search.learning_rate": [1e-3, 2e-3], "search.layers": []})
    )

    assert tell_all(search, 0, [1.0, 1.0, 1.0, 1.0]) == [True, False, True, True]


@pytest.mark.parametrize("seed", range(20))
def test_verdicts_do_not_depend_on_the_order_of_what_is_told(seed: int) -> None:
    """Nor on who ended by itself or failed before somebody else was told of."""
    generator = random.Random(seed)
    search, shuffled = halving(searcher()), halving(searcher())
    news = [
        (name, generator.choice(["told", "told", "ended", "failed"]), generator.choice([1.0, 2.0, generator.random()]))
        for name in search.trials
    ]

    for one, order in ((search, news), (shuffled, generator.sample(news, len(news)))):
        for name, what, loss in order:
            one.tell(name, 0, loss) if what == "told" else one.tell_end(name, loss if what == "ended" else None)

    verdicts = [search.goes_on(name, 0) for name in search.trials]
    assert verdicts == [shuffled.goes_on(name, 0) for name in search.trials]
    losses = {name: loss for name, what, loss in news if what != "failed"}
    rates = {name: trial.recipe.learning_rate for name, trial in search.trials.items()}
    kept = [name for name, goes in zip(search.trials, verdicts, strict=True) if goes]
    best = {rate: min(losses[name] for name in losses if rates[name] == rate) for rate in map(rates.get, losses)}
    assert len(kept) == min(4, len(losses))
    assert {rates[name] for name in kept} == set(best)  # there are three, and three go on to the end
    for name in kept:
        beaten = [other for other in losses if other not in kept and losses[other] < losses[name]]
        assert not beaten or losses[name] == best[rates[name]]


def test_the_winner_has_the_fewest_bytes_of_those_near_the_best(llama_base: BaseModel) -> None:
    """With a wide tolerance the smaller of the two that were trained to the end; with none the best."""
    found = {}
    for tolerance in (0.0, 1.0):
        reports = searched(llama_base, searcher(settings={"search.tolerance": tolerance, "search.finalists": 12}))
        found[tolerance] = next(report for report in reports if report.won)
        assert sum(report.won for report in reports) == 1

    assert found[0.0].loss == min(report.loss for report in reports)
    assert found[1.0].size == 2000


def test_a_trial_that_fails_leaves_the_others_alone(llama_base: BaseModel) -> None:
    """An absurd rate is retired, takes nobody's place, and cannot win."""
    absurd = {"search.learning_rate": [5e-3, 1e38], "clip": 1e30, "warmup": 0, "schedule": "constant"}

    reports = searched(llama_base, searcher(settings=absurd))

    failed = [report for report in reports if report.trained.outcome == "retired"]
    assert {report.learner.recipe.learning_rate for report in failed} == {1e38}
    assert [report.won for report in failed] == [False] * len(failed)
    assert sum(report.won for report in reports) == 1


def test_a_search_of_which_every_trial_fails_says_why(llama_base: BaseModel) -> None:
    """Whose, how, and what to do."""
    absurd = {"search.learning_rate": [1e37, 1e38], "clip": 1e30, "warmup": 0, "schedule": "constant"}

    with pytest.raises(TrainingError, match=r"user1: every trial .* not finite .*lower search.learning_rate"):
        searched(llama_base, searcher(settings=absurd))


def test_a_search_of_one_trial_is_a_plain_training(llama_base: BaseModel) -> None:
    """It wins."""
    one = {"search.rank": [4], "search.learning_rate": [], "search.layers": []}

    (report,) = searched(llama_base, searcher(settings=one))

    assert report.won
    assert torch.equal(report.trained.row_P, run(llama_base, [learner(1, 12, 5, epochs=4)])["user1"].row_P)


def test_a_trial_without_its_rivals_does_not_wait_for_ever(llama_base: BaseModel) -> None:
    """A mistake of the caller's is told."""
    first, *_ = halving(searcher()).trials.values()

    with pytest.raises(ValueError, match="not trained with them"):
        run(llama_base, [first])


def test_a_user_without_held_out_examples_cannot_search() -> None:
    """There is nothing to choose by."""
    with pytest.raises(TrainingError, match="held-out"):
        halving(replace(searcher(), held_out=()))


def test_trials_are_the_grid_as_plain_recipes() -> None:
    """Every point once; what the grid does not name is the recipe's own."""
    grid = trials(recipe(**GRID))

    points = {(lora_of(one).rank, one.learning_rate, one.method.layers) for one in grid}
    assert points == {(r, rate, layers) for r in (2, 8) for rate in (1e-3, 5e-3, 2e-2) for layers in (None, (1,))}
    assert {one.method.dropout for one in grid} == {0.1}
    assert trials(recipe()) == [recipe()]


def test_without_a_search_the_recipe_s_own_rank_and_rate_are_searched_around() -> None:
    """Half to twice the rank; a quarter to twice the rate."""
    spec = around(make_recipe({})).search

    assert spec
    assert (spec.rank, spec.learning_rate) == ((8, 16, 32), (5e-5, 1e-4, 2e-4, 4e-4))
    assert around(recipe(**GRID)) == recipe(**GRID)


@pytest.mark.parametrize("rank", [1, 200, 256])
def test_no_rank_is_searched_that_a_start_beside_it_has_no_room_for(rank: int) -> None:
    """Of a PiSSA start half as many as otherwise."""
    chosen = around(make_recipe({"rank": rank, "init_lora_weights": "pissa"}))

    assert max(lora_of(one).rank for one in trials(chosen)) == min(2 * rank, 256)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "prompt_tuning", "search.layers": [[0], [1]]}, "no choice of layers"),
        ({"method": "prompt_tuning", "search.rank": [1, 2]}, "rank is not a key of method prompt_tuning"),
        ({"init_lora_weights": "pissa", "search.rank": [8, 300]}, "at most rank 256"),
    ],
)
def test_a_search_for_what_its_method_cannot_be_is_that_users_trouble(settings: dict[str, object], words: str) -> None:
    """A RecipeError as all others: whoever shares a cohort with it goes on."""
    with pytest.raises(RecipeError, match=words):
        trials(make_recipe(settings))


WRONG = {
    "nothing to search": {},
    "rank names a value twice": {"rank": [4, 4]},
    "do not rise": {"rank": [4], "rungs": [0.5, 0.2]},
    "less than 1": {"rank": [4], "rungs": [1.0]},
    "empty range": {"layers": [[]]},
    "greater than or equal to 1": {"rank": [0]},
    "600 trials and may make 256": {"rank": list(range(1, 201)), "learning_rate": [1e-4, 2e-4, 3e-4]},
    "did you mean search.rank": {"rnk": [4]},
    "valid tuple": {"rank": 8},
}


@pytest.mark.parametrize("words", WRONG)
def test_a_search_that_makes_no_sense_is_refused_with_the_reason(words: str) -> None:
    """Before anything is trained."""
    with pytest.raises(RecipeError, match=words):
        make_recipe({"search": WRONG[words]})


def test_a_search_is_read_and_stored_like_the_rest_of_a_recipe() -> None:
    """Scientific numbers too; and a recipe without one has the digest that it always had."""
    asked = make_recipe({"search": {"rank": [4, 8], "learning_rate": ["1e-4", 2e-4], "layers": [None, [0, 1]]}})

    assert asked.search
    assert (asked.search.learning_rate, asked.search.layers) == ((1e-4, 2e-4), (None, (0, 1)))
    assert make_recipe(asked.model_dump(mode="json")) == asked
    assert asked.digest != make_recipe({}).digest
    plain = make_recipe({}).model_dump(mode="json", exclude={"search", "objective"})
    assert make_recipe({}).digest == hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def test_the_size_of_a_trial_is_asked_of_its_method() -> None:
    """Bytes are the bank's business."""
    asked: list[int] = []

    def size(spec: AnyMethod) -> int:
        assert isinstance(spec, LoraSpec)
        asked.append(spec.rank)
        return spec.rank

    Halving(searcher(), size)

    assert asked == [2] * 6 + [8] * 6
