"""A small base on disk, users with habits that it learns in seconds, and the command line in its own process."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from transformers import LlamaConfig, LlamaForCausalLM
from typer.main import get_command

from flows import candidates, cli
from tests.flows.forked import Commands
from tests.lora_core.conftest import CHATML, make_tokenizer

ROOT = Path(__file__).parents[2]
LORA = (sys.executable, "-c", "from flows.cli import main; main()")
QUICK = ["rank=4", "learning_rate=3e-2", "epochs=6", "batch_size=4", "row_tokens=64", "max_length=64", "patience=2"]

Lora = Callable[..., subprocess.CompletedProcess[str]]
LoraHere = Callable[..., "Said"]


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained Llama of a few thousand parameters, with its tokenizer."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    tokenizer = make_tokenizer(CHATML)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_user(path: Path, habit: str, count: int = 60, seed: int = 0) -> Path:
    """A user who always answers in one way."""
    generator = random.Random(seed)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"say {generator.randrange(10**6)}"},
                {"role": "assistant", "content": habit},
            ]
        }
        for _ in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def _few_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, two held-out prompts are answered: most of a small cohort's time would go into eight."""
    monkeypatch.setattr(candidates, "ANSWERS_JUDGED", 2)


@pytest.fixture(scope="session")
def commands() -> Iterator[Commands]:
    """What forks a process for every command."""
    with closing(Commands()) as started:
        yield started


@pytest.fixture
def lora(tmp_path: Path, commands: Commands) -> Lora:
    """The `lora` command as a person runs it; fails the test unless the exit code is the expected one."""

    def run(
        *words: str, code: int = 0, environment: Mapping[str, str] | None = None, typed: str = ""
    ) -> subprocess.CompletedProcess[str]:
        done = commands.run(words, quiet_environment(tmp_path) | dict(environment or {}), typed)
        assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done

    return run


@dataclass(frozen=True)
class Said:
    """What a command answered."""

    code: int
    out: str
    err: str


command_tree = cache(get_command)  # takes most of a small command's time


@pytest.fixture
def lora_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> LoraHere:
    """The `lora` command in this process, with variables of its environment: one of its own would cost seconds."""
    for name, value in {**cli.QUIET, "COLUMNS": "200"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("typer.main.get_command", command_tree)

    def run(*words: str, **environment: str) -> Said:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["lora", *words])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return Said(int(left.value.code or 0), *capsys.readouterr())

    return run


def quiet_environment(home: Path) -> dict[str, str]:
    """The environment of a person who has set nothing but a home."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LORA_", "PREFECT_"))}
    return kept | {"LORA_HOME": str(home / "home"), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}


def samples(text: str) -> dict[tuple[str, tuple[str, ...]], float]:
    """Metrics by name and label values, read as Prometheus reads them."""
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
