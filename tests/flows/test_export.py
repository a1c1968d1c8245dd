"""From a reference to a file or a folder that another engine loads; whole, or not there at all."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from sqlalchemy.orm import Session
from transformers import AutoModelForCausalLM, AutoTokenizer

from flows import export
from flows.cli.versions import Kind
from flows.errors import Unready
from flows.export import ORIGIN, bytes_in, export_gguf, export_merged
from flows.factory import Factory, add_data, pin_base, request_training
from flows.settings import FactorySettings
from flows.talk import Talk
from flows.work import run_cohort
from lora_core.errors import ExportRefused
from lora_core.recipe import load_recipe
from registry import queries
from registry.errors import NotFound
from registry.models import Dataset, Job, SharedBase
from registry.names import Reference
from registry.session import transaction
from tests.flows.conftest import QUICK, write_user
from tests.lora_core.test_peft_parity import our_logits

EXPORTS = {Kind.GGUF: export_gguf, Kind.MERGED: export_merged}


@pytest.fixture(scope="module")
def factory(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Factory:
    """A home in which acme/alice has a version."""
    home = tmp_path_factory.mktemp("home")
    made = Factory(FactorySettings(base=str(base_folder), home=home / "home"))
    made.set_up()
    reference = Reference.parse("acme/alice")
    add_data(made, reference, [str(write_user(home / "data.jsonl", "hello fox"))])
    with transaction(made.engine) as session:
        request_training(session, reference, pin_base(made), load_recipe(None, [*QUICK, "use_rslora=true"]))
    assert run_cohort(made)
    return made


def test_a_published_version_becomes_a_gguf_adapter(factory: Factory, tmp_path: Path) -> None:
    """By alias; what was exported is told by number."""
    origin = export_gguf(factory, "acme/alice", tmp_path / "alice.gguf")

    reader = gguf.GGUFReader(tmp_path / "alice.gguf")
    assert origin.label == "acme/alice:1"
    assert reader.fields["adapter.lora.alpha"].contents() == pytest.approx(32 / 4**0.5 * 4)
    assert bytes_in(tmp_path / "alice.gguf") == (tmp_path / "alice.gguf").stat().st_size
    assert os.listdir(tmp_path) == ["alice.gguf"]


def test_a_base_that_has_moved_is_found_where_lora_base_is(
    factory: Factory, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by workers, `lora matrix` and `reproduce`: for exports and for talks, nobody needs to say --base."""
    moved, lineage = tmp_path / "moved", queries.lineage
    shutil.copytree(base_folder, moved)

    def gone(session: Session, *of: Any) -> tuple[Dataset, SharedBase, Job]:
        dataset, base, job = lineage(session, *of)
        session.expunge(base)
        base.name = "/nowhere/base"
        return dataset, base, job

    monkeypatch.setattr(queries, "lineage", gone)
    here = Factory(factory.settings.model_copy(update={"base": str(moved)}))
    monkeypatch.setattr(Factory, "from_environment", lambda: here)

    origin = export_gguf(here, "acme/alice", tmp_path / "alice.gguf")

    assert origin.base_folder == moved
    assert Talk.of("acme/alice").base.name == str(moved)


