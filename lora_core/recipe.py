"""What decides a result besides data and base: frozen, validated, and readable in Hugging Face's spellings.

Defaults follow Schulman et al., "LoRA Without Regret" (Thinking Machines, 2025): every linear layer, alpha 32 whatever
the rank, a rate about ten times that of full fine-tuning (2e-4 where 2e-5 is usual), small batches.
Betas and epsilon are AdamW's.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeGuard, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from lora_core.errors import RecipeError
from lora_core.methods import AnyMethod, Frozen, LoraSpec
from lora_core.objectives import ObjectiveSpec
from lora_core.search import SearchSpec


class HoldoutSpec(Frozen):
    """Which examples are kept from training to judge the result."""

    share: Annotated[float, Field(gt=0, le=0.5)] = 0.1
    by: Literal["content", "order"] = "content"  # order: the last ones, for data in order of time
    minimum: Annotated[int, Field(ge=1, le=1000)] = 8


class GateSpec(Frozen):
    """The rule that decides whether a candidate is accepted."""

    significance: Annotated[float, Field(gt=0, le=1)] = 0.05  # one-sided, paired by held-out example
    min_gain: Annotated[float, Field(ge=0, le=10)] = 0.0  # nats a token, or a pair


class Recipe(Frozen):
    """Everything that decides the result besides data and base."""

    method: AnyMethod = LoraSpec()
    objective: ObjectiveSpec = ObjectiveSpec()
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05  # share of all steps
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    epsilon: Annotated[float, Field(gt=0, le=1)] = 1e-8
    clip: Annotated[float, Field(gt=0)] = 1.0  # largest norm of a user's own gradient
    epochs: Annotated[int, Field(ge=1, le=1000)] = 3
    max_steps: Annotated[int, Field(ge=1)] | None = None  # stops earlier than the epochs would
    max_tokens: Annotated[int, Field(ge=1)] | None = None  # at most this many distinct training tokens of a user
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 8  # examples an optimiser step
    batch_rows: Annotated[int, Field(ge=1, le=4096)] | None = None  # instead: full rows a step, the data packed once
    max_length: Annotated[int, Field(ge=8, le=131072)] = 512  # tokens an example; longer ones are cut
    row_tokens: Annotated[int, Field(ge=8, le=131072)] = 512  # T: tokens a slot reads in one micro-step
    patience: Annotated[int, Field(ge=1)] | None = 2  # epochs without a better held-out loss; None never stops early
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    holdout: HoldoutSpec = HoldoutSpec()
    gate: GateSpec = GateSpec()
    search: SearchSpec | None = None  # several trials instead of one; the best is kept, and is a plain recipe

    @model_validator(mode="after")
    def _examples_fit_a_row(self) -> "Recipe":
        if self.max_length > self.row_tokens:
            raise ValueError(
                f"max_length {self.max_length} is above row_tokens {self.row_tokens}: an example must fit a row"
            )
        return self

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON: equal recipes have equal digests, however they were spelt."""
        # Recipes were digested before there were objectives and searches: without, the digest is what it was.
        later = {"objective": self.objective == ObjectiveSpec(), "search": self.search is None}
        settings = self.model_dump(mode="json", exclude={name for name, absent in later.items() if absent})
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


