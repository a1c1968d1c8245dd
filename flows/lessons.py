"""A user's examples as a base reads them: those to learn from, those to judge by, and what became of the others."""

from collections.abc import Container, Iterable
from dataclasses import dataclass

from lora_core.base_model import BaseModel
from lora_core.data.examples import Example
from lora_core.data.rendering import AnyRendered, render
from lora_core.data.splits import newest, split
from lora_core.errors import TemplateRefused, TrainingError
from lora_core.recipe import Recipe


@dataclass(frozen=True)
class Lessons:
    """Both halves, and the examples to judge by as the user wrote them."""

    learned: tuple[AnyRendered, ...]
    judged: tuple[AnyRendered, ...]
    held_out: tuple[Example, ...]
    cut: int  # examples that were longer than max_length
    dropped: int  # examples of which nothing came, or what is judged by already


# What to do against losses.
SHORTER = "raise max_length, and row_tokens with it, or shorten what comes before the answers"
OTHER_TURNS = "change their turns or choose another base"
OTHER_WORDS = "leave those words out, or take a base whose tokenizer fits it"


def read_lessons(label: str, examples: tuple[Example, ...], recipe: Recipe, base: BaseModel) -> Lessons:
    """Split and render one user's examples.  Raises TrainingError where nothing is left to learn or to judge by."""
    halves = split(examples, recipe.holdout.share, recipe.holdout.by, recipe.holdout.minimum)
    reader = _Reader(base, max(0, min(recipe.max_length, base.room(recipe.method.positions))))
    judged = reader.read(halves.held_out)
    learned = reader.read(halves.train, {rendered.tokens for rendered in judged})
    if not learned or not judged:
        why = f"{len(learned)} examples to learn from and {len(judged)} to judge by"
        raise TrainingError(label, ", ".join([why, *reader.losses]), reader.fix)
    kept = newest(learned, recipe.max_tokens)
    if not kept:
        why = f"max_tokens {recipe.max_tokens} is less than the last example has, {len(learned[-1].tokens)}"
        raise TrainingError(label, why, "raise it")
    cut = sum(rendered.truncated for rendered in (*learned, *judged))
    return Lessons(kept, judged, halves.held_out, cut, len(examples) - len(learned) - len(judged))


class _Reader:
    """What renders examples, and remembers of which nothing came."""

    def __init__(self, base: BaseModel, longest: int) -> None:
        self._base, self._longest = base, longest
        self._refused: list[str] = []
        self._strange: list[str] = []  # tokens that the base does not know, one an example
        self._nothing = self._known = 0

    def read(self, examples: Iterable[Example], known: Container[tuple[int, ...]] = ()) -> tuple[AnyRendered, ...]:
        """Those of which something came that is not known by its tokens, in their order."""
        rendered = [rendered for example in examples if (rendered := self._one(example))]
        found = tuple(one for one in rendered if one.tokens not in known)
        self._known += len(rendered) - len(found)
        return found

    def _one(self, example: Example) -> AnyRendered | None:
        try:
            rendered = render(example, self._base.tokenizer, self._longest)
        except TemplateRefused as refusal:  # that one teaches nothing
            self._refused.append(str(refusal.args[0]))
            return None
        if rendered and (last := max(rendered.tokens)) >= self._base.words:
            self._strange.append(str(self._base.tokenizer.convert_ids_to_tokens(last)))
            return None
        self._nothing += rendered is None
        return rendered

    @property
    def losses(self) -> list[str]:
        """How many were lost for what reason."""
        found = []
        if self._nothing:
            found.append(f"{self._nothing} have nothing to learn in their first {self._longest} tokens")
        if self._refused:
            found.append(f"{len(self._refused)} are refused by the base's chat template ({self._refused[0]})")
        if self._strange:
            found.append(f"{len(self._strange)} have tokens that the base has no embedding for ({self._strange[0]})")
        if self._known:
            found.append(f"{self._known} are read like one to judge by in their first {self._longest} tokens")
        return found

    @property
    def fix(self) -> str:
        """What to do against most of the losses."""
        if not self.losses:
            return "add examples"
        lost = {
            SHORTER: self._nothing + self._known, OTHER_TURNS: len(self._refused), OTHER_WORDS: len(self._strange),
        }  # fmt: skip
        return max(lost, key=lambda fix: lost[fix])
