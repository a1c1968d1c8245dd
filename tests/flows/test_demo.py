"""What the demo says at its end."""

from pathlib import Path

import pytest

from flows.cli import system
from flows.demo.run import as_typed
from flows.demo.tiny_base import make_base
from flows.errors import Unready


def test_the_demo_names_the_command_as_this_shell_finds_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`make demo` sets up an environment that it does not enter."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert as_typed(".venv/bin/lora") == ".venv/bin/lora"

    (tmp_path / "lora").touch(mode=0o755)
    assert as_typed(".venv/bin/lora") == "lora"


@pytest.mark.parametrize("kind", ["folder", "link", "file"])
def test_the_demos_base_takes_nobody_elses_place(tmp_path: Path, kind: str) -> None:
    """`lora demo --home .` beside a base of one's own: told before a minute of training, and the base stays."""
    own, place = tmp_path / "own", tmp_path / "home" / "base"
    place.parent.mkdir()
    target = own if kind == "link" else place
    if kind != "file":
        target.mkdir()
        target /= "model.safetensors"
    target.write_text("weights")
    if kind == "link":
        place.symlink_to(own)

    with pytest.raises(Unready, match=r"base is there, and was not made by the demo; name another folder"):
        make_base(place)

    assert target.read_text() == "weights"


def test_the_demo_says_what_it_lacks_before_it_begins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Prefect is wanted after minutes of work on the base, and one extra after another makes three tries of one."""
    monkeypatch.setattr(system, "find_spec", lambda name: None if name in ("pyarrow", "prefect") else name)

    with pytest.raises(Unready, match=r"needs pyarrow and prefect; pip install 'lora-factory\[all\]'"):
        system.demo(tmp_path / "demo")

    assert not (tmp_path / "demo").exists()
