"""What command lines of scripts share: numbers that can be meant, and an end that stops what was started."""

import argparse
import signal
import sys


def from_one(text: str) -> int:
    """A whole number from 1 on.  Raises ArgumentTypeError, which argparse tells."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def end_when_told() -> None:
    """SIGTERM, as `timeout` sends it, ends this process by way of everything that stops its servers."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
