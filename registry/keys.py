"""Keys of objects: where things lie, which keys are allowed, and that none is ever given other bytes.

`<root>/t/<tenant>/u/<opaque user>/<adapter>/<served name>/<file>`; datasets in `datasets/<digest>-<attempt>/` beside,
and unfinished trainings in `progress/<job>/`.
"""

import hashlib
import re

from registry.errors import KeyRefused, ObjectDiffers

MANIFEST = "manifest.json"  # names a version's other files and their digests; uploaded last

_PART = re.compile(r"[A-Za-z0-9_=-][A-Za-z0-9._=-]*")


def user_prefix(tenant: str, opaque: str) -> str:
    """Where everything of one user lies; `opaque` stands for the user, so that keys hold no personal data."""
    return f"t/{tenant}/u/{opaque}"


def version_prefix(tenant: str, opaque: str, adapter: str, served_name: str) -> str:
    """Where one version's files lie; the last part is the name under which an engine serves it."""
    return f"{user_prefix(tenant, opaque)}/{adapter}/{served_name}"


def dataset_prefix(tenant: str, opaque: str, digest: str, attempt: str) -> str:
    """Where one attempt to store a dataset snapshot puts it."""
    return f"{user_prefix(tenant, opaque)}/datasets/{digest}-{attempt}"


def progress_prefix(tenant: str, opaque: str, job: str) -> str:
    """Where the progress of a job's training lies, until the job is over."""
    return f"{user_prefix(tenant, opaque)}/progress/{job}"


def checked_key(key: str) -> str:
    """A key that every store reads the same way.  Raises KeyRefused."""
    if len(key) > 1024:
        raise KeyRefused(key, f"{len(key)} characters, at most 1024")
    for part in key.split("/"):
        if not _PART.fullmatch(part) or len(part) > 255:
            raise KeyRefused(key, f"part {ascii(part)[:40]} is empty, starts with a dot or has odd characters")
    return key


def check_same(key: str, data: bytes, there: bytes) -> None:
    """Whether what is under a key already is what was to be put there.  Raises ObjectDiffers."""
    if there != data:
        raise ObjectDiffers(key, hashlib.sha256(data).hexdigest(), hashlib.sha256(there).hexdigest())
