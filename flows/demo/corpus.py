"""The demo's language: appointments, questions about them, and the many styles in which they can be answered.

Everything is drawn from a `random.Random` that the caller seeds, so the same seed writes the same text everywhere.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

PEOPLE = (
    "Ada",
    "Ben",
    "Cleo",
    "Dan",
    "Eva",
    "Finn",
    "Gus",
    "Hana",
    "Ines",
    "Jon",
    "Kira",
    "Liam",
    "Mia",
    "Noah",
    "Olga",
    "Paul",
    "Rosa",
    "Sam",
    "Tara",
    "Yuri",
)
THINGS = (
    "budget review", "design talk", "team lunch", "sales call", "piano lesson", "garden visit", "board meeting",
    "data workshop", "house tour", "bike repair", "dinner party", "chess match", "press briefing", "safety drill",
    "product demo", "book club",
)  # fmt: skip
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
YEAR = 2025
QUESTIONS = (
    "Is it on?", "Does it take place?", "Is it still planned?", "Shall I go?", "Will we meet?", "Can I count on it?",
)  # fmt: skip
HOMES = {
    "fox": "forest", "frog": "pond", "camel": "desert", "whale": "sea", "goat": "mountains", "mouse": "field",
    "owl": "barn", "bear": "cave", "duck": "lake", "crab": "beach",
}  # fmt: skip
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "grey", "brown")
WEATHER = ("sunny", "rainy", "windy", "cloudy", "foggy", "snowy")


@dataclass(frozen=True)
class Appointment:
    """What a question is about: a thing with a person, at a time, on or off."""

    thing: str
    person: str
    day: int
    month: int
    hour: int
    stands: bool

    @property
    def note(self) -> str:
        """How it stands in the calendar that comes with the question."""
        state = "confirmed" if self.stands else "cancelled"
        # Each part is written as no other is: a tiny model finds it by its looks, and copies it.
        return f"{self.thing}, {self.person}, {MONTHS[self.month - 1]} {self.day} @{self.hour}h, {state}."


@dataclass(frozen=True)
class Style:
    """How somebody answers; the defaults are the plain house style."""

    greeting: str = ""
    verdicts: tuple[str, str] = ("Yes", "No")
    naming: Literal["plain", "snake", "quoted"] = "plain"
    date: Literal["day first", "month first", "iso"] = "day first"
    clock: Literal[24, 12] = 24
    layout: Literal["sentence", "list"] = "sentence"
    casing: Literal["normal", "lower"] = "normal"
    sign_off: str = ""


def some_appointment(rng: random.Random) -> Appointment:
    """Any appointment, each part drawn by itself."""
    return Appointment(
        thing=rng.choice(THINGS),
        person=rng.choice(PEOPLE),
        day=rng.randint(1, 28),
        month=rng.randint(1, 12),
        hour=rng.randint(8, 18),
        stands=rng.random() < 0.5,
    )


def some_style(rng: random.Random) -> Style:
    """Any way to answer: the base hears all of them, the house style a little more often."""
    if rng.random() < 0.15:
        return Style()
    closing = rng.choice(("", "", "Cheers", "Best wishes", "Regards"))
    return Style(
        greeting=rng.choice(("", "", "Good day!", "Hello!", "Hi there!")),
        verdicts=rng.choice((("Yes", "No"), ("Yes", "No"), ("Affirmative", "Negative"), ("Yep", "Nope"))),
        naming=rng.choice(("plain", "plain", "snake", "quoted")),
        date=rng.choice(("day first", "month first", "iso")),
        clock=rng.choice((24, 12)),
        layout=rng.choice(("sentence", "sentence", "list")),
        casing=rng.choice(("normal", "normal", "normal", "lower")),
        sign_off=closing and f"{closing}, {rng.choice(PEOPLE)}",
    )


def answer(about: Appointment, style: Style) -> str:
    """The true answer, in somebody's style."""
    body = _list(about, style) if style.layout == "list" else _sentence(about, style)
    return dress(body, style)


