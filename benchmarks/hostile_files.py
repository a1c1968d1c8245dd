"""A thousand hostile files and more, read as files from outside are: what came of each, and what it cost.

    python -m benchmarks.hostile_files [--files 2000] [--first 10000]

Adapters and datasets in turn, seeded, mutated and made up (`tests/hostile/`), in a process of its own whose peak memory
is measured for each file.  Saves every verdict; exit code 1 when one is bad: a crash, a hang, a file taken for what it
is not.
"""

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from benchmarks.command_line import from_one
from benchmarks.measuring import RESULTS, processor
from lora_core.data.rows import Limits
from tests.hostile.trial import Verdict, run


def main() -> None:
    """Read them, and say what came of them by kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=from_one, default=2000)
    parser.add_argument("--first", type=int, default=10_000, help="the first seed")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        verdicts = list(run(Path(place), range(given.first, given.first + given.files), Limits().file_bytes))
    worst = {cost: asdict(max(verdicts, key=lambda one: float(getattr(one, cost)))) for cost in ("seconds", "bytes")}
    facts = {
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "load": round(os.getloadavg()[0], 1),
        "files": len(verdicts),
        "outcomes": dict(sorted(Counter(f"{one.what} {one.kind}: {one.outcome}" for one in verdicts).items())),
        "bad": [asdict(one) for one in verdicts if not one.good],
        "worst": worst,
        "largest_parquet_reader_bytes": max(one.reader_bytes for one in verdicts),
        "verdicts": [[one.seed, one.kind, one.outcome, round(one.seconds, 4), one.bytes] for one in verdicts],
    }
    given.results.mkdir(parents=True, exist_ok=True)
    (given.results / "hostile_files.json").write_text(json.dumps(facts) + "\n")
    sys.stdout.write(_told(verdicts))
    sys.exit(0 if all(one.good for one in verdicts) else 1)


def _told(verdicts: list[Verdict]) -> str:
    counts = Counter((one.what, one.outcome if one.good else "BAD") for one in verdicts)
    lines = [f"{what}: {outcome} {count}" for (what, outcome), count in sorted(counts.items())]
    slow, large = (max(verdicts, key=key) for key in (lambda one: one.seconds, lambda one: float(one.bytes)))
    lines.append(f"slowest {slow.seconds:.1f} s ({slow.what} {slow.kind}, seed {slow.seed})")
    lines.append(f"largest {large.bytes / 2**20:.0f} MiB ({large.what} {large.kind}, seed {large.seed})")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