def test_a_published_version_becomes_a_model_of_its_own(
    factory: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers loads it, and it says what the adapter on its base says."""
    origin = export_merged(factory, "acme/alice:1", tmp_path / "model")

    monkeypatch.setenv("LORA_HOME", str(factory.settings.home))
    talk, tokens = Talk.of("acme/alice"), torch.arange(9)[None]
    adapter = talk.server.load(talk.version)
    ours = our_logits(talk.base, talk.server.bank, adapter.row_P, adapter.scale, tokens)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens).logits, ours, atol=1e-5, rtol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template
    assert json.loads((tmp_path / "model" / ORIGIN).read_text())["adapter"] == origin.version.sha256


@pytest.mark.parametrize("kind", [*Kind])
def test_what_is_there_is_replaced_only_by_force(factory: Factory, kind: Kind, tmp_path: Path) -> None:
    """And then by an earlier export's successor alone."""
    write = EXPORTS[kind]
    write(factory, "acme/alice", tmp_path / "x")

    with pytest.raises(Unready, match="exists already; give a new name, or pass --force"):
        write(factory, "acme/alice", tmp_path / "x")
    write(factory, "acme/alice", tmp_path / "x", force=True)

    assert os.listdir(tmp_path) == ["x"]


def test_no_force_replaces_what_is_no_export(factory: Factory, base_folder: Path, tmp_path: Path) -> None:
    """A base, a home, a link to one, a folder where a file is meant, a base in GGUF, notes."""
    (tmp_path / "link").symlink_to(base_folder)
    before = sorted(os.listdir(base_folder))

    for to in (base_folder, tmp_path / "link", tmp_path):
        with pytest.raises(Unready, match="exists already and is no earlier export; give a new name"):
            export_merged(factory, "acme/alice", to, force=True)
    model = tmp_path / "base.gguf"
    writer = gguf.GGUFWriter(model, "llama")
    writer.add_type(gguf.GGUFType.MODEL)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    (tmp_path / "notes").write_text("adapter")
    for to in (model, tmp_path / "notes"):
        with pytest.raises(Unready, match="exists already and is no earlier export; give a new name"):
            export_gguf(factory, "acme/alice", to, force=True)
    for to in (base_folder, Path("/dev/null")):
        with pytest.raises(Unready, match="is there and no file"):
            export_gguf(factory, "acme/alice", to, force=True)

    assert sorted(os.listdir(base_folder)) == before


@pytest.mark.parametrize("kind", [*Kind])
def test_an_export_that_breaks_leaves_what_was_there(
    factory: Factory, kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, say: nothing half written, nothing aside."""
    write = EXPORTS[kind]
    write(factory, "acme/alice", tmp_path / "x")
    size = bytes_in(tmp_path / "x")

    def full(path: Path, *_: object) -> None:
        (path / "part" if path.is_dir() else path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_gguf", full)
    monkeypatch.setattr(export, "write_merged", full)
    for to in ("x", "y"):
        with pytest.raises(Unready, match="No space left on device"):
            write(factory, "acme/alice", tmp_path / to, force=True)

    assert os.listdir(tmp_path) == ["x"]
    assert bytes_in(tmp_path / "x") == size


def test_another_base_is_refused(factory: Factory, base_folder: Path, tmp_path: Path) -> None:
    """Its weights are not those that the adapter was trained on."""
    other = tmp_path / "other"
    other.mkdir()
    for path in base_folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "config.json").write_text((base_folder / "config.json").read_text() + "\n")

    for write in EXPORTS.values():
        with pytest.raises(Unready, match="is not the base that acme/alice was trained on"):
            write(factory, "acme/alice", tmp_path / "x", base=str(other))


def test_nobodys_version_is_told_before_anything_is_written(factory: Factory, tmp_path: Path) -> None:
    """Nor is a folder made that was not there."""
    with pytest.raises(NotFound):
        export_gguf(factory, "acme/bob", tmp_path / "x.gguf")
    with pytest.raises(Unready, match="is no folder; make it"):
        export_merged(factory, "acme/alice", tmp_path / "no" / "x")

    assert os.listdir(tmp_path) == []


def test_a_version_on_a_quantised_base_is_exported_as_gguf_alone(base_folder: Path, tmp_path: Path) -> None:
    """An adapter's numbers are whole; its base's are not."""
    made = Factory(FactorySettings(base=str(base_folder), quantise="4bit", home=tmp_path / "home"))
    made.set_up()
    reference = Reference.parse("acme/eve")
    add_data(made, reference, [str(write_user(tmp_path / "data.jsonl", "hello fox"))])
    with transaction(made.engine) as session:
        request_training(session, reference, pin_base(made), load_recipe(None, [*QUICK, "max_steps=2"]))
    assert run_cohort(made)

    export_gguf(made, "acme/eve:1", tmp_path / "eve.gguf")
    with pytest.raises(ExportRefused, match="4bit weights plus a delta"):
        export_merged(made, "acme/eve:1", tmp_path / "model")

    assert (tmp_path / "eve.gguf").is_file()
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("kind", [*Kind])
def test_what_is_no_lora_is_told_before_its_base_is_looked_at(factory: Factory, kind: Kind, tmp_path: Path) -> None:
    """Adapter layers have places that only a base with weights can show."""
    reference = Reference.parse("acme/lena")
    add_data(factory, reference, [str(write_user(tmp_path / "data.jsonl", "hello fox"))])
    settings = [*QUICK[1:], "method=bottleneck", "width=4", "max_steps=2"]
    with transaction(factory.engine) as session:
        request_training(session, reference, pin_base(factory), load_recipe(None, settings))
    run_cohort(factory)

    with pytest.raises(ExportRefused, match="an adapter of bottleneck cannot be exported: it is no change of weights"):
        EXPORTS[kind](factory, "acme/lena:1", tmp_path / "x")
