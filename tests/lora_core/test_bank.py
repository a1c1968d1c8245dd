"""What every method's rows have in common: each begins at a whole cache line, whatever users ask for."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lora_core.banks import bank as banks
from lora_core.banks.bank import LINE
from lora_core.banks.table import make_bank
from lora_core.base_model import BaseModel, freeze
from lora_core.learner import Learner
from lora_core.recipe import make_recipe
from tests.lora_core.conftest import WORDS, T, examples, gpt2, llama
from tests.lora_core.killing import Killed, doomed, resumed
from tests.lora_core.test_virtual_tokens import run, same

PATTERNED = {"alpha_pattern": {"v_proj": 3.0}}
PROJECTED = {"method": "prefix_tuning", "num_virtual_tokens": 3, "prefix_projection": True}


def narrow() -> LlamaForCausalLM:
    """A Llama whose embeddings are no whole number of lines."""
    torch.manual_seed(0)
    shape = {"hidden_size": 36, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 56}
    return LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, num_hidden_layers=2, max_position_embeddings=128, **shape))


BASES = {"llama": llama, "gpt2": gpt2, "narrow": narrow}

# Whose own numbers fill no whole line.
ODD: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "rank 1": ("llama", {"rank": 1, "layers": (1,), **PATTERNED}),
    "rank 3": ("llama", {"rank": 3, "layers": (1,), **PATTERNED}),
    "prefix 5": ("gpt2", {**PROJECTED, "encoder_hidden_size": 5}),
    "prefix 9": ("llama", {**PROJECTED, "encoder_hidden_size": 9}),
    "prompt": ("narrow", {"method": "prompt_tuning", "num_virtual_tokens": 3}),
    "adapter layer": ("llama", {"method": "bottleneck", "width": 3}),
}


def user(seed: int, settings: Mapping[str, object]) -> Learner:
    """A user of its own, of any method."""
    usual = {"learning_rate": 1e-2, "epochs": 2, "row_tokens": T, "max_length": T, "patience": None}
    return Learner(f"user{seed}", make_recipe({**usual, **settings, "seed": seed}), examples(seed, 20))


@pytest.mark.parametrize("odd", ODD)
def test_a_user_is_the_same_in_every_slot(odd: str) -> None:
    """MKL rounds by how what it multiplies is aligned: a row that is no whole number of lines shifts the next one's."""
    architecture, settings = ODD[odd]
    base, cohort = freeze(BASES[architecture](), None), [user(seed, settings) for seed in (1, 2, 3)]
    bank = make_bank(base, [one.recipe.method for one in cohort])

    packed = run(base, cohort, bank)

    assert bank.width % LINE == 0
    assert all(same(packed[one.name], run(base, [one], bank)[one.name]) for one in cohort)


def test_a_save_of_a_time_when_rows_were_shorter_is_none(
    llama_base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever it was of begins again, and holds up nobody."""
    one = user(1, ODD["rank 1"][1])
    bank = make_bank(llama_base, [one.recipe.method])
    whole = run(llama_base, [one], bank)[one.name]

    with monkeypatch.context() as before, pytest.raises(Killed):
        before.setattr(banks, "LINE", 1)
        run(llama_base, [one], bank, saves=doomed(tmp_path, 3))

    assert same(whole, run(llama_base, [one], bank, saves=resumed(tmp_path))[one.name])


def test_what_fills_up_a_line_learns_nothing() -> None:
    """It is zero after training, and no file has it."""
    base = freeze(narrow(), None)
    one = user(1, {"method": "prompt_tuning", "num_virtual_tokens": 3, "weight_decay": 0.1})
    bank = make_bank(base, [one.recipe.method])

    row_P = run(base, [one], bank)[one.name].row_P
    tensors = bank.to_tensors(row_P, one.recipe.method)

    assert bank.width == 128 > bank.parameters(one.recipe.method) == 3 * 36
    assert [list(tensor.shape) for tensor in tensors.values()] == [[3, 36]]
    assert int((row_P != 0).sum()) == 3 * 36
    assert torch.equal(bank.from_tensors(tensors, one.recipe.method), row_P)
