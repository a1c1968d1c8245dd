"""What we train is what PEFT trains, and what either writes the other reads."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    CTRLConfig,
    CTRLLMHeadModel,
    FalconConfig,
    FalconForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    MiniCPM3Config,
    MiniCPM3ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from benchmarks.peft_loop import adapted, held_out_loss, train_with_peft
from lora_core.artifact import write_artifact
from lora_core.banks.bank import Bank
from lora_core.banks.lora import PREFIX, LoraBank, lora_bank
from lora_core.base_model import BaseModel, freeze
from lora_core.cohort import Cohort
from lora_core.data.packing import epoch_batches
from lora_core.data.rendering import Rendered
from lora_core.intake import read_artifact
from lora_core.layers import decoder_layers
from lora_core.learner import Learner
from lora_core.methods import LoraSpec
from lora_core.optim import rate_at
from lora_core.recipe import Recipe
from lora_core.train import train
from tests.lora_core.conftest import ARCHITECTURES, WORDS, T, examples, learner, lora_of, recipe

STEPS = 200


def peft_model(model: PreTrainedModel, spec: LoraSpec) -> PeftModel:
    """The model under stock PEFT with our settings."""
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        use_rslora=spec.use_rslora,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    made: PeftModel = get_peft_model(model, config)
    return made


def load_row(model: PeftModel, tensors: dict[str, Tensor]) -> None:
    """Put our tensors where PEFT keeps its own."""
    missing = peft.set_peft_model_state_dict(model, tensors).missing_keys
    assert not [name for name in missing if "lora_" in name]


def padded(batch: Sequence[Rendered]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, mask and labels as a plain loop makes them: one example a row, padded on the right."""
    width = max(len(one.tokens) for one in batch)
    tokens = torch.zeros(len(batch), width, dtype=torch.long)
    mask, labels = torch.zeros_like(tokens), torch.full_like(tokens, -100)
    for row, one in enumerate(batch):
        n = len(one.tokens)
        tokens[row, :n] = torch.tensor(one.tokens)
        mask[row, :n] = 1
        labels[row, :n] = torch.where(torch.tensor(one.trained), tokens[row, :n], -100)
    return tokens, mask, labels


def peft_loop(
    model: PeftModel,
    data: Sequence[Rendered],
    settings: Recipe,
    steps: int = STEPS,
    optimiser: torch.optim.Optimizer | None = None,
) -> list[float]:
    """A plain PEFT loop: PyTorch's AdamW, clipping, a schedule.  A given optimiser's rates multiply the schedule's."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = optimiser or torch.optim.AdamW(parameters, lr=1.0, weight_decay=settings.weight_decay)
    multiples = [group["lr"] for group in optimiser.param_groups]
    losses: list[float] = []
    per_epoch = math.ceil(len(data) / settings.batch_size)
    for epoch in range(steps // per_epoch):
        for batch in epoch_batches(len(data), settings.batch_size, settings.seed, epoch):
            tokens, mask, labels = padded([data[index] for index in batch])
            loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
            for group, times in zip(optimiser.param_groups, multiples, strict=True):
                group["lr"] = times * rate_at(settings, len(losses) + 1, steps)
            optimiser.step()
            optimiser.zero_grad()
            losses.append(loss.item())
    return losses


def opt() -> PreTrainedModel:
    """Its MLP reads rows one behind the other."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2}
    return OPTForCausalLM(OPTConfig(vocab_size=WORDS, num_attention_heads=4, max_position_embeddings=128, **sizes))