# How PEFT's LoraConfig and transformers' TrainingArguments, and people in a hurry, spell our keys.
SPELLINGS: Mapping[str, str] = {
    "r": "method.rank", "lora_r": "method.rank", "rank": "method.rank",
    "lora_alpha": "method.alpha", "alpha": "method.alpha",
    "lora_dropout": "method.dropout", "dropout": "method.dropout",
    "target_modules": "method.targets", "targets": "method.targets",
    "layers_to_transform": "method.layers", "layers": "method.layers",
    "use_rslora": "method.use_rslora", "loraplus_lr_ratio": "method.loraplus_lr_ratio",
    "init_lora_weights": "method.init_lora_weights",
    "rank_pattern": "method.rank_pattern", "alpha_pattern": "method.alpha_pattern",
    "peft_type": "method.name", "method": "method.name",
    "num_virtual_tokens": "method.virtual_tokens", "virtual_tokens": "method.virtual_tokens",
    "prompt_tuning_init": "method.start", "start": "method.start",
    "prompt_tuning_init_text": "method.start_text", "start_text": "method.start_text",
    "prefix_projection": "method.projection", "projection": "method.projection",
    "encoder_hidden_size": "method.projection_width", "projection_width": "method.projection_width",
    "width": "method.width", "bottleneck_size": "method.width",
    "reduction_factor": "method.reduction", "reduction": "method.reduction", "placement": "method.placement",
    "non_linearity": "method.activation", "activation": "method.activation", "biases": "method.biases",
    "objective": "objective.name", "rl": "objective.name", "beta": "objective.beta", "pref_beta": "objective.beta",
    "rl_beta": "objective.beta", "label_smoothing": "objective.label_smoothing",
    "lr": "learning_rate", "lr_scheduler_type": "schedule", "warmup_ratio": "warmup",
    "adam_beta1": "beta1", "adam_beta2": "beta2", "adam_epsilon": "epsilon", "max_grad_norm": "clip",
    "num_train_epochs": "epochs", "num_epochs": "epochs",
    "per_device_train_batch_size": "batch_size", "micro_batch_size": "batch_size",
    "max_seq_length": "max_length", "cutoff_len": "max_length", "sequence_len": "max_length",
    "val_set_size": "holdout.share", "early_stopping_patience": "patience",
}  # fmt: skip
GROUPS = ("method", "objective", "holdout", "gate", "search")  # keys with keys of their own below them
# PEFT keys that mean nothing else here than the one value we always have.
IMPLIED: Mapping[str, object] = {"bias": "none", "task_type": "CAUSAL_LM"}
# PyYAML's constructors raise whatever Python does for values such as 2026-99-99, `!!int ""` or `!!timestamp x`.
_NOT_YAML = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
_MOST_BYTES = 1 << 16  # of a recipe's file
_SCIENTIFIC = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")  # YAML 1.1 reads 1e-4 as text


