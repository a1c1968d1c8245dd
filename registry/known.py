"""What pinned references such as `acme/alice:3` were found to be: a warm pull of one need not ask the registry.

A version is never rewritten, so its number says all; only forgetting a user, or a registry made anew, can give a number
to something else.  So what was found counts for a day, and for the one registry that said it.  File names are digests:
no user's name stands in the cache.
"""

import hashlib
import json
import time
from contextlib import suppress
from pathlib import Path
from secrets import token_hex

from registry.names import Reference
from registry.resolved import Resolved

TRUSTED_SECONDS = 24 * 3600
_FACTS = ("number", "state", "served_name", "prefix", "sha256", "files")


class Known:
    """Records of what one registry said, in a folder."""

    def __init__(self, folder: Path, registry: str) -> None:
        self.folder, self.registry = folder, registry

    def recall(self, wanted: Reference) -> Resolved | None:
        """What a pinned reference is; None where that was asked too long ago, or never."""
        path = self._path(wanted)
        try:
            age = time.time() - path.stat().st_mtime
            if wanted.number and 0 <= age < TRUSTED_SECONDS:
                return Resolved(reference=wanted, **json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError):  # none; or one that a power cut has cut off
            pass
        return None

    def remember(self, found: Resolved) -> None:
        """Write down what a pinned reference was found to be; where that is not possible, it is asked for again."""
        if not found.reference.number:
            return
        facts = {name: getattr(found, name) for name in _FACTS}
        path = self._path(found.reference)
        aside = path.with_name(f".{token_hex(8)}")
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            aside.write_text(json.dumps(facts), encoding="utf-8")
            aside.replace(path)

    def _path(self, wanted: Reference) -> Path:
        name = f"{self.registry}\n{wanted.tenant}/{wanted.user}/{wanted.adapter}:{wanted.number}"
        return self.folder / hashlib.sha256(name.encode()).hexdigest()


def tidy(folder: Path, older_than: float = TRUSTED_SECONDS) -> None:
    """Remove the records that count no more."""
    until = time.time() - older_than
    for path in folder.glob("*"):
        with suppress(OSError):
            if path.stat().st_mtime <= until:
                path.unlink()
