"""Every method, by the name that recipes give it."""

from collections.abc import Mapping, Sequence

from lora_core.banks.bank import Bank, Method
from lora_core.banks.bottleneck_files import BOTTLENECK
from lora_core.banks.lora_files import LORA
from lora_core.banks.prefix import PREFIX
from lora_core.banks.prompt import PROMPT
from lora_core.base_model import BaseModel
from lora_core.errors import TrainingError
from lora_core.methods import AnyMethod

METHODS: Mapping[str, Method] = {
    "lora": LORA,
    "prompt_tuning": PROMPT,
    "prefix_tuning": PREFIX,
    "bottleneck": BOTTLENECK,
}


def make_bank(base: BaseModel, specs: Sequence[AnyMethod], size: int = 0) -> Bank:
    """The bank that holds every one of these users, at least of a size.  Raises TrainingError for unlike methods."""
    names = sorted({spec.name for spec in specs})
    if len(names) > 1:
        raise TrainingError(base.name, f"{' and '.join(names)} cannot share a cohort", "train them apart")
    return METHODS[names[0]].make(base, specs, size)


def banks_for(base: BaseModel, specs: Sequence[AnyMethod]) -> list[tuple[Bank, list[int]]]:
    """Banks that together hold adapters of any methods, each with the numbers of those in it."""
    numbers: dict[str, list[int]] = {}
    for number, spec in enumerate(specs):
        numbers.setdefault(spec.name, []).append(number)
    return [(make_bank(base, [specs[number] for number in mine]), mine) for mine in numbers.values()]
