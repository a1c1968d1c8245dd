"""What can go wrong in the training core.

LoraError
├── DataError
│   ├── BadRow            one row of a dataset cannot be used
│   ├── DatasetRefused    a dataset cannot be used at all
│   └── TemplateRefused   the base's chat template takes no such conversation
├── RecipeError           a recipe is not valid
├── BaseModelError        a base cannot be loaded or adapted
│   ├── BaseChanged       it is another one than it was
│   └── BaseUnfit         users cannot share it, on whatever machine
├── DeviceMissing         a device is not in this machine
├── MemoryTooSmall        not even one slot fits into a device's memory
├── ArtifactRefused       adapter files are hostile, broken or of another base
├── PromptRefused         a prompt is empty, leaves no room for an answer, or has a token that the base does not know
├── ExportRefused         an adapter has no place in another engine's files
└── TrainingError         a user's training cannot start or go on

Facts are in `args`, prose is in `__str__`: an error survives pickling between processes.
"""


class LoraError(Exception):
    """Everything the training core raises on purpose."""


class DataError(LoraError):
    """Something is wrong with a dataset."""


class BadRow(DataError):
    """One row cannot be used: which field, why, and how to mend it."""

    def __init__(self, field: str, why: str, fix: str) -> None:
        super().__init__(field, why, fix)
        self.field, self.why, self.fix = field, why, fix

    def __str__(self) -> str:
        return "{}: {}; {}".format(*self.args)


class DatasetRefused(DataError):
    """A dataset cannot be used at all: where, why, and what to do."""

    def __init__(self, source: str, why: str, fix: str) -> None:
        super().__init__(source, why, fix)

    def __str__(self) -> str:
        return "{}: {}; {}".format(*self.args)


class TemplateRefused(DataError):
    """The base's chat template takes no such conversation: why, in its own words."""

    def __init__(self, why: str) -> None:
        super().__init__(why)

    def __str__(self) -> str:
        return "the base's chat template refuses the conversation: {}; change its turns or choose another base".format(
            *self.args
        )


class RecipeError(LoraError):
    """A recipe is not valid: which key, what it held, and what it may hold."""

    def __init__(self, where: str, problems: tuple[str, ...]) -> None:
        super().__init__(where, problems)

    def __str__(self) -> str:
        where, problems = self.args
        return f"{where}: " + "; ".join(problems)


class BaseModelError(LoraError):
    """A base cannot be loaded or adapted: which, why, and what to do."""

    def __init__(self, base: str, why: str, fix: str) -> None:
        super().__init__(base, why, fix)

    def __str__(self) -> str:
        return "base {}: {}; {}".format(*self.args)


class BaseChanged(BaseModelError):
    """The base in that place is another one than it was."""


class BaseUnfit(BaseModelError):
    """Users cannot share a base of that kind, on whatever machine."""


class DeviceMissing(LoraError):
    """There is no such device here: which, and what torch says of it."""

    def __init__(self, device: str, why: str) -> None:
        super().__init__(device, why)

    def __str__(self) -> str:
        return "device {!r} is not here: {}; set LORA_DEVICE to cpu, cuda, cuda:1 or auto, or unset it".format(
            *self.args
        )


class MemoryTooSmall(LoraError):
    """Not even one slot fits: bytes it needs, bytes there are, tokens a row (0: the base alone is too large).

    `fewer` says what it would need, were the base kept in fewer bits.
    """

    def __init__(self, needed: int, budget: int, row_tokens: int, fewer: tuple[tuple[str, int], ...] = ()) -> None:
        super().__init__(needed, budget, row_tokens, fewer)
        self.row_tokens = row_tokens

    def __str__(self) -> str:
        needed, budget, row_tokens, _ = self.args
        who, lower = "the base alone", "take a smaller base"
        if row_tokens:
            who, lower = f"one user at {row_tokens} tokens a row", "lower row_tokens or rank"
        return (
            f"{who} needs {needed / 2**20:,.1f} MiB of memory and there are {budget / 2**20:,.1f}; {self._fewer_bits()}"
            f"{lower}, raise --memory or LORA_MEMORY, or take a larger device"
        )

    def _fewer_bits(self) -> str:
        _, budget, _, fewer = self.args
        fitting = [(bits, needed) for bits, needed in fewer if needed <= budget]
        if fitting:
            bits, needed = fitting[0]
            return (
                f"in {bits} it would need about {needed / 2**20:,.1f} (LORA_QUANTISE={bits}, another base to every "
                "adapter); else "
            )
        return "".join(f"{bits} would still need {needed / 2**20:,.1f}; " for bits, needed in fewer[-1:])


class ArtifactRefused(LoraError):
    """Adapter files are hostile, broken or of another base: which file, why, and what to do."""

    def __init__(self, file: str, why: str, fix: str) -> None:
        super().__init__(file, why, fix)

    def __str__(self) -> str:
        return "{} refused: {}; {}".format(*self.args)


class PromptRefused(LoraError):
    """A prompt cannot be answered: how many tokens it has, and how many the base takes with the answer.

    Or which token the base's tokenizer makes of it, and the base does not know.
    """

    def __init__(self, tokens: int, longest: int, strange: int | None = None) -> None:
        super().__init__(tokens, longest, strange)

    def __str__(self) -> str:
        tokens, longest, strange = self.args
        if strange is not None:
            return f"the prompt has token {strange}, which the base has no embedding for; leave that word out"
        if not tokens:
            return "the prompt has no tokens; say something"
        return f"the prompt has {tokens:,} tokens and the base takes {longest:,} with the answer; shorten it"


class ExportRefused(LoraError):
    """An adapter has no place in another engine's files: which, why, and what to do."""

    def __init__(self, what: str, why: str, fix: str) -> None:
        super().__init__(what, why, fix)

    def __str__(self) -> str:
        return "{} cannot be exported: {}; {}".format(*self.args)


class TrainingError(LoraError):
    """A user's training cannot start or go on: whose, why, and what to do."""

    def __init__(self, user: str, why: str, fix: str) -> None:
        super().__init__(user, why, fix)

    def __str__(self) -> str:
        return "{}: {}; {}".format(*self.args)
