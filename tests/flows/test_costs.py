"""What a cohort's device did, shared out: nothing is lost, nothing invented."""

from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from flows.costs import Meter

READS = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 10**7), max_size=8)
STEPS = st.lists(st.tuples(st.integers(0, 10**13), READS), max_size=40)


def ticking(passed: list[int]) -> Iterator[int]:
    """A clock that has moved on by so much at each look."""
    moment = 12345
    yield moment
    for one in passed:
        yield (moment := moment + one)


def metered(steps: list[tuple[int, dict[str, int]]], devices: int = 1) -> Meter:
    """A meter after these steps."""
    clock = ticking([passed for passed, _ in steps])
    meter = Meter(lambda: next(clock))
    meter.devices = devices
    for _, read in steps:
        meter.spend(read)
    return meter


@given(STEPS, st.integers(1, 8))
def test_the_users_costs_add_up_to_what_the_devices_were_held_for(
    steps: list[tuple[int, dict[str, int]]], devices: int
) -> None:
    """To the nanosecond, whoever reads when, with rows unused, and on any number of devices."""
    meter = metered(steps, devices)

    shared = sum(meter.nanoseconds([name]) for name in "abcdefgh")

    assert shared + meter.common == meter.total == devices * sum(passed for passed, _ in steps)
    assert all(meter.nanoseconds([name]) >= 0 for name in "abcdefgh")
    assert meter.tokens("abcdefgh") == sum(sum(read.values()) for _, read in steps)
    if steps and any(steps[-1][1].values()):
        assert meter.common == 0  # whoever reads last takes what was nobody's


@given(st.integers(0, 10**13), st.dictionaries(st.sampled_from("abcd"), st.integers(1, 10**6), min_size=1))
def test_a_step_costs_by_tokens(passed: int, read: dict[str, int]) -> None:
    """To within what rounding to nanoseconds moves."""
    meter = metered([(passed, read)])

    for name, tokens in read.items():
        assert abs(meter.nanoseconds([name]) - passed * tokens / sum(read.values())) <= len(read)


def test_what_nobody_read_in_is_paid_for_by_the_next_who_do() -> None:
    """Loading a base serves those who train on it; who has left by then pays nothing more."""
    meter = metered([(100, {"a": 1}), (50, {}), (30, {"b": 3, "c": 1})])

    assert [meter.nanoseconds([name]) for name in "abc"] == [100, 60, 20]
