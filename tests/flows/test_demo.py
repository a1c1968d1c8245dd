"""What the demo says at its end."""

from pathlib import Path

import pytest

from flows.demo.run import as_typed


def test_the_demo_names_the_command_as_this_shell_finds_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`make demo` sets up an environment that it does not enter."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert as_typed(".venv/bin/lora") == ".venv/bin/lora"

    (tmp_path / "lora").touch(mode=0o755)
    assert as_typed(".venv/bin/lora") == "lora"