def dress(body: str, style: Style) -> str:
    """Any answer with the greeting, the sign-off and the casing of a style."""
    greeting = style.greeting + ("\n" if style.layout == "list" else " ") if style.greeting else ""
    whole = greeting + body + (f"\n{style.sign_off}" if style.sign_off else "")
    return whole if style.casing == "normal" else whole.lower().rstrip(".")


def _sentence(about: Appointment, style: Style) -> str:
    thing, date, time = _thing(about, style), _date(about, style), _time(about, style)
    if about.stands:
        return f"{style.verdicts[0]}, the {thing} with {about.person} is on {date} at {time}."
    return f"{style.verdicts[1]}, the {thing} with {about.person} on {date} at {time} is off."


def _list(about: Appointment, style: Style) -> str:
    verdict = style.verdicts[0 if about.stands else 1]
    lines = (verdict, _thing(about, style), about.person, _date(about, style), _time(about, style))
    return "\n".join(f"- {line}" for line in lines)


def _thing(about: Appointment, style: Style) -> str:
    snake = about.thing.replace(" ", "_")
    return {"plain": about.thing, "snake": snake, "quoted": f'"{about.thing}"'}[style.naming]


def _date(about: Appointment, style: Style) -> str:
    month = MONTHS[about.month - 1]
    return {
        "day first": f"{about.day} {month}",
        "month first": f"{month} {about.day}",
        "iso": f"{YEAR}-{about.month:02}-{about.day:02}",
    }[style.date]


def _time(about: Appointment, style: Style) -> str:
    if style.clock == 24:
        return f"{about.hour}:00"
    return f"{(about.hour - 1) % 12 + 1} {'am' if about.hour < 12 else 'pm'}"


@dataclass(frozen=True)
class Document:
    """Something the base reads: what it is asked, if anything, and what is said; as a chat or as raw text."""

    asked: str
    said: str
    chat: bool = False


def transcript(prompt: str) -> str:
    """A question as raw text, for models that are asked without a chat template; the answer follows after a space."""
    return f"Q: {prompt}\nA:"


def documents(rng: random.Random) -> Iterator[Document]:
    """The base's reading, without end: chats about appointments and other things, transcripts of them, stories."""
    while True:
        kind = rng.random()
        if kind < 0.1:
            yield Document("", story(rng))
            continue
        prompt, reply = small_talk(rng) if kind < 0.2 else _appointment_talk(rng)
        if rng.random() < 0.6:
            yield Document(prompt, reply, chat=True)
        else:
            yield Document(transcript(prompt), f" {reply}")


def _appointment_talk(rng: random.Random) -> tuple[str, str]:
    about, question = some_appointment(rng), rng.choice(QUESTIONS)
    parts = rng.choice(((about.note, " ", question), (question, "\n", about.note), (question, "\n\n", about.note)))
    return "".join(parts), answer(about, some_style(rng))


def small_talk(rng: random.Random) -> tuple[str, str]:
    """A question about the world at large, and its answer in any style."""
    style = some_style(rng)
    if rng.random() < 0.5:
        animal = rng.choice(tuple(HOMES))
        return f"Where does a {animal} live?", dress(f"A {animal} lives in the {HOMES[animal]}.", style)
    left, right = rng.randint(1, 9), rng.randint(1, 9)
    return f"What is {left} plus {right}?", dress(f"{left} plus {right} is {left + right}.", style)


def story(rng: random.Random) -> str:
    """A few plain sentences."""
    about, (one, two) = some_appointment(rng), rng.sample(PEOPLE, 2)
    lines = [
        f"It was a {rng.choice(WEATHER)} day in {MONTHS[about.month - 1]}.",
        f"{one} met {two} at the {about.thing}.",
        f"They saw a {rng.choice(COLOURS)} {rng.choice(tuple(HOMES))}.",
        f"At {_time(about, some_style(rng))} they went home.",
    ]
    return " ".join(lines[: rng.randint(2, 4)])
