"""The `lora` command.  A file of this package is a group of commands; here errors become one line and an exit code.

Exit codes: 0 done, 1 could not be done, 2 wrong usage, 3 does not exist, 4 done for some users only.
"""

import os
import sys
import warnings

import typer

from flows.cli import chatting, dataset, reading, scheduling, system, training, versions
from flows.cli.printing import fail
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
app.add_typer(dataset.app, name="data")
app.add_typer(scheduling.app, name="schedule")
for group in (system, training, reading, versions, chatting):
    group.register(app)


# The libraries' own bars and warnings: our commands show their own progress.
QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}


def main() -> None:
    """Run the command line; what was raised on purpose is told in one line, without a traceback."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        app()
    except NotFound as error:
        sys.exit(fail(error, 3))
    except (RegistryError, LoraError, FlowError) as error:
        sys.exit(fail(error, 1))
    except ModuleNotFoundError as error:
        sys.exit(fail(_missing(error), 1))
    except KeyboardInterrupt:
        sys.exit(130)


def _missing(error: ModuleNotFoundError) -> str:
    extra = {"prefect": "flows", "psycopg": "postgres", "pyarrow": "data", "zstandard": "data"}.get(
        str(error.name), "train"
    )
    return f"{error.name} is not installed; pip install 'lora-factory[{extra}]'"