def falcon() -> PreTrainedModel:
    """It adds to what a linear gives in place, and its heads share one key."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return FalconForCausalLM(FalconConfig(vocab_size=WORDS, alibi=False, **sizes))


def minicpm3() -> PreTrainedModel:
    """Its latent attention has a linear read keys and values head by head."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 4, "max_position_embeddings": 128}  # fmt: skip
    latent = {"q_lora_rank": 8, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    return MiniCPM3ForCausalLM(MiniCPM3Config(vocab_size=WORDS, **sizes, **latent))


@pytest.mark.parametrize("make", [opt, falcon, minicpm3])
def test_layers_that_reshape_or_add_in_place_lose_what_a_plain_peft_loop_loses(
    make: Callable[[], PreTrainedModel],
) -> None:
    """Whatever an architecture does with what a linear gives."""
    settings, data = recipe(dropout=0, epochs=5, batch_size=4, learning_rate=3e-3), examples(3, count=16)
    base, other = freeze(make(), None), make().eval()
    bank = lora_bank(base, [lora_of(settings)])
    theirs = peft_model(other, lora_of(settings)).eval()
    load_row(theirs, bank.to_tensors(bank.start_row(lora_of(settings), settings.seed), lora_of(settings)))

    expected = peft_loop(theirs, data, settings, steps=20)
    neighbour = Learner("n", recipe(seed=7, epochs=5), examples(7, count=16))
    trained = {one.name: one for one in train(base, [neighbour, Learner("me", settings, data)], 2, T, bank)}["me"]

    assert [loss for _, loss in trained.losses] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_200_steps_lose_what_a_plain_peft_loop_loses(architecture: str) -> None:
    """Same start, same data order: every loss within 1e-5, beside two neighbours."""
    settings = recipe(
        dropout=0, epochs=50, batch_size=4, learning_rate=3e-3, schedule="cosine", warmup=0.1, weight_decay=0.01
    )
    data = examples(3, count=16)
    base, other = freeze(ARCHITECTURES[architecture](), None), ARCHITECTURES[architecture]().eval()
    bank = lora_bank(base, [lora_of(settings)])
    theirs = peft_model(other, lora_of(settings)).eval()
    load_row(theirs, bank.to_tensors(bank.start_row(lora_of(settings), settings.seed), lora_of(settings)))

    expected = peft_loop(theirs, data, settings)
    neighbours = [Learner(f"n{seed}", recipe(seed=seed, epochs=50), examples(seed, count=16)) for seed in (7, 8)]
    trained = {one.name: one for one in train(base, [*neighbours, Learner("me", settings, data)], 3, T, bank)}["me"]

    ours = [loss for _, loss in trained.losses]
    assert len(ours) == STEPS
    assert max(abs(a - b) for a, b in zip(ours, expected, strict=True)) < 1e-5
    ended = peft.get_peft_model_state_dict(theirs)
    for name, tensor in bank.to_tensors(trained.row_P, lora_of(settings)).items():
        torch.testing.assert_close(tensor, ended[name], atol=2e-4, rtol=1e-3)


def random_row(bank: LoraBank, spec: LoraSpec, seed: int = 0) -> Tensor:
    """A row whose delta is not zero."""
    row_P = bank.start_row(spec, seed)
    for _, up_KRO in bank.factors(row_P[None]):
        up_KRO[0, : spec.rank] = (
            torch.randn(spec.rank, up_KRO.shape[2], generator=torch.Generator().manual_seed(seed)) * 0.2
        )
    return row_P


def our_logits(base: BaseModel, bank: Bank, row_P: Tensor, scale: float, tokens: Tensor) -> Tensor:
    """What the base says with this row in slot 1 of 2."""
    cohort = Cohort(2, bank.width, base.model.device, base.model.dtype)
    cohort.admit(1, row_P, scale)
    with bank.attached(base, cohort), torch.inference_mode():
        logits: Tensor = base.model(tokens.expand(2, -1)).logits
    return logits[1:]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj", "c_attn")])
def test_our_files_load_in_peft_with_equal_logits(
    base: BaseModel, tmp_path: Path, rslora: bool, targets: object
) -> None:
    """Stock PEFT, from the folder that is published."""
    if targets != "all-linear":
        targets = [t for t in ("q_proj", "v_proj", "c_attn") if any(site.name.endswith(t) for site in base.sites)]
    check_peft_loads(base, lora_of(recipe(use_rslora=rslora, targets=targets)), ARCHITECTURES[base.name](), tmp_path)


def check_peft_loads(base: BaseModel, spec: LoraSpec, model: PreTrainedModel, folder: Path) -> PeftModel:
    """Some row's files give the same logits in stock PEFT, on a model like the base."""
    bank = lora_bank(base, [spec])
    row_P = random_row(bank, spec)
    tensors = bank.to_tensors(row_P, spec)
    for name, data in write_artifact(base, spec, tensors, {}).items():
        (folder / name).write_bytes(data)
    tokens = torch.tensor([examples(5)[0].tokens])

    loaded = PeftModel.from_pretrained(model.eval(), folder)

    ours = our_logits(base, bank, row_P, spec.scale, tokens)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(tokens).logits, ours, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(base.model(tokens).logits, ours, atol=1e-3)
    return loaded


def seeing() -> PreTrainedModel:
    """Gemma 3 of the sizes that see pictures too: a tower of layers whose linears have the same names."""
    torch.manual_seed(0)
    size = {"intermediate_size": 48, "num_hidden_layers": 2}
    text = size | {"vocab_size": WORDS, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
                   "head_dim": 8, "max_position_embeddings": 128}  # fmt: skip
    vision = size | {"hidden_size": 32, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=95)
    )


