"""`lora setup`, `doctor` and `demo`: the factory itself."""

import platform
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.printing import AsJson, answer, installed, say
from flows.errors import Unready
from flows.factory import Factory
from lora_core.errors import LoraError
from registry.errors import RegistryError, StoreError
from registry.session import reading, shown
from registry.store import overwrites
from registry.tenancy import unbound

SECRET = {
    "database_url",
    "database_owner_url",
    "store_url",
    "grant_secret",
    "receipt_secret",
}  # shown without passwords, or not at all
LIBRARIES = (
    "lora-factory",
    "torch",
    "transformers",
    "peft",
    "safetensors",
    "prefect",
    "sqlalchemy",
    "boto3",
    "pydantic",
    "model-signing",
)
DEMO_NEEDS = ("pyarrow", "torch", "prefect")  # one of each extra: the last is used after minutes


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    for command in (setup, doctor, demo):
        app.command()(command)


def setup(
    revision: Annotated[
        str | None, typer.Option(help="The tables of an earlier release: to go back to it.  Make a backup first.")
    ] = None,
) -> None:
    """Make what is missing: the registry's tables (Alembic), the bucket or folder.  Safe to run again.

    LORA_DATABASE_URL=postgresql+psycopg://lora_app@... LORA_DATABASE_OWNER_URL=postgresql+psycopg://lora@... lora setup
    """
    from registry.schema import present

    factory = Factory.from_environment()
    factory.set_up(revision)
    say(f"registry  {shown(factory.engine)}, tables {present(factory.engine)}")
    say(f"store     {factory.store.check()}")


def doctor(
    as_json: AsJson = False,
    ready: Annotated[bool, typer.Option(help="Only try registry, tables and store: what a probe asks.")] = False,
) -> None:
    """Show the effective settings, try every connection, and name versions and GPU; exit code 1 if something is wrong.

    lora doctor
    """
    factory = Factory.from_environment()
    probed = {"registry": _registry, "tables": _tables, "store": _store, "signs with": _signs, "trusts": _trusts}
    tried = probed if ready else probed | {"store": _store_and_objects, "device": _device}
    checks = [_tried(factory, what, check) for what, check in tried.items()]
    answer(checks if ready else _everything(factory, checks), as_json, "")
    if any(str(row["state"]).startswith("error") for row in checks):
        raise typer.Exit(1)


def demo(
    home: Annotated[Path, typer.Option(help="Where the demo keeps its base, data, registry and store.")] = Path(
        ".lora/demo"
    ),
) -> None:
    """The whole main job on made-up users: no GPU, account, server or download.

    lora demo
    """
    if missing := [library for library in DEMO_NEEDS if find_spec(library) is None]:
        raise Unready(f"the demo needs {' and '.join(missing)}", "pip install 'lora-factory[all]'")
    from flows.demo.run import run

    run(home)


def _everything(factory: Factory, checks: list[dict[str, object]]) -> list[dict[str, object]]:
    """Settings, what was tried (the device last), and versions, a row each."""
    settings = factory.settings.model_dump(mode="json", exclude=SECRET)
    rows: list[dict[str, object]] = [{"what": f"LORA_{key.upper()}", "state": value} for key, value in settings.items()]
    rows += [*checks[:-1], {"what": "python", "state": platform.python_version()}]
    rows += [{"what": name, "state": installed(name)} for name in LIBRARIES]
    return [*rows, checks[-1]]


def _registry(factory: Factory) -> str:
    with reading(factory.engine) as session:
        from registry.queries import tenants

        count = len(tenants(session))
    why = unbound(factory.engine)
    apart = f"by queries alone: {why}" if why else "by row-level security"
    return f"{shown(factory.engine)}, {count} tenants, kept apart {apart}"


def _tables(factory: Factory) -> str:
    from registry.schema import present, wanted

    found = present(factory.engine)
    if found != wanted():
        return f"error: they are {found or 'missing'}, this release wants {wanted()}; run `lora setup`"
    return found


def _store(factory: Factory) -> str:
    return factory.store.check()


def _store_and_objects(factory: Factory) -> str:
    """Not asked by probes, since it writes, which a host that only pulls may not."""
    found = factory.store.check()
    try:
        if overwrites(factory.store):
            return f"error: {found} overwrites objects; use an S3 with conditional PUT (If-None-Match)"
    except StoreError as error:
        return f"{found}; not tried whether objects are overwritten: {error}"
    return f"{found}; objects are never overwritten: tried"


def _signs(factory: Factory) -> str:
    signer = factory.settings.signer
    return f"{signer.public}, {factory.settings.signing_key}" if signer else "no key: versions are not signed here"


def _trusts(factory: Factory) -> str:
    keys = factory.settings.verifier.keys
    return ", ".join(map(str, keys)) or "any: signatures are not checked here"


def _tried(factory: Factory, what: str, check: Callable[[Factory], str]) -> dict[str, object]:
    try:
        return {"what": what, "state": check(factory)}
    except (RegistryError, LoraError) as error:
        return {"what": what, "state": f"error: {error}"}


def _device(factory: Factory) -> str:
    """Of this machine.  Raises DeviceMissing where LORA_DEVICE names another: then no worker begins."""
    if find_spec("torch") is None:
        return "no torch, so nothing is trained here"
    import torch

    if factory.settings.device:
        from lora_core.base_model import check_device

        check_device(factory.settings.device)
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return f"{torch.cuda.get_device_name()}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
    return f"cpu, {torch.get_num_threads()} threads"
