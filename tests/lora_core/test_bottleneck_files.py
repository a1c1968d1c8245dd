"""Files of adapter layers: what is documented is what is written, and nothing else is read."""

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from lora_core.artifact import write_artifact
from lora_core.banks.bottleneck import bottleneck_bank
from lora_core.base_model import BaseModel
from lora_core.errors import ArtifactRefused, RecipeError
from lora_core.evaluate import Asked, evaluate_all
from lora_core.intake import read_artifact
from lora_core.methods import BottleneckSpec
from lora_core.recipe import make_recipe
from tests.lora_core.conftest import ARCHITECTURES, T, examples
from tests.lora_core.test_artifact import HOSTILE, nan, tamper_config, tamper_header
from tests.lora_core.test_bottleneck import logits, random_row, spec

DOCS = Path(__file__).parents[2] / "docs" / "adapter-format.md"


def write(base: BaseModel, folder: Path, method: BottleneckSpec) -> None:
    """A trained user's files."""
    bank = bottleneck_bank(base, [method])
    for name, data in write_artifact(base, method, bank.to_tensors(random_row(bank, method), method), {}).items():
        (folder / name).write_bytes(data)


def code_in(markdown: str) -> str:
    """Its Python."""
    (code,) = re.findall(r"```python\n(.*?)```", markdown, re.DOTALL)
    return str(code)


@pytest.mark.parametrize(
    "method",
    [spec(), spec(placement="pfeiffer", non_linearity="swish", layers=(1,)), spec(biases=False, reduction_factor=8)],
)
def test_files_mean_the_same_here_and_in_the_documented_lines_of_torch(
    base: BaseModel, tmp_path: Path, method: BottleneckSpec
) -> None:
    """Read back through intake into a wider bank, and applied to a stock model by the code of the documentation."""
    write(base, tmp_path, method)
    bank, tokens = bottleneck_bank(base, [method]), torch.tensor([examples(5)[0].tokens])
    trained = logits(base, bank, [None, random_row(bank, method)], tokens)[1:]
    stock: PreTrainedModel = ARCHITECTURES[base.name]().eval()
    known: dict[str, Callable[[PreTrainedModel, Path], None]] = {}

    files = read_artifact(tmp_path, base)
    exec(code_in(DOCS.read_text()), known)
    known["apply_adapter"](stock, tmp_path)

    assert isinstance(files.spec, BottleneckSpec)
    wider = bottleneck_bank(base, [files.spec, spec(width=11)])
    with torch.inference_mode():
        torch.testing.assert_close(stock(tokens).logits, trained, atol=1e-5, rtol=1e-5)
    again = logits(base, wider, [None, wider.from_tensors(files.tensors, files.spec)], tokens)[1:]
    torch.testing.assert_close(again, trained, atol=1e-5, rtol=1e-5)


def test_the_documented_lines_take_a_base_in_bf16(llama_base: BaseModel, tmp_path: Path) -> None:
    """Which most are, as transformers loads them; tensors are in fp32."""
    write(llama_base, tmp_path, spec())
    stock = copy.deepcopy(llama_base.model).bfloat16()
    known: dict[str, Callable[[PreTrainedModel, Path], None]] = {}
    plain = stock(torch.tensor([[1, 2, 3]])).logits

    exec(code_in(DOCS.read_text()), known)
    known["apply_adapter"](stock, tmp_path)

    assert stock(torch.tensor([[1, 2, 3]])).logits.dtype == torch.bfloat16
    assert not torch.equal(stock(torch.tensor([[1, 2, 3]])).logits, plain)


def test_the_same_adapter_is_the_same_bytes(llama_base: BaseModel, tmp_path: Path) -> None:
    """Written, read and written again."""
    write(llama_base, tmp_path, spec())

    files = read_artifact(tmp_path, llama_base)
    again = write_artifact(llama_base, files.spec, dict(reversed(list(files.tensors.items()))), {})

    assert again["adapter_model.safetensors"] == (tmp_path / "adapter_model.safetensors").read_bytes()


def test_the_card_says_what_it_is(llama_base: BaseModel, tmp_path: Path) -> None:
    """And that PEFT does not load it; `tests/flows/test_cli.py` runs the lines that do."""
    write(llama_base, tmp_path, spec())

    card = (tmp_path / "README.md").read_text()

    assert 'library_name: "lora-factory"' in card
    assert "Bottleneck adapter layers of width 4 (gelu) behind 4 attention and MLP blocks." in card
    assert "peft" not in card


