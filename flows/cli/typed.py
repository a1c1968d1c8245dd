"""What commands read from standard input, where there is one: whoever starts a command may have closed it."""

import sys
from typing import TextIO

from flows.errors import Unready


def standard_input(instead: str) -> TextIO:
    """Standard input; `instead` says what to do without it.  Raises Unready."""
    if sys.stdin is None:  # Python's word for a stream that was closed when it began
        raise Unready("standard input is closed", instead)
    return sys.stdin
