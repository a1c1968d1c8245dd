"""The plan of a cohort, as rules over random rooms."""

from hypothesis import given
from hypothesis import strategies as st

from lora_core import seating
from lora_core.data.packing import densely
from lora_core.seating import EXAMINED, FEW, GATHERED, HOLD, STARVED, Rota, Standing, express, lanes, swaps, turns

STANDINGS = st.lists(
    st.builds(Standing, st.integers(1, 200), st.integers(0, 2), st.integers(0, 2 * STARVED), st.integers(0, HOLD)),
    max_size=12,
)


@given(STANDINGS, STANDINGS, st.integers(0, 8))
def test_no_slot_stays_free_while_somebody_waits(seated: list[Standing], waiting: list[Standing], free: int) -> None:
    """And nobody sits down twice."""
    chosen = turns(free, seated, waiting, len(seated) + free)

    assert len(chosen) == len(set(chosen)) == min(free, len(waiting))


@given(STANDINGS, STANDINGS, st.integers(1, 8))
def test_the_higher_priority_sits_down_first(seated: list[Standing], waiting: list[Standing], free: int) -> None:
    """Whoever is left standing has no more than anybody who was seated."""
    chosen = turns(free, seated, waiting, len(seated) + free)
    left = [one.priority for number, one in enumerate(waiting) if number not in chosen]

    assert not left or all(waiting[number].priority >= max(left) for number in chosen)


def test_the_longest_sits_down_first_and_waiting_counts_as_rows() -> None:
    """Nobody is overtaken for ever: who has waited 90 micro-steps goes before who brings 80 rows more."""
    waiting = [Standing(100), Standing(20, waited=90), Standing(90)]

    assert turns(3, [], waiting, 8) == [1, 0, 2]


def test_users_of_a_few_rows_have_half_of_the_slots_at_once() -> None:
    """The rest goes to long users: they decide when everything is done."""
    few, long = [Standing(FEW)] * 6, [Standing(100)] * 6

    chosen = turns(4, [], [*few, *long], 4)

    assert sum(number < 6 for number in chosen) == express(4) == 2


def test_who_has_starved_goes_before_users_of_a_few_rows() -> None:
    """A stream of small users must not keep a long one out of the only slot."""
    waiting = [Standing(1), Standing(50, waited=STARVED)]

    assert turns(1, [], waiting, 1) == [1]
    assert swaps([Standing(50, hold=HOLD)], [Standing(1)], 1) == []


@given(STANDINGS.filter(len), STANDINGS)
def test_only_for_a_few_rows_or_a_higher_priority_is_anybody_taken_aside(
    seated: list[Standing], waiting: list[Standing]
) -> None:
    """Never one that is done in a moment, never twice, never for a lower priority."""
    pairs = swaps(seated, waiting, len(seated))

    assert len({victim for victim, _ in pairs}) == len({comer for _, comer in pairs}) == len(pairs)
    for victim, comer in pairs:
        assert not seated[victim].few
        assert not seated[victim].hold
        assert waiting[comer].priority >= seated[victim].priority
        assert waiting[comer].few or waiting[comer].priority > seated[victim].priority
        assert seating.urgent(waiting[comer], seated)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 99)), max_size=9), st.integers(0, 20))
def test_free_slots_read_further_rows_of_the_longest(users: list[tuple[int, int]], free: int) -> None:
    """As many as there are, none beyond what could be read."""
    pending, left = [pending for pending, _ in users], [left for _, left in users]

    lent = lanes(pending, left, free)

    assert sum(lent) == min(free, sum(max(0, count - 1) for count in pending))
    assert all(0 <= more <= max(0, count - 1) for more, count in zip(lent, pending, strict=True))


@given(st.lists(st.integers(1, 40), max_size=60))
def test_rows_packed_densely_hold_every_example_once(lengths: list[int]) -> None:
    """None too full, and no two that would have gone into one."""
    rows = densely(lengths, 40)

    fill = [sum(lengths[index] for index in row) for row in rows]
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(total <= 40 for total in fill)
    assert len(fill) < 2 or sum(sorted(fill)[:2]) > 40


@given(st.lists(st.tuples(st.lists(st.integers(1, 9), max_size=4), st.integers(0, 4), st.integers(0, 4)), max_size=40))
def test_learning_and_examinations_take_turns(moments: list[tuple[list[int], int, int]]) -> None:
    """Nobody waits for ever for either; one that fills all slots goes at once, and nobody is examined where none is."""
    rota, slots, examined, waited = Rota(), 8, 0, 0
    for pending, learners, empty in moments:
        examines = rota.examines(pending, learners, slots)
        if not examines:
            rota.note_empty(empty)

        assert examines or learners
        assert not examines or pending or not learners
        assert examines or sum(pending) < slots or examined >= EXAMINED
        assert not (examines and learners) or examined < EXAMINED
        assert examines or not pending or waited < GATHERED
        examined = examined + 1 if examines else 0
        waited = waited + 1 if pending and not examines else 0