def test_adapters_of_any_methods_are_judged_together(base: BaseModel) -> None:
    """A live version of LoRA and a candidate of adapter layers, on the same examples."""
    lora, method, held_out = make_recipe({}).method, spec(), examples(2, 4)
    bank = bottleneck_bank(base, [method])
    tensors = bank.to_tensors(random_row(bank, method), method)

    scores = evaluate_all(base, [Asked(lora, None, held_out), Asked(method, tensors, held_out)], 2, T)

    assert scores[0].loss != scores[1].loss
    assert scores[0] == evaluate_all(base, [Asked(method, None, held_out)], 2, T)[0]


OWN = (
    "rank",
    "alpha",
    "dora",
    "activated",
    "layers again",
    "saved modules",
    "half a pair",
    "overlap",
    "beyond",
    "shape",
)  # of LoRA's own keys and sizes
HOSTILE_HERE: dict[str, tuple[Callable[[Path], object], str]] = {
    **{kind: case for kind, case in HOSTILE.items() if not kind.startswith(OWN)},
    "size huge": (tamper_config(bottleneck_size=10**6), "bottleneck_size is 1000000"),
    "size true": (tamper_config(bottleneck_size=True), "bottleneck_size is True"),
    "size text": (tamper_config(bottleneck_size="4"), "bottleneck_size is '4'"),
    "size none": (tamper_config(bottleneck_size=None), "bottleneck_size is None"),
    "size other": (tamper_config(bottleneck_size=5), "shape"),
    "another act": (tamper_config(non_linearity="__import__('os')"), "non_linearity is"),
    "list as act": (tamper_config(non_linearity=["relu"]), "non_linearity is"),
    "placement": (tamper_config(placement="everywhere"), "placement is 'everywhere'"),
    "fewer places": (tamper_config(placement="pfeiffer"), "no place"),
    "biases text": (tamper_config(biases="yes"), "biases is 'yes'"),
    "no biases": (tamper_config(biases=False), "no place"),
    "LoRA": (tamper_config(peft_type="LORA"), "r is None"),
    "down alone": (tamper_header(lambda h, names: [h.pop(name) for name in names[1:]]), "belong to no tensor|beside"),
    "flat": (tamper_header(lambda h, names: h[names[1]].update(shape=[128])), "shape"),
    "not finite": (nan, "not finite"),
}


@pytest.mark.parametrize("kind", HOSTILE_HERE)
def test_a_hostile_adapter_is_refused_in_words(llama_base: BaseModel, tmp_path: Path, kind: str) -> None:
    """Before any library sees it."""
    write(llama_base, tmp_path, spec())
    spoil, words = HOSTILE_HERE[kind]
    spoil(tmp_path)

    with pytest.raises(ArtifactRefused, match=words):
        read_artifact(tmp_path, llama_base)


def test_a_config_without_a_key_is_refused(llama_base: BaseModel, tmp_path: Path) -> None:
    """Nothing is guessed: another activation would be another adapter."""
    write(llama_base, tmp_path, spec())
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"non_linearity"', '"non_linearities"'))

    with pytest.raises(ArtifactRefused, match="has no non_linearity"):
        read_artifact(tmp_path, llama_base)


def test_adapterhubs_spellings_mean_the_same() -> None:
    """Equal recipes, however they were spelt; what was stored reads back."""
    ours = make_recipe({"method": {"name": "bottleneck", "width": 8, "activation": "silu", "layers": [0, 1]}})
    theirs = make_recipe({"peft_type": "BOTTLENECK", "bottleneck_size": 8, "non_linearity": "swish", "layers": "0,1"})

    assert ours == theirs == make_recipe(ours.model_dump(mode="json"))
    assert ours.digest == theirs.digest


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"method": "bottleneck", "rank": 8}, "method.rank = 8: bottleneck has no such setting"),
        ({"method": "lora", "width": 8}, "method.width = 8: lora has no such setting"),
        ({"width": 8}, "lora has no such setting"),
        ({"method": "bottleneck", "width": 0}, "method.width = 0: .*greater than or equal to 1"),
        ({"method": "bottleneck", "non_linearity": "tanh"}, "'relu', 'gelu' or 'silu'"),
        ({"method": "bottleneck", "non_linearity": ["relu"]}, "'relu', 'gelu' or 'silu'"),
        ({"method": "bottleneck", "reduction_factor": 0}, "greater than or equal to 1"),
        ({"method": "bottleneck", "placement": "both"}, "'houlsby' or 'pfeiffer'"),
    ],
)
def test_a_setting_of_another_method_is_refused(given: dict[str, object], words: str) -> None:
    """And says which method was meant."""
    with pytest.raises(RecipeError, match=words):
        make_recipe(given)
