"""A storm of users due at once: `python benchmarks/storm.py [--users 1000] [--kill]`.

Real PostgreSQL, Ceph RGW, Prefect's server on that PostgreSQL and four Prefect workers are started; users with 12 to 20
examples each, in five tenants, are added as anybody's are, with schedules whose moment has come; the clock is started,
and everybody is waited for.  Then database and store are read from end to end: everybody has one version, number 1,
whole by SHA-256, `latest` points to it where the gate accepted it, and after a sweep nothing is left over.

With `--kill` a seeded hand kills workers, Prefect's server, clock, database and store with SIGKILL all the while.  With
`--no-prefect` the workers run `lora work`: the difference is Prefect's share.  With `--width` and `--layers` the base
is larger, and so is the training, beside the same orchestration.

The tax is what the factory adds to training: the same users are trained, judged and written to
local files in as many processes with nothing around them (`storms/plain.py`), and

    tax = (storm's wall a user) / (plain wall a user) - 1.

Wall runs from the clock's start to the last version's commit; with as many busy processes as cores everything that
any server or worker does on the side is in it.  CPU seconds by service say where it goes.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.command_line import end_when_told, from_one
from benchmarks.storms import story
from benchmarks.storms.chaos import supervised
from benchmarks.storms.counts import count
from benchmarks.storms.crowd import Crowd, add_everybody, make_crowd
from benchmarks.storms.plain import train_plainly
from benchmarks.storms.servers import Site, running_site, start_clock, start_workers
from benchmarks.storms.watching import Watch, watching
from registry.session import open_database
from registry.store import open_store

RESULTS = Path(__file__).parent / "results"
PLAIN_USERS = 512  # how many of them are trained plainly, for the seconds that a user takes


def storm(site: Site, crowd: Crowd, options: argparse.Namespace) -> dict[str, Any]:
    """Bring the storm about, wait for its end and tell what happened."""
    os.environ.update(site.environment)
    engine = open_database(site.environment["LORA_DATABASE_URL"])
    if options.prefect:
        start_workers(site, options.workers)
    say(f"{crowd.users} users are added")
    add_everybody(crowd, site.environment)
    if not options.prefect:
        start_workers(site, options.workers)
    watch = Watch(site, engine).settle()
    with supervised(site, watch, options.seed, options.pause if options.kill else 0) as chaos, watching(watch):
        ended = _wait(site, watch, crowd.users, options.minutes)
    finished = story.finished(engine, watch.began)
    wall = finished[-1][1] if finished else watch.seconds
    steps = story.phases(watch.began) if options.prefect else {}
    say("database and store are read from end to end")
    counted = count(engine, open_store(site.environment["LORA_STORE_URL"]), crowd.users)
    return {
        "wall_seconds": round(wall, 1), "ended": ended, "counted": asdict(counted), "kills": chaos.marks,
        "cpu_seconds": watch.cpu_seconds, "services": list(site.services), "samples": watch.samples,
        "runs": story.runs(engine, watch.began, steps), "finished": finished,
    }  # fmt: skip


def _wait(site: Site, watch: Watch, users: int, minutes: float) -> bool:
    """Start the clock and wait until everybody is through; False when the time is over first."""
    until, shown = time.monotonic() + 60 * minutes, 0.0
    if "prefect" in site.services:
        start_clock(site)
    while time.monotonic() < until:
        time.sleep(0.5)
        last = watch.samples[-1] if watch.samples else {}
        if last and last["over"] + last["failed"] >= users:
            return True
        if last and time.monotonic() - shown > 5:
            shown = time.monotonic()
            say("  ".join(f"{name} {value:g}" for name, value in last.items()))
    return False


@contextmanager
def _place(given: Path | None) -> Iterator[Path]:
    """A folder for everything that runs; PostgreSQL may run as another user, who must reach it."""
    with tempfile.TemporaryDirectory(prefix="storm-") as name:
        folder = given or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)
        yield folder


def command_line() -> argparse.ArgumentParser:
    """What a storm may be told."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=from_one, default=10_000)
    parser.add_argument("--workers", type=from_one, default=4)
    parser.add_argument("--slots", type=from_one, default=32)
    parser.add_argument("--width", type=int, default=64, help="of the base's hidden states")
    parser.add_argument("--layers", type=int, default=2, help="of the base")
    parser.add_argument("--kill", action="store_true", help="kill everything at random; S3's objects are on disk then")
    parser.add_argument("--no-prefect", dest="prefect", action="store_false", help="workers run `lora work`")
    parser.add_argument("--pause", type=float, default=10, help="seconds between kills, on average")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60, help="give up after so long")
    parser.add_argument("--plain-users", type=int, default=PLAIN_USERS, help="0: no tax is told")
    parser.add_argument("--folder", type=Path, help="where everything runs; it is kept")
    parser.add_argument("--save", type=Path, help="a .json; its picture lies beside it")
    return parser


