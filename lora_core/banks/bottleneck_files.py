"""Files of bottleneck adapter layers, as docs/adapter-format.md describes, and their row in the table of methods."""

from collections.abc import Mapping

from pydantic import ValidationError
from torch import Tensor

from lora_core.banks.bank import Facts, Method, Shapes
from lora_core.banks.bottleneck import adapts, bottleneck_bank, tensor_names, width_on
from lora_core.banks.lora import PREFIX
from lora_core.banks.residuals import residual_places
from lora_core.base_model import BaseModel
from lora_core.errors import ArtifactRefused
from lora_core.methods import BottleneckSpec

CONFIG = "adapter_config.json"
_DOWN = ".adapter_down.weight"
_KEYS: Mapping[str, str] = {  # of the file, and what the settings call it
    "bottleneck_size": "width", "placement": "placement", "non_linearity": "activation", "biases": "biases",
}  # fmt: skip
# Loading by this project alone: no other library knows the method.
USAGE = """\
from pathlib import Path

from lora_core.banks.table import make_bank
from lora_core.base_model import load_base
from lora_core.cohort import Cohort
from lora_core.intake import read_artifact

base = load_base({base})
files = read_artifact(Path("path/of/this/folder"), base)
bank = make_bank(base, [files.spec])
cohort = Cohort(1, bank.width, base.model.device, base.model.dtype)
cohort.admit(0, bank.from_tensors(files.tensors, files.spec), files.spec.scale)
with bank.attached(base, cohort):
    tokens = base.tokenizer("Hello", return_tensors="pt").to(base.model.device)
    print(base.tokenizer.decode(base.model.generate(**tokens)[0]))"""


def _config(base: BaseModel, spec: BottleneckSpec, tensors: Mapping[str, Tensor]) -> Facts:
    (width,) = {len(tensor) for name, tensor in tensors.items() if name.endswith(_DOWN)}
    settings = {**spec.model_dump(), "width": width}
    return {
        **{key: settings[name] for key, name in _KEYS.items()},
        "dropout": spec.dropout,
        "target_modules": _modules(tensors),
    }


def _modules(tensors: Mapping[str, Tensor]) -> list[str]:
    """Paths of the modules that have an adapter layer behind them."""
    downs = [name for name in tensors if name.endswith(_DOWN)]
    return sorted(name.removeprefix(PREFIX).removesuffix(_DOWN) for name in downs)


def _read_config(config: Facts) -> BottleneckSpec:
    """Width, placement and the rest; which layers, the tensors tell."""
    missing = next((key for key in _KEYS if key not in config), None)
    if missing:
        raise ArtifactRefused(CONFIG, f"it has no {missing}", "save the adapter again")
    try:
        return BottleneckSpec.model_validate({name: config[key] for key, name in _KEYS.items()}, strict=True)
    except ValidationError as error:
        detail = error.errors()[0]
        key = next(key for key, name in _KEYS.items() if name == detail["loc"][0])
        why = f"{key} is {ascii(detail['input'])[:40]}: {detail['msg']}"
        raise ArtifactRefused(CONFIG, why, "save the adapter again") from None


def _layout(base: BaseModel, spec: BottleneckSpec) -> list[Shapes]:
    """Down and up of each place, and their biases."""
    groups: list[Shapes] = []
    for place in residual_places(base):
        names, width = tensor_names(place), width_on(spec, place)
        shapes = {"down": [width, place.width], "up": [place.width, width]}
        biases = {"down bias": [width], "up bias": [place.width]} if spec.biases else {}
        if adapts(spec, place):
            groups.append({names[key]: shape for key, shape in (shapes | biases).items()})
    return groups


def _sentence(spec: BottleneckSpec, tensors: Mapping[str, Tensor]) -> str:
    (width,) = {len(tensor) for name, tensor in tensors.items() if name.endswith(_DOWN)}
    where = "attention and MLP blocks" if spec.placement == "houlsby" else "MLP blocks"
    return f"Bottleneck adapter layers of width {width} ({spec.activation}) behind {len(_modules(tensors))} {where}."


BOTTLENECK = Method("BOTTLENECK", bottleneck_bank, _config, _read_config, _layout, _sentence, "lora-factory", USAGE)
