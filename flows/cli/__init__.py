"""The `lora` command.  A file of this package is a group of commands; here errors become one line and an exit code.

Exit codes: 0 done, 1 could not be done, 2 wrong usage, 3 does not exist, 4 done for some users only.
"""

import io
import logging
import os
import sys
import warnings
from typing import Annotated

import typer

from flows.cli import (
    caching,
    chatting,
    clock,
    comparing,
    dataset,
    fleet,
    leave,
    lifecycle,
    metrics,
    pulling,
    queueing,
    reading,
    scheduling,
    searching,
    status,
    system,
    training,
    tuning,
    versions,
    working,
)
from flows.cli.printing import fail, in_words, installed, say
from flows.errors import FlowError
from lora_core.errors import LoraError
from registry.errors import NotFound, RegistryError

app = typer.Typer(
    name="lora",
    help="A personal model adapter for every user of every tenant, from one shared frozen base.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _tell_version(asked: bool) -> None:
    if asked:
        say(f"lora-factory {installed('lora-factory')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


# What `lora --help` shows, in this order: a heading, and the files whose commands stand under it.
PANELS = {
    "The factory": (system, status, clock, metrics),
    "Training": (dataset, training, working, tuning, scheduling, queueing, comparing),
    "Versions": (reading, searching, versions, fleet),
    "Pulling and talking": (pulling, caching, leave, chatting),
    "Keeping and forgetting": (lifecycle,),
}
GROUPS = {dataset: "data", scheduling: "schedule", queueing: "queue", caching: "cache"}  # commands of commands
for panel, files in PANELS.items():
    for file in files:
        if file in GROUPS:
            app.add_typer(file.app, name=GROUPS[file], rich_help_panel=panel)
            continue
        before = len(app.registered_commands)
        file.register(app)
        for command in app.registered_commands[before:]:
            command.rich_help_panel = panel


# The libraries' own bars and warnings: our commands show their own progress.
QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}


def main() -> None:
    """Run the command line; what was raised on purpose is told in one line, without a traceback."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # says at every start which kernels it does without
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a letter of a user's data that a terminal does not know
            stream.reconfigure(errors="backslashreplace")
    if sys.stdout is None:  # closed when Python began; a file that a command opens could take its place
        sys.exit(fail("standard output is closed, so no answer could be told; open it, or send it to /dev/null", 1))
    try:
        _run()
    except BrokenPipeError:  # who reads us, such as `head`, has seen enough; Python would complain once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (RegistryError, LoraError, FlowError, ModuleNotFoundError, OSError) as error:
        sys.exit(fail(_in_words(error), 3 if isinstance(error, NotFound) else 1))
    except KeyboardInterrupt:
        sys.exit(130)


def _run() -> None:
    try:
        app()
    finally:
        sys.stdout.flush()


def _in_words(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return _missing(error)
    return in_words(error)


def _missing(error: ModuleNotFoundError) -> str:
    extras = {
        "prefect": "flows",
        "psutil": "flows",
        "psycopg": "postgres",
        "pyarrow": "data",
        "zstandard": "data",
        "gguf": "edge",
    }
    extra = extras.get(str(error.name), "train")
    return f"{error.name} is not installed; pip install 'lora-factory[{extra}]'"
