"""What the installed `lora` command runs: the command line, once it is loaded."""

import sys


def main() -> None:
    """Load the command line and run it; Ctrl-C in that second is as quiet as later."""
    try:
        from flows import cli
    except KeyboardInterrupt:
        sys.exit(130)
    cli.main()
