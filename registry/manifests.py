"""A version's manifest as it comes back from outside: read within limits, only names and digests are believed."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from registry.errors import ManifestRefused, NameRefused
from registry.keys import MANIFEST
from registry.names import check_file

_MOST = 1 << 24  # bytes; it holds the losses of a training
_MOST_FILES = 100
_SHA256 = re.compile("[0-9a-f]{64}")


def files_named(path: Path, prefix: str) -> Mapping[str, str]:
    """The SHA-256 of each file that a manifest names.  Raises ManifestRefused."""
    if path.stat().st_size > _MOST:
        raise ManifestRefused(prefix, f"has more than {_MOST:,} bytes")
    try:
        manifest = json.loads(path.read_bytes())
        files = {check_file(name): facts["sha256"] for name, facts in manifest["files"].items()}
    except (ValueError, RecursionError):
        raise ManifestRefused(prefix, "is not JSON") from None
    except (LookupError, TypeError, AttributeError):
        raise ManifestRefused(prefix, "does not name its files and their SHA-256") from None
    except NameRefused as error:
        raise ManifestRefused(prefix, f"names a file that is not allowed ({error})") from None
    if len(files) > _MOST_FILES or not all(isinstance(one, str) and _SHA256.fullmatch(one) for one in files.values()):
        raise ManifestRefused(prefix, "names too many files, or no SHA-256 of one")
    if MANIFEST in files:
        raise ManifestRefused(prefix, "names itself")
    return files
