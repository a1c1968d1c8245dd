"""Which bases users can share: tried on tiny ones of many kinds."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BertConfig,
    BloomConfig,
    FalconH1Config,
    Gemma3TextConfig,
    GPTNeoConfig,
    GptOssConfig,
    Lfm2Config,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
)

from lora_core.banks.table import make_bank
from lora_core.base_checks import check_sharing, positions
from lora_core.base_model import BaseModel, freeze
from lora_core.data.packing import pack
from lora_core.errors import BaseModelError
from lora_core.forward import token_losses
from lora_core.learner import Learner
from lora_core.recipe import make_recipe
from lora_core.train import train
from tests.lora_core.conftest import WORDS, T, examples

TOKENS = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
NARROW = TOKENS | {"hidden_size": 64}
SMALL = NARROW | {
    "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}  # fmt: skip
HEADED = SMALL | {"head_dim": 16}
STATES = {"num_hidden_layers": 2, "state_size": 8}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 24, "factor": 4.0,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
SHARED = [
    Gemma3TextConfig(**HEADED, sliding_window=16), Gemma3TextConfig(**HEADED, attn_implementation="eager"),
    LlamaConfig(**SMALL), LlamaConfig(**SMALL, rope_parameters=LONG), LlamaConfig(**SMALL, rope_parameters=DYNAMIC),
    MistralConfig(**SMALL, sliding_window=16), Phi3Config(**SMALL), Qwen2Config(**SMALL), Qwen3Config(**HEADED),
    GPTNeoConfig(**NARROW, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]),
    OPTConfig(**NARROW, num_hidden_layers=2, num_attention_heads=4, ffn_dim=56, word_embed_proj_dim=64),
]  # fmt: skip
MIXED = [
    FalconH1Config(**SMALL, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8),
    Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]),
    Mamba2Config(**NARROW, **STATES, num_heads=8, head_dim=16, n_groups=1), Qwen3_5TextConfig(**HEADED, **LINEAR),
    RecurrentGemmaConfig(**SMALL | {"num_hidden_layers": 3}, lru_width=64, attention_window_size=128),
    RwkvConfig(**NARROW, num_hidden_layers=2, context_length=128),
]  # fmt: skip
UNABLE = [BloomConfig(**NARROW, n_layer=2, n_head=4), MambaConfig(**NARROW, **STATES)]
OTHERWISE = [
    BertConfig(**NARROW, num_hidden_layers=1, num_attention_heads=4, intermediate_size=56),
    BartConfig(**TOKENS, d_model=64, decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=56),
]
OF_EXPERTS = [
    GptOssConfig(**HEADED, **EXPERTS), MixtralConfig(**SMALL, **EXPERTS),
    Qwen3NextConfig(**HEADED, **LINEAR, num_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=32),
]  # fmt: skip


def named(config: PreTrainedConfig) -> str:
    """For the list of tests."""
    return type(config).__name__.removesuffix("Config")


def frozen(config: PreTrainedConfig) -> BaseModel:
    """A random base of a configuration."""
    torch.manual_seed(0)
    return freeze(AutoModelForCausalLM.from_config(config), None, "tiny")


@pytest.mark.parametrize("config", SHARED, ids=named)
def test_a_base_whose_layers_heed_the_mask_is_shared(config: PreTrainedConfig) -> None:
    """A document's losses are the same behind any other."""
    base, mine = frozen(config), examples(5, 1, 16)[0]
    rows = [pack([(0, other), (1, mine)], T)[0] for other in examples(1, 40, 16) if len(other.tokens) == 9]

    losses = [token_losses(base, base.stack([row]))[0][0, 9:] for row in rows]

    assert len(rows) > 1
    assert all(torch.equal(losses[0], one) for one in losses)


@pytest.mark.parametrize("config", MIXED, ids=named)
def test_a_base_whose_documents_change_each_other_is_refused(config: PreTrainedConfig) -> None:
    """Rather than trained on what is behind the wrong text."""
    with pytest.raises(BaseModelError, match="tiny: its documents change each other.*choose a dense base"):
        frozen(config)


@pytest.mark.parametrize("config", UNABLE, ids=named)
def test_a_base_that_cannot_read_packed_rows_is_refused(config: PreTrainedConfig) -> None:
    """When it is loaded and not in the first step, in one line."""
    with pytest.raises(BaseModelError, match="tiny: it cannot read several documents in a row: .*Error") as caught:
        frozen(config)

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", OTHERWISE, ids=named)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_base_that_reads_a_document_otherwise_by_itself_is_refused(
    config: PreTrainedConfig, dtype: torch.dtype
) -> None:
    """BERT looks ahead where nobody masks; Bart counts positions from the row's start, whatever it is told."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    for weight in model.parameters():
        weight.data *= 5  # as far apart as trained ones

    with pytest.raises(BaseModelError, match="tiny: in a row it reads a document otherwise than by itself"):
        freeze(model, None, "tiny")


@pytest.mark.parametrize("config", OF_EXPERTS, ids=named)
def test_a_mixture_of_experts_is_refused(config: PreTrainedConfig) -> None:
    """An expert's product has as many rows as tokens go to it, whosever they are, and so other bits."""
    with pytest.raises(BaseModelError, match="tiny: its experts multiply all users' tokens together"):
        frozen(config)


def test_an_example_ends_where_a_rotary_embedding_turns_otherwise() -> None:
    """One longer document would change everybody's positions; and no shorter one does."""
    base = frozen(LlamaConfig(**SMALL, rope_parameters=LONG))
    by_layer = Gemma3TextConfig(**HEADED)
    by_layer.rope_parameters = {"full_attention": LONG, "sliding_attention": {"rope_type": "default"}}

    assert (base.longest, positions(by_layer)) == (24, 24)
    assert positions(LlamaConfig(**SMALL, rope_parameters=DYNAMIC)) == 128
    check_sharing(base.model, "tiny", 24, None)
    with pytest.raises(BaseModelError, match="change each other"):
        check_sharing(base.model, "tiny", 25, None)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("method", ["lora", "prompt_tuning", "prefix_tuning"])
def test_with_two_sets_of_frequencies_a_user_learns_the_same_beside_the_longest_documents(method: str) -> None:
    """As long as a base of LongRoPE lets an example be, and virtual tokens before them."""
    base = frozen(LlamaConfig(**SMALL, rope_parameters=LONG))
    ahead = {} if method == "lora" else {"num_virtual_tokens": 5}
    settings = make_recipe({"method": method, "epochs": 1, "row_tokens": T, "max_length": T, **ahead})
    bank, longest = make_bank(base, [settings.method]), examples(2, 40, base.longest)
    me, other = Learner("me", settings, examples(1, 10, 16)), Learner("other", settings, longest)

    alone, beside = ({one.name: one for one in train(base, who, 2, T, bank)}["me"] for who in ([me], [me, other]))

    assert max(len(one.tokens) for one in longest) == base.longest
    assert torch.equal(alone.row_P, beside.row_P)