@pytest.mark.parametrize("layers", [None, (1,)])
def test_a_base_that_sees_pictures_too_is_adapted_where_text_goes(
    layers: tuple[int, ...] | None, tmp_path: Path
) -> None:
    """And there alone, in PEFT too."""
    base = freeze(seeing(), None, "gemma3")

    loaded = check_peft_loads(base, lora_of(recipe(layers=layers)), seeing(), tmp_path)

    adapted = {name.split(".lora_")[0] for name, _ in loaded.named_parameters() if ".lora_" in name}
    assert len(adapted) == (7 if layers else 14)
    assert all(".language_model.layers." in name for name in adapted)
    assert len(decoder_layers(base)) == 2


def ctrl() -> PreTrainedModel:
    """Its MLP's linears are called 0 and 2, and so are layers."""
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "dff": 48, "n_layer": 3, "n_head": 4, "n_positions": 128}
    return CTRLLMHeadModel(CTRLConfig(vocab_size=WORDS, **sizes))


def test_linears_that_are_called_as_other_modules_are_load_in_peft(tmp_path: Path) -> None:
    """By their whole paths."""
    base, settings = freeze(ctrl(), None), lora_of(recipe())
    bank = lora_bank(base, [settings])
    tensors = bank.to_tensors(random_row(bank, settings), settings)
    for name, data in write_artifact(base, settings, tensors, {}).items():
        (tmp_path / name).write_bytes(data)

    loaded = peft.get_peft_model_state_dict(PeftModel.from_pretrained(ctrl().eval(), tmp_path))

    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("rslora", [False, True])
def test_pefts_files_load_here_with_equal_logits(base: BaseModel, tmp_path: Path, rslora: bool) -> None:
    """What `save_pretrained` writes, read by us."""
    spec = lora_of(recipe(use_rslora=rslora))
    theirs = peft_model(ARCHITECTURES[base.name]().eval(), spec).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path)
    tokens = torch.tensor([examples(5)[0].tokens])

    files = read_artifact(tmp_path, base)

    assert isinstance(files.spec, LoraSpec)
    bank = LoraBank(base.sites, files.spec.rank + 3)  # a wider bank than the file
    ours = our_logits(base, bank, bank.from_tensors(files.tensors, files.spec), files.spec.scale, tokens)
    with torch.inference_mode():
        torch.testing.assert_close(theirs(tokens).logits, ours, atol=1e-5, rtol=1e-5)
    assert all(name.startswith(PREFIX) for name in files.tensors)


def test_the_loop_that_searches_are_timed_against_trains_no_longer_than_they(llama_base: BaseModel) -> None:
    """One epoch, and the first of five where a recipe stops after so many steps."""
    losses = []
    for settings in ({"epochs": 1}, {"epochs": 5, "max_steps": 3}, {"epochs": 5}):
        torch.manual_seed(0)
        user = learner(1, count=12, held_out=4, learning_rate=1e-2, patience=5, **settings)
        losses.append(train_with_peft(llama_base, user))

    assert losses[0] == losses[1] != losses[2]


def test_that_loop_drops_nothing_where_it_examines(llama_base: BaseModel) -> None:
    """As no examination does here, so that the losses that stand side by side can be compared."""
    torch.manual_seed(0)
    model = adapted(llama_base, LoraSpec(rank=4, dropout=0.5))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    judged = examples(2, count=4)

    assert held_out_loss(model, judged) == held_out_loss(model, judged)