def load_recipe(source: str | Path | Mapping[str, object] | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a YAML file, settings or the defaults, with `key=value` overrides on top.  Raises RecipeError."""
    where, given = "recipe", dict[str, object]()
    if isinstance(source, Mapping):
        given = dict(source)
    elif source:
        where, given = str(source), _read_yaml(Path(source))
    try:
        changes = _overrides(overrides, where)
        if changes.get("search", given) is None:
            given = {key: value for key, value in given.items() if str(key).partition(".")[0] != "search"}
        return make_recipe({**_spelled(given, where), **_spelled(changes, where)}, where)
    except RecursionError:
        raise RecipeError(where, ("a value holds itself (& and *); write it out",)) from None


def make_recipe(settings: Mapping[str, object], where: str = "recipe") -> Recipe:
    """A recipe from settings in any accepted spelling, dotted or nested.  Raises RecipeError."""
    tree: dict[str, object] = {"method": {"name": "lora"}}
    for dotted, value in _spelled(settings, where).items():
        head, _, tail = dotted.rpartition(".")
        branch = tree.setdefault(head, {}) if head else tree
        assert isinstance(branch, dict)  # only keys of GROUPS have leaves below them
        branch[tail] = value
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(where, tuple(_problem(detail) for detail in error.errors())) from None


def _read_yaml(path: Path) -> dict[str, object]:
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise RecipeError(str(path), (f"has more than {_MOST_BYTES:,} bytes; is it a recipe?",))
        loaded = _plain_yaml(content.decode())
    except OSError as error:
        raise RecipeError(str(path), (f"cannot be read ({error.strerror}); check the path",)) from None
    except _NOT_YAML as error:
        raise RecipeError(str(path), (f"is not YAML: {str(error).splitlines()[0]}; mend that line",)) from None
    if not isinstance(loaded, dict | None):
        raise RecipeError(str(path), (f"holds a {type(loaded).__name__}; write `key: value` lines",))
    return loaded or {}


def _plain_yaml(text: str) -> object:
    """YAML without `*`, by which a few lines can stand for a value without end.  Raises what PyYAML does."""
    if "*" in text and any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
        raise RecursionError("a value holds itself or another (& and *); write it out")
    return yaml.safe_load(text)


def _overrides(pairs: Sequence[str], where: str) -> dict[str, object]:
    """`key=value` words as settings; the value is read as YAML would."""
    settings: dict[str, object] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.strip():
            raise RecipeError(where, (f"override {pair!r} is not key=value; write for example rank=8",))
        try:
            settings[key.strip()] = _plain_yaml(text)
        except _NOT_YAML:
            raise RecipeError(where, (f"override {pair!r}: the value is not YAML; quote it",)) from None
    return settings


def _spelled(settings: Mapping[str, object], where: str) -> dict[str, object]:
    """Settings as dotted leaves under our own names; an unknown key raises with the nearest known one."""
    flat: dict[str, object] = {}
    for key, value in _leaves(settings):
        if key in IMPLIED and value == IMPLIED[key]:
            continue
        name = SPELLINGS.get(key, key)
        if name not in LEAVES:
            raise RecipeError(where, (_unknown(key),))
        if name in flat and flat[name] != value:
            raise RecipeError(where, (f"{name} is given twice ({flat[name]!r}, {value!r}); keep one",))
        flat[name] = _value(name, value)
    return flat


def _leaves(settings: Mapping[str, object], head: str = "") -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for key, value in settings.items():
        if key == "search" and value is None:
            continue
        if isinstance(value, Mapping) and not head and str(key) in GROUPS and (value or key != "search"):
            found += _leaves(value, f"{key}.")
        else:
            found.append((f"{head}{key}", value))
    return found


def _value(name: str, value: object) -> object:
    if name in ("method.name", "method.start", "objective.name") and isinstance(value, str):
        return value.lower()
    if name in ("method.targets", "method.layers") and isinstance(value, str | int) and value != "all-linear":
        return tuple(str(value).split(","))
    if name.startswith("search.") and isinstance(value, list):
        return [_value("", inner) for inner in value]
    return float(value) if isinstance(value, str) and _SCIENTIFIC.fullmatch(value) else value


def _unknown(key: str) -> str:
    if key in IMPLIED:
        return f"{key} can only be {IMPLIED[key]!r}; leave it out"
    near = difflib.get_close_matches(key, [*LEAVES, *SPELLINGS], n=1)
    hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(sorted(LEAVES))}"
    return f"{key} is not a key of a recipe; {hint}"


def _problem(detail: Mapping[str, object]) -> str:
    location = detail["loc"]
    assert isinstance(location, tuple)  # pydantic's error details
    if location[:1] == ("method",) and len(location) > 1:  # then the name of the method, which is no key
        if detail["type"] == "extra_forbidden":
            return f"method.{location[-1]} = {detail['input']!r}: {location[1]} has no such setting; leave it out"
        location = ("method", *location[2:])
    key, words = ".".join(map(str, location)), str(detail["msg"]).removeprefix("Value error, ")  # pydantic's word
    return f"{key} = {repr(detail['input'])[:200]}: {words}" if location else words


def _model_leaves(model: type[BaseModel], head: str = "") -> list[str]:
    names: list[str] = []
    for name, field in model.model_fields.items():
        inner = [one for one in (field.annotation, *get_args(field.annotation)) if _is_model(one)]
        names += [leaf for one in inner for leaf in _model_leaves(one, f"{name}.")] or [head + name]
    return names


def _is_model(annotation: object) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


LEAVES = frozenset(_model_leaves(Recipe)) | {"search"}
