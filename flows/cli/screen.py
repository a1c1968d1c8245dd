"""`lora status` as lines of text: the same few lines however many users, tenants and workers there are."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta

from flows.cli.printing import plain
from flows.reasons import Reason
from flows.seen import AtWork, Seen
from registry.overview import Waiting

WORKERS, TENANTS, REASONS, HELD = 8, 6, 5, 2  # shown of each, and the rest counted
# Steps as a person calls them.
PHASES = {"prepare": "loading", "train": "training", "judge": "judging", "publish_all": "publishing"}


def lines(seen: Seen, width: int | None = None) -> list[str]:
    """The screen, each line cut to a width where one is given."""
    made = [plain(line, keep="") for line in _lines(seen)]
    return [line if width is None or len(line) <= width else f"{line[: width - 1]}…" for line in made]


def _lines(seen: Seen) -> Iterator[str]:
    counts = ", ".join(f"{count:,} {state}" for state, count in sorted(seen.jobs.items()))
    yield f"jobs     {counts or 'none yet; train one: lora train TENANT/USER --data FILE --base BASE'}"
    yield ""
    yield from _workers(seen.workers, seen.at)
    yield from _waiting(seen.waiting, seen.at)
    yield from _failed(seen.failed, seen.ended.get("failed", 0), seen.at)
    yield f"since {_moment(seen.since, seen.at)}: {_ended(seen)}"


def _workers(workers: Sequence[AtWork], at: datetime) -> Iterator[str]:
    heard = [one for one in workers if not one.silent]
    slots, used = sum(one.slots or 0 for one in heard), sum(one.facts.get("training", 0) for one in heard)
    speed = sum(one.facts.get("tokens_per_second", 0) for one in heard)
    told = f"{len(heard)}, {used} of {slots} slots used, {speed:,.0f} tokens/s" if heard else "none is heard of"
    yield f"workers  {told}"
    names = max((len(one.name) for one in workers[:WORKERS]), default=0)
    for one in workers[:WORKERS]:
        yield f"  {one.name[:32]:<{min(names, 32)}}  {_worker(one, at)}"
    yield from _rest(len(workers) - WORKERS, "workers")


def _worker(one: AtWork, at: datetime) -> str:
    if one.silent:
        until = one.lease_until or at
        return f"silent      its lease ends in {span(until - at)}  {_held(one)}"
    facts = one.facts
    phase = PHASES.get(facts.get("phase", "idle"), facts.get("phase", "idle"))
    parts = [f"{phase:<10}"]
    if phase == "training":
        parts += [f"{facts.get('training', 0)}/{one.slots} slots", f"{facts.get('share', 0):.0%}"]
        parts += [f"{facts.get('tokens_per_second', 0):,.0f} tokens/s"]
        if facts.get("seconds_left") is not None:
            parts.append(f"~{span(timedelta(seconds=facts['seconds_left']))} left")
    return "  ".join([*parts, _held(one)]).rstrip()


def _held(one: AtWork) -> str:
    """Whose jobs it holds, those of most jobs first."""
    most = sorted(one.holds.items(), key=lambda item: (-item[1], item[0]))
    told = [f"{jobs} of {tenant}" for tenant, jobs in most[:HELD]]
    return ", ".join(told + ([f"+{len(most) - HELD}"] if len(most) > HELD else []))


def _waiting(waiting: Sequence[Waiting], at: datetime) -> Iterator[str]:
    by_tenant: dict[str, list[Waiting]] = defaultdict(list)
    for one in waiting:
        by_tenant[one.tenant].append(one)
    count = sum(one.jobs for one in waiting)
    yield f"waiting  {f'{count:,}, the oldest for {span(at - waiting[0].oldest)}' if waiting else 'nobody'}"
    shown = list(by_tenant.items())[:TENANTS]  # the longest waiting first
    names = max((len(name) for name, _ in shown), default=0)
    for name, groups in shown:
        jobs, put_off = sum(one.jobs for one in groups), sum(one.put_off for one in groups)
        parts = [f"{jobs:>7,}", f"oldest {span(at - min(one.oldest for one in groups))}"]
        parts += [f"{len(groups)} groups"] if len(groups) > 1 else []
        parts += [f"{put_off:,} put off by the worker that looked"] if put_off else []
        yield f"  {name:<{names}}  {'  '.join(parts)}"
    yield from _rest(len(by_tenant) - TENANTS, "tenants")


def _failed(failed: Sequence[Reason], count: int, at: datetime) -> Iterator[str]:
    yield f"failed   {count:,}" if failed else "failed   nobody"
    for one in failed[:REASONS]:
        who = f"{one.example.tenant}/{one.example.user}"
        yield f"  {one.count:>5,}x {one.why}"
        yield f"         do: {one.what_to_do}; such as {who}, {span(at - one.example.at)} ago"
    yield from _rest(len(failed) - REASONS, "reasons")


def _ended(seen: Seen) -> str:
    told = f"{seen.ended.get('published', 0):,} published, {seen.ended.get('refused', 0):,} refused by the gate"
    cost = "" if seen.cost is None else f", which cost {seen.cost:,.2f}"
    return f"{told}; {seen.device_seconds / 3600:,.2f} device hours{cost}"


def _rest(count: int, what: str) -> Iterator[str]:
    if count > 0:
        yield f"  and {count:,} {what} more"


def _moment(moment: datetime, at: datetime) -> str:
    return f"{moment:%H:%M} UTC" if moment.date() == at.date() else f"{moment:%Y-%m-%d %H:%M} UTC"


def span(length: timedelta) -> str:
    """A stretch of time in its two largest units."""
    seconds = max(0, round(length.total_seconds()))
    if seconds < 100:
        return f"{seconds} s"
    minutes, hours = round(seconds / 60), seconds // 3600
    if minutes < 100:
        return f"{minutes} min"
    return f"{hours} h {seconds // 60 % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
