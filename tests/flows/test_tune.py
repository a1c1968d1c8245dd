"""A search from the command line: what it tries, what it publishes, and what it leaves alone."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.flows.conftest import QUICK, Lora, write_user

pytestmark = pytest.mark.long

GRID = ["search.rank=[2,4]", "search.learning_rate=[1e-3, 3e-2]", "search.layers=[null, [1]]", "search.tolerance=0"]
SETTINGS = [word for one in (*QUICK, *GRID) for word in ("--set", one)]


def tune(lora: Lora, base: Path, *words: str, code: int = 0) -> dict[str, Any]:  # JSON
    """`lora tune --json`."""
    found: dict[str, Any] = json.loads(
        lora("tune", "acme/alice", *words, "--base", str(base), *SETTINGS, "--json", code=code).stdout
    )
    return found


@pytest.fixture
def alice(tmp_path: Path) -> Path:
    """A file of a user who always answers the same."""
    return write_user(tmp_path / "alice.jsonl", "the quick brown fox")


def test_the_winner_is_published_with_its_own_recipe_and_the_search_that_found_it(
    lora: Lora, base_folder: Path, alice: Path
) -> None:
    """It trains again to the same bytes as a plain recipe; the same search again has nothing to do."""
    found = tune(lora, base_folder, "--data", str(alice))

    (winner,) = [trial for trial in found["trials"] if trial["won"]]
    assert (found["result"], found["version"], len(found["trials"])) == ("accepted", "1", 8)
    assert winner["loss"] == min(trial["loss"] for trial in found["trials"] if trial["outcome"] != "dropped")
    folder = json.loads(lora("pull", "acme/alice", "--json").stdout)["folder"]
    manifest = json.loads((Path(folder) / "manifest.json").read_text(encoding="utf-8"))
    recipe = manifest["recipe"]
    assert recipe["search"] is None
    assert (recipe["method"]["rank"], recipe["learning_rate"]) == (winner["rank"], winner["learning_rate"])
    assert recipe["method"]["layers"] == winner["layers"]
    assert manifest["search"]["trials"] == found["trials"]
    assert json.loads(lora("reproduce", "acme/alice:1", "--json").stdout)["equal"]

    again = tune(lora, base_folder)
    assert (again["result"], again["version"], again["trials"]) == ("unchanged", "1", found["trials"])


def test_a_dry_run_shows_the_same_trials_and_leaves_nothing(lora: Lora, base_folder: Path, alice: Path) -> None:
    """As a table too, with the winner marked."""
    shown = lora("tune", "acme/alice", "--data", str(alice), "--base", str(base_folder), *SETTINGS, "--dry-run").stdout

    assert shown.count("winner") == 1
    assert shown.count("dropped") == 5  # of eight three go on
    assert "acme/alice not published" in shown
    assert json.loads(lora("list", "--json").stdout) == []


def test_users_who_search_share_a_cohort(lora: Lora, base_folder: Path, alice: Path) -> None:
    """`lora train` with a search in the recipe; each gets the winner of its own trials."""
    lora("data", "add", "acme/alice", str(alice))
    lora("data", "add", "acme/bob", str(write_user(alice.parent / "bob.jsonl", "hello to the lazy dog", seed=1)))

    rows = json.loads(lora("train", "acme/alice", "acme/bob", "--base", str(base_folder), *SETTINGS, "--json").stdout)

    assert [(row["user"], row["result"]) for row in rows] == [("acme/alice", "accepted"), ("acme/bob", "accepted")]
    for user in ("acme/alice", "acme/bob"):
        folder = Path(json.loads(lora("pull", user, "--json").stdout)["folder"])
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        assert len(manifest["search"]["trials"]) == 8
        assert manifest["cohort"]["slots"] == 16  # one for each trial: whoever has stopped costs nothing


def test_a_search_of_which_every_trial_fails_publishes_nothing(lora: Lora, base_folder: Path, alice: Path) -> None:
    """Whose it was, why, and what to do; the data stays."""
    wild = ["search.learning_rate=[1e37,1e38]", "clip=1e30", "warmup=0", "schedule=constant"]
    words = [word for one in (*QUICK, *wild) for word in ("--set", one)]

    found = lora("tune", "acme/alice", "--data", str(alice), "--base", str(base_folder), *words, code=1)

    assert "every trial of the search failed" in found.stdout
    assert "lower search.learning_rate" in found.stdout
