"""LoRA's files, in PEFT's layout, and its row in the table of methods."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from lora_core.banks.bank import Facts, Method, Shapes
from lora_core.banks.lora import PREFIX, LoraBank, adapts, lora_bank
from lora_core.base_model import BaseModel
from lora_core.errors import ArtifactRefused
from lora_core.methods import MOST_ALPHA, MOST_RANK, LoraSpec

CONFIG = "adapter_config.json"
# PEFT's keys that change what tensors mean, and the values under which they mean what they mean here.
_PLAIN: Mapping[str, tuple[object, ...]] = {
    "bias": ("none",), "use_dora": (False, None), "modules_to_save": (None, []), "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}), "lora_bias": (False, None), "trainable_token_indices": (None,),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # the others change the base
}  # fmt: skip


def _make(base: BaseModel, specs: Sequence[LoraSpec], size: int) -> LoraBank:
    bank = lora_bank(base, specs)
    return replace(bank, rank=max(bank.rank, size))


def _config(base: BaseModel, spec: LoraSpec, tensors: Mapping[str, Tensor]) -> Facts:
    """PEFT's LoraConfig as it saves it; of a PiSSA start, as it converts it to LoRA: twice the rank, the same scale."""
    alpha = spec.alpha * (spec.row_rank / spec.rank) ** (0.5 if spec.use_rslora else 1)
    return {
        "r": spec.row_rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": spec.dropout,
        "use_rslora": spec.use_rslora,
        "target_modules": _targets(base, tensors),
        "fan_in_fan_out": base.transposed,
        "bias": "none",
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _modules(tensors: Mapping[str, Tensor]) -> set[str]:
    """Full paths of the adapted linears."""
    return {name.split(".lora_")[0].removeprefix(PREFIX) for name in tensors}


def _targets(base: BaseModel, tensors: Mapping[str, Tensor]) -> list[str]:
    """The last parts of the modules' paths where they name exactly these modules, else the whole paths."""
    modules = _modules(tensors)
    ends = {module.rpartition(".")[2] for module in modules}
    named = {site.name for site in base.sites if site.name.rpartition(".")[2] in ends}
    return sorted(ends if named == modules else modules)


def _read_config(config: Facts) -> LoraSpec:
    """Rank and scale; which linears, the tensors tell."""
    for key, allowed in _PLAIN.items():
        if key in config and config[key] not in allowed:
            raise ArtifactRefused(CONFIG, f"{key} is {ascii(config[key])[:40]}", "train plain LoRA without it")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank <= MOST_RANK:
        raise ArtifactRefused(CONFIG, f"r is {ascii(rank)[:40]}, not 1 to {MOST_RANK}", "use a lower rank")
    if (
        isinstance(alpha, bool)
        or not isinstance(alpha, int | float)
        or not math.isfinite(alpha)
        or not 0 < alpha <= MOST_ALPHA
    ):
        raise ArtifactRefused(
            CONFIG, f"lora_alpha is {ascii(alpha)[:40]}", f"give a number above 0, up to {MOST_ALPHA}"
        )
    return LoraSpec(rank=rank, alpha=float(alpha), use_rslora=config.get("use_rslora") is True)


def _layout(base: BaseModel, spec: LoraSpec) -> list[Shapes]:
    """A pair of tensors for each linear."""
    return [
        {
            f"{PREFIX}{site.name}.lora_A.weight": [spec.row_rank, site.inputs],
            f"{PREFIX}{site.name}.lora_B.weight": [site.outputs, spec.row_rank],
        }
        for site in base.sites
        if adapts(spec, site)
    ]


def _sentence(spec: LoraSpec, tensors: Mapping[str, Tensor]) -> str:
    return f"A LoRA of rank {spec.row_rank} on {len(_modules(tensors))} linear layers."


LORA = Method("LORA", _make, _config, _read_config, _layout, _sentence)
