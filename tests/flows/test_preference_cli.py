"""Preference pairs from a file to a served adapter: the same commands, registry, gate and artefact."""

import json
import random
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.flows.conftest import QUICK, Lora, write_user

pytestmark = pytest.mark.long

SETTINGS = [word for one in (*QUICK, "objective=dpo", "beta=0.2") for word in ("--set", one)]
WORDS = ("fox", "dog", "hello", "lazy", "quick", "brown")


def write_chooser(path: Path, chosen: str, rejected: str, count: int = 60) -> Path:
    """A user who always prefers one way of answering, in two layouts, with one row that says nothing."""
    generator = random.Random(5)
    rows: list[dict[str, object]] = []
    for number in range(count):
        asked = {"role": "user", "content": f"say {generator.choice(WORDS)} {generator.randrange(10**4)}"}
        pair = {"chosen": chosen, "rejected": rejected}
        if number % 2:
            rows.append({"prompt": [asked], **pair})
        else:
            rows.append({key: [asked, {"role": "assistant", "content": text}] for key, text in pair.items()})
    rows.append({"prompt": "hm", "chosen": chosen, "rejected": chosen})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def alice(tmp_path: Path) -> Path:
    """Prefers dogs."""
    return write_chooser(tmp_path / "alice.jsonl", "the lazy dog", "the quick fox")


def test_pairs_become_an_adapter_that_is_judged_and_published(lora: Lora, base_folder: Path, alice: Path) -> None:
    """Beside a user who brings plain answers, in one command after the other; the same bytes once more."""
    assert f"{alice}:61 rejected: is the same as chosen" in lora("data", "check", str(alice)).stdout
    words = ("acme/alice", "--data", str(alice), "--base", str(base_folder), *SETTINGS, "--json")
    (row,) = json.loads(lora("train", *words).stdout)
    assert (row["result"], row["version"], row["base loss"]) == ("accepted", "1", "0.693")
    assert "nats a pair over the base" in row["why"]

    scores = json.loads(lora("show", "acme/alice", "--json").stdout)["scores"]
    assert scores["candidate"]["loss"] < scores["base"]["loss"]
    assert scores["candidate"]["preference_accuracy"] == 1 > scores["base"]["preference_accuracy"]
    assert scores["candidate"]["reward_margin"] > 0
    assert json.loads(lora("reproduce", "acme/alice", "--json").stdout)["equal"]

    folder = Path(json.loads(lora("pull", "acme/alice", "--json").stdout)["folder"])
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), folder)
    assert "| on held-out examples | loss | preference accuracy |" in (folder / "README.md").read_text()
    assert json.loads((folder / "manifest.json").read_text())["recipe"]["objective"]["name"] == "dpo"


def test_pairs_and_answers_are_not_taken_for_one_another(
    lora: Lora, base_folder: Path, alice: Path, tmp_path: Path
) -> None:
    """Said with what to do, and before anything is trained."""
    plain = write_user(tmp_path / "bob.jsonl", "hello fox")
    base = ("--base", str(base_folder), "--json")

    (chose,) = json.loads(lora("train", "acme/alice", "--data", str(alice), *base, code=1).stdout)
    (answered,) = json.loads(lora("train", "acme/bob", "--data", str(plain), *base, *SETTINGS, code=1).stdout)

    assert "60 of 60 examples are preference pairs" in chose["why"]
    assert "set objective=dpo" in chose["why"]
    assert "60 of 60 examples have no chosen and rejected answer" in answered["why"]
    assert "set objective=sft" in answered["why"]
