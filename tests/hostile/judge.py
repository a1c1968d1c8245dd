"""Reads hostile files in a process of its own, one a line on stdin, and says on stdout what came of each and its cost.

What is accepted is compared with what another reader makes of the same bytes: safetensors, and Python's json.
"""

import gzip
import json
import math
import os
import resource
import sys
import time
from pathlib import Path

import torch
import zstandard
from safetensors.torch import load

from lora_core.data.readers import Limits, RawRow, read_rows
from lora_core.data.snapshot import SkipPolicy, load_snapshot, take_snapshot
from lora_core.errors import ArtifactRefused, DatasetRefused
from lora_core.intake import read_artifact
from tests.hostile.artefacts import WEIGHTS, hostile_base

BASE = hostile_base()
LIMITS = Limits(file_bytes=int(sys.argv[1]))


def artefact(path: Path) -> str:
    """As an inference host, an export or a judge of the gate reads an adapter."""
    try:
        files = read_artifact(path, BASE)
    except ArtifactRefused as error:
        return told(error)
    theirs = load((path / WEIGHTS).read_bytes())
    same = set(theirs) == set(files.tensors) and all(
        torch.equal(theirs[name].float(), tensor) and bool(tensor.isfinite().all())
        for name, tensor in files.tensors.items()
    )
    return "accepted as it is" if same else "accepted as something else"


def dataset(path: Path) -> str:
    """As `lora data check` reads files, whatever share of the rows is bad; then once more, to compare."""
    try:
        snapshot, report = take_snapshot([str(path)], SkipPolicy(1.0), LIMITS)
    except DatasetRefused as error:
        return told(error)
    if load_snapshot(snapshot.content, snapshot.digest).examples != snapshot.examples:
        return "accepted as something else"
    if ".json" in path.name and not path.is_dir() and not same_rows(path):
        return "accepted as something else"
    return "rows told" if report.bad else "accepted as it is"


def same_rows(path: Path) -> bool:
    """Whether the rows that are read are those that Python's own parser finds at their places."""
    data = path.read_bytes()
    if path.name.endswith(".gz"):
        data = gzip.decompress(data)
    elif path.name.endswith(".zst"):
        data = zstandard.ZstdDecompressor().decompressobj(read_across_frames=True).decompress(data)
    rows = [row for row in read_rows(str(path), LIMITS) if isinstance(row, RawRow)]
    if ".jsonl" in path.name:
        lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        return all(equal(json.loads(lines[row.line - 1].decode("utf-8-sig")), row.value) for row in rows)
    whole = json.loads(data.decode("utf-8-sig"))
    listed = whole if isinstance(whole, list) else [whole]
    return all(equal(listed[row.line - 1], row.value) for row in rows)


def equal(one: object, other: object) -> bool:
    """Of JSON values."""
    return json.dumps(one) == json.dumps(other)


def told(error: Exception) -> str:
    """A refusal counts when it says something, in one line (a report of rows in several), and what to do."""
    return "refused" if "; " in str(error) and len(str(error)) < 5000 else f"refused without words: {error}"


def measured(kind: str, path: Path) -> dict[str, object]:
    """What came of one file, in how many seconds, and how much memory it took at its peak beyond what was there."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, start = memory("VmRSS"), time.perf_counter()
    try:
        outcome = {"artefact": artefact, "dataset": dataset}[kind](path)
    except BaseException as error:  # a traceback is what must not be
        outcome = f"crashed: {type(error).__name__}: {error}"
    seconds = time.perf_counter() - start
    readers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10  # the largest so far
    return {"outcome": outcome[:500], "seconds": seconds, "bytes": memory("VmHWM") - before, "reader_bytes": readers}


def memory(name: str) -> int:
    """Bytes of this process, as Linux counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) << 10


def main() -> None:
    """Until stdin ends."""
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        kind, path = json.loads(line)
        found = measured(kind, Path(path))
        assert math.isfinite(float(str(found["seconds"])))
        answers.write(json.dumps(found) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
