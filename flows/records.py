"""What the registry's rows say of a version in the training core's words: by that its files are judged."""

from collections.abc import Mapping

from lora_core.halving import trials
from lora_core.methods import AnyMethod
from lora_core.recipe import make_recipe


def recorded_methods(recipe: Mapping[str, object]) -> list[AnyMethod]:
    """The settings that a recipe on record can have trained with; of a search those of each trial."""
    return [one.method for one in trials(make_recipe(recipe))]
