"""A published version for edge engines: pulled, checked against its base, converted aside, and put in place at once."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flows.errors import Unready
from flows.factory import Factory
from flows.fitting import place_recorded
from flows.records import recorded_methods
from lora_core.base_files import fingerprint, locate
from lora_core.base_model import load_base, outline
from lora_core.export import (
    as_lora,
    check_mergeable,
    deltas,
    is_gguf_adapter,
    merge,
    stored_dtype,
    write_gguf,
    write_merged,
)
from lora_core.intake import read_artifact
from lora_core.methods import LoraSpec
from registry import queries
from registry.client import Resolved
from registry.models import SharedBase
from registry.names import Reference
from registry.session import reading

ORIGIN = "merged_from.json"  # in a folder of merged weights: what went into it

Write = Callable[[Path], None]


@dataclass(frozen=True)
class Origin:
    """What an export is made of: a version's pulled files, the base it was trained on, and where that lies here."""

    version: Resolved
    adapter: Path
    base: SharedBase
    base_folder: Path
    recorded: Sequence[LoraSpec]  # settings that it can have been trained with

    @classmethod
    def of(cls, factory: Factory, text: str, base_name: str | None) -> "Origin":
        """What a reference means.

        Raises ExportRefused where it is no LoRA, Unready where the base is another one than it was trained on.
        """
        version = factory.client.resolve(text)
        wanted = version.reference
        with reading(factory.engine) as session:
            tenant = queries.tenant_id(session, wanted.tenant)
            exactly = Reference(wanted.tenant, wanted.user, wanted.adapter, number=version.number)
            row = queries.version(session, tenant, exactly)
            _, base, _ = queries.lineage(session, tenant, row)
        recorded = [as_lora(spec) for spec in recorded_methods(row.recipe)]
        name, revision = (base_name, base.revision) if base_name else place_recorded(factory.settings, base)
        folder = locate(name, revision)
        if fingerprint(folder, base.quantised) != base.digest:
            raise Unready(f"{name} is not the base that {text} was trained on", "pass it with --base")
        return cls(version, factory.client.fetch(version), base, folder, recorded)

    @property
    def label(self) -> str:
        """The version, by its number."""
        return f"{self.version.reference.label}:{self.version.number}"


def export_gguf(factory: Factory, text: str, to: Path, force: bool = False, base: str | None = None) -> Origin:
    """Write a version as a GGUF adapter for llama.cpp.  Raises ExportRefused, ArtifactRefused, Unready."""
    if os.path.lexists(to) and not os.path.isfile(to):
        raise Unready(f"{to} is there and no file", "give a file's name, such as alice.gguf")
    if os.path.lexists(to) and not (force and is_gguf_adapter(to)):
        raise _in_the_way(to, force)
    _check_parent(to)
    origin = Origin.of(factory, text, base)
    base_model = outline(origin.base_folder)
    files = read_artifact(origin.adapter, base_model, origin.recorded)
    _put(to, lambda path: write_gguf(path, base_model.model.config, deltas(files)))
    return origin


def export_merged(factory: Factory, text: str, to: Path, force: bool = False, base: str | None = None) -> Origin:
    """Write base and version as one model.  Raises ExportRefused, ArtifactRefused, BaseModelError, Unready."""
    if os.path.lexists(to) and not (force and os.path.isfile(to / ORIGIN) and not to.is_symlink()):
        raise _in_the_way(to, force)
    _check_parent(to)
    origin = Origin.of(factory, text, base)
    check_mergeable(origin.base.quantised)
    whole = load_base(str(origin.base_folder), device="cpu", dtype=stored_dtype(origin.base_folder))
    files = read_artifact(origin.adapter, whole, origin.recorded)
    merge(whole, deltas(files))

    def write(folder: Path) -> None:
        folder.mkdir()
        write_merged(folder, whole, origin.base_folder)
        facts = {"adapter": origin.version.sha256, "base": origin.base.digest, "format": 1}
        (folder / ORIGIN).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    _put(to, write)
    return origin


def bytes_in(path: Path) -> int:
    """How large an export is."""
    return sum(one.stat().st_size for one in (path, *path.glob("*")) if one.is_file())


def _in_the_way(to: Path, force: bool) -> Unready:
    """What is there, which force does not replace if it is no earlier export."""
    if force:
        return Unready(f"{to} exists already and is no earlier export", "give a new name")
    return Unready(f"{to} exists already", "give a new name, or pass --force to replace an earlier export")


def _check_parent(to: Path) -> None:
    """Before minutes go into what could not be put anywhere."""
    if not os.path.isdir(to.absolute().parent):
        raise Unready(f"{to.absolute().parent} is no folder", "make it, or give another name")


def _put(to: Path, write: Write) -> None:
    """Have it written aside, flush it, and put it in place in one step: whoever looks finds all of it or nothing.

    Where it replaces a folder, the old one is moved away first; it comes back if the new one cannot be put there.
    """
    try:
        aside = Path(tempfile.mkdtemp(dir=to.absolute().parent, prefix=".export-"))
    except OSError as error:
        raise Unready(f"{to} cannot be written ({error.strerror})", "give another place") from None
    try:
        write(aside / "new")
        for path in [aside / "new", *(aside / "new").glob("*")]:
            _flush(path)
        if to.is_dir():
            to.rename(aside / "old")
        (aside / "new").rename(to)
    except OSError as error:
        if (aside / "old").exists():
            (aside / "old").rename(to)
        raise Unready(f"{to} cannot be written ({error.strerror or error})", "check its place and the space") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _flush(path: Path) -> None:
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())