def main() -> None:
    """Run one storm and keep what came of it."""
    parser = command_line()
    options = parser.parse_args()
    if options.folder and options.folder.exists() and any(options.folder.iterdir()):
        parser.error(f"{options.folder} is not empty; name a new folder")
    end_when_told()
    with _place(options.folder) as folder:
        crowd = make_crowd(options.users, options.seed, folder, options.width, options.layers)
        told = _told(folder, crowd, options)
    path = options.save or RESULTS / f"{result_name(options, parser)}.json"
    path.write_text(json.dumps(told, indent=None, separators=(",", ":")) + "\n")
    story.draw(told, path.with_suffix(".png"))
    say(_summary(told))
    sys.exit(0 if told["ended"] and not told["counted"]["wrong"] else 1)


def result_name(options: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    """Of a storm's results: one that was told to be another than the usual does not write over the usual one's."""
    chosen = {name: getattr(options, name) for name in ("width", "layers", "workers", "slots", "seed")}
    other = "".join(f"_{name}_{value}" for name, value in chosen.items() if value != parser.get_default(name))
    how = ("" if options.prefect else "_no_prefect") + ("_killed" if options.kill else "")
    return f"storm_{options.users}{other}{how}"


def _told(folder: Path, crowd: Crowd, options: argparse.Namespace) -> dict[str, Any]:
    settings = {"LORA_SLOTS": str(options.slots), "LORA_DEVICE": "cpu", "LORA_BASE": str(crowd.base)}
    settings["LORA_ADMIT_SECONDS"] = "3600"  # all are of one group: a process need not start anew for others' sake
    if options.kill:
        settings["LORA_LEASE_SECONDS"] = "20"  # how soon a dead worker's users are taken over
    with running_site(folder, options.kill, settings, options.prefect) as site:
        told = storm(site, crowd, options)
    plain_users = 0 if options.kill else min(options.plain_users, options.users)
    if plain_users and told["ended"]:  # else it is not known what a user takes
        say(f"{plain_users} users are trained with nothing around them")
        plain = train_plainly(crowd, folder / "plain", plain_users, options.workers, options.slots)
        a_user = told["wall_seconds"] / options.users
        told |= {"plain": asdict(plain), "tax": round(a_user / (plain.wall_seconds / plain_users) - 1, 4)}
    chosen = {name: value for name, value in vars(options).items() if name not in ("folder", "save")}
    killed = f", {len(told['kills'])} kills" if options.kill else ""
    title = f"{options.users} users due at once, {options.workers} workers: {told['wall_seconds']:.0f} s{killed}"
    return {"machine": _machine(), "options": chosen, "title": title, **told}


def _summary(told: dict[str, Any]) -> str:
    counted = told["counted"]
    lines = [
        told["title"],
        f"versions {counted['versions']}, accepted {counted['accepted']}, claims {counted['claims']}, "
        f"objects {counted['objects']}, swept {counted['swept']}",
        f"CPU seconds: {told['cpu_seconds']}",
    ]
    if "tax" in told:
        lines.append(f"plain {told['plain']}")
        lines.append(f"tax {told['tax']:.1%}")
    return "\n".join([*lines, *(f"WRONG: {line}" for line in counted["wrong"])])


def _machine() -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).date().isoformat(), "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
    }  # fmt: skip


def say(line: str) -> None:
    """One line of progress."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
