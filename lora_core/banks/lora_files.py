"""LoRA's files, in PEFT's layout, and its row in the table of methods."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from lora_core.banks.bank import Facts, Method, Shapes
from lora_core.banks.lora import PREFIX, LoraBank, adapts, lora_bank
from lora_core.base_model import BaseModel
from lora_core.errors import ArtifactRefused
from lora_core.methods import MOST_ALPHA, MOST_KEYS, MOST_RANK, LoraSpec

CONFIG = "adapter_config.json"
# PEFT's keys that change what tensors mean, and the values under which they mean what they mean here.
_PLAIN: Mapping[str, tuple[object, ...]] = {
    "bias": ("none",), "use_dora": (False, None), "modules_to_save": (None, []),
    "lora_bias": (False, None), "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None, []),  # from which on, and not before, the delta counts
    "layer_replication": (None, []),  # the base's layers, some of them several times
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # the others change the base
}  # fmt: skip


def _make(base: BaseModel, specs: Sequence[LoraSpec], size: int) -> LoraBank:
    bank = lora_bank(base, specs)
    return replace(bank, rank=max(bank.rank, size))


def _config(base: BaseModel, spec: LoraSpec, tensors: Mapping[str, Tensor]) -> Facts:
    """PEFT's LoraConfig as it saves it; of a PiSSA start, as it converts it to LoRA: twice the rank, the same scale."""
    rows = 1 if spec.init_lora_weights is True else 2
    times = rows**0.5 if spec.use_rslora else rows
    return {
        "r": rows * spec.rank,
        "lora_alpha": _number(times * spec.alpha),
        **_patterns(spec, sorted(_modules(tensors)), times),
        "lora_dropout": spec.dropout,
        "use_rslora": spec.use_rslora,
        "target_modules": _targets(base, tensors),
        "fan_in_fan_out": base.transposed,
        "bias": "none",
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _number(alpha: float) -> int | float:
    return int(alpha) if alpha.is_integer() else alpha


def _patterns(spec: LoraSpec, modules: Sequence[str], times: float) -> Facts:
    """Ranks and alphas by the whole paths of the linears that have their own: then no order of keys matters."""
    ranks = {path: spec.rows_at(path) for path in modules if spec.rank_at(path) != spec.rank}
    alphas = {path: times * spec.alpha_at(path) for path in modules if spec.alpha_at(path) != spec.alpha}
    if not spec.patterned:
        return {}
    return {"rank_pattern": ranks, "alpha_pattern": {path: _number(alpha) for path, alpha in alphas.items()}}


def _modules(tensors: Mapping[str, Tensor]) -> set[str]:
    """Full paths of the adapted linears."""
    return {name.split(".lora_")[0].removeprefix(PREFIX) for name in tensors}


def _targets(base: BaseModel, tensors: Mapping[str, Tensor]) -> list[str]:
    """The last parts of the modules' paths where they name exactly these modules, else the whole paths.

    Of all that the base has, layers too: PEFT would adapt, or choke on, whatever else is called so.
    """
    modules = _modules(tensors)
    ends = {module.rpartition(".")[2] for module in modules}
    named = {path for path, _ in base.model.named_modules() if path.rpartition(".")[2] in ends}
    return sorted(ends if named == modules else modules)


def _read_config(config: Facts) -> LoraSpec:
    """Rank and scale; which linears, the tensors tell."""
    for key, allowed in _PLAIN.items():
        if key in config and config[key] not in allowed:
            raise ArtifactRefused(CONFIG, f"{key} is {ascii(config[key])[:40]}", "train plain LoRA without it")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank <= MOST_RANK:
        raise ArtifactRefused(CONFIG, f"r is {ascii(rank)[:40]}, not 1 to {MOST_RANK}", "use a lower rank")
    # NaN is not above 0, and an integer of 400 digits is compared before it is a float.
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha <= MOST_ALPHA:
        raise ArtifactRefused(
            CONFIG, f"lora_alpha is {ascii(alpha)[:40]}", f"give a number above 0, up to {MOST_ALPHA}"
        )
    try:
        patterns = {key: _in_order(config.get(key)) for key in ("rank_pattern", "alpha_pattern")}
        return LoraSpec.model_validate(
            {"rank": rank, "alpha": float(alpha), "use_rslora": config.get("use_rslora") is True, **patterns}
        )
    except ValueError:  # pydantic's own is one
        raise ArtifactRefused(
            CONFIG, "rank_pattern or alpha_pattern is not of ends of paths", f"give ranks to {MOST_RANK} by plain names"
        ) from None


def _in_order(pattern: object) -> Mapping[str, object]:
    """A pattern as PEFT reads its files, where the first key that fits decides: without the keys that never do."""
    if pattern is None:
        return {}
    if not isinstance(pattern, Mapping) or len(pattern) > MOST_KEYS:
        raise ValueError
    kept: dict[str, object] = {}
    for key, value in pattern.items():
        if type(value) not in (int, float):
            raise ValueError
        if not any(key.endswith(f".{earlier}") for earlier in kept):
            kept[key] = value
    return kept


def _layout(base: BaseModel, spec: LoraSpec) -> list[Shapes]:
    """A pair of tensors for each linear."""
    return [
        {
            f"{PREFIX}{site.name}.lora_A.weight": [spec.rows_at(site.name), site.inputs],
            f"{PREFIX}{site.name}.lora_B.weight": [site.outputs, spec.rows_at(site.name)],
        }
        for site in base.sites
        if adapts(spec, site)
    ]


def _sentence(spec: LoraSpec, tensors: Mapping[str, Tensor]) -> str:
    return f"A LoRA of rank {spec.row_rank} on {len(_modules(tensors))} linear layers."


LORA = Method("LORA", _make, _config, _read_config, _layout, _sentence)
