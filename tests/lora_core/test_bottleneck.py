"""Adapter layers behind the blocks of a base: what they compute, and that packing changes nobody."""

import math
import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM, MptConfig, MptForCausalLM, PreTrainedModel

from benchmarks.memory_law import Setting, make_base, measured
from lora_core.banks.bottleneck import BottleneckBank, bottleneck_bank
from lora_core.banks.residuals import residual_places
from lora_core.base_model import BaseModel, freeze
from lora_core.cohort import Cohort
from lora_core.data.packing import epoch_batches
from lora_core.data.rendering import Rendered
from lora_core.errors import TrainingError
from lora_core.layers import checkpointed, compiled
from lora_core.learner import Learner
from lora_core.lower_layers import LowerLayers
from lora_core.memory import predict
from lora_core.methods import BottleneckSpec
from lora_core.optim import rate_at
from lora_core.recipe import Recipe, make_recipe
from lora_core.row_store import RowMemory, RowStore
from lora_core.train import train
from tests.lora_core.conftest import ARCHITECTURES, WORDS, T, examples, llama
from tests.lora_core.killing import killed_and_resumed
from tests.lora_core.test_exact import T as ROW_TOKENS
from tests.lora_core.test_exact import run
from tests.lora_core.test_peft_parity import padded

BLOCKS = {
    "llama": ("model.layers.{}.self_attn", "model.layers.{}.mlp"),
    "gpt2": ("transformer.h.{}.attn", "transformer.h.{}.mlp"),
}


def settings(**changes: object) -> Recipe:
    """A recipe for these tests: both places, dropout on, quick steps."""
    defaults: dict[str, object] = {
        "method": "bottleneck", "width": 4, "placement": "houlsby", "non_linearity": "gelu", "dropout": 0.1,
        "learning_rate": 5e-3, "epochs": 2, "batch_size": 4, "row_tokens": T, "max_length": T, "patience": None,
    }  # fmt: skip
    return make_recipe({**defaults, **changes})


def spec(**changes: object) -> BottleneckSpec:
    """The method of such a recipe."""
    method = settings(**changes).method
    assert isinstance(method, BottleneckSpec)
    return method


def user(seed: int, count: int = 6, **changes: object) -> Learner:
    """A user of its own."""
    return Learner(f"user{seed}", settings(seed=seed, **changes), examples(seed, count), examples(seed + 1000, 2))


def random_row(bank: BottleneckBank, method: BottleneckSpec, seed: int = 0) -> Tensor:
    """A row of a trained user: no number of its own is zero."""
    generator = torch.Generator().manual_seed(seed)
    tensors = bank.to_tensors(bank.start_row(method, seed), method)
    drawn = {name: torch.randn(t.shape, generator=generator) * 0.2 for name, t in tensors.items()}
    return bank.from_tensors(drawn, method)


def logits(base: BaseModel, bank: BottleneckBank, rows: Sequence[Tensor | None], tokens: Tensor) -> Tensor:
    """What the base says with a row in each slot; None is a cleared slot."""
    cohort = Cohort(len(rows), bank.width, base.model.device, base.model.dtype)
    for slot, row_P in enumerate(rows):
        if row_P is not None:
            cohort.admit(slot, row_P, 1.0)
    with bank.attached(base, cohort), torch.inference_mode():
        said: Tensor = base.model(tokens.expand(len(rows), -1)).logits
    return said


class Reference(nn.Module):
    """An adapter layer as the papers draw it, around a block of a stock model: plain torch, nothing of ours."""

    def __init__(self, block: nn.Module, hidden: int, width: int, act: str) -> None:
        super().__init__()
        self.block, self.act = block, act
        self.down, self.up = nn.Linear(hidden, width), nn.Linear(width, hidden)

    def forward(self, *inputs: object, **named: object) -> object:
        """The block's output plus the bottleneck's of it."""
        output = self.block(*inputs, **named)
        h = output[0] if isinstance(output, tuple) else output
        h = h + self.up(getattr(F, self.act)(self.down(h)))
        return (h, *output[1:]) if isinstance(output, tuple) else h


def reference(architecture: str, method: BottleneckSpec, tensors: dict[str, Tensor]) -> PreTrainedModel:
    """A stock model with reference layers that hold our tensors."""
    model = ARCHITECTURES[architecture]().eval().requires_grad_(False)
    for layer in range(2):
        for place in BLOCKS[architecture][0 if method.placement == "houlsby" else 1 :]:
            path = place.format(layer)
            made = Reference(model.get_submodule(path), 32, method.width, method.activation)
            made.load_state_dict(
                {f"{way}.{kind}": tensors[f"base_model.model.{path}.adapter_{way}.{kind}"]
                 for way in ("down", "up") for kind in ("weight", "bias")}, strict=False,
            )  # fmt: skip
            model.set_submodule(path, made)
    return model


def reference_loop(model: PreTrainedModel, data: Sequence[Rendered], recipe: Recipe, steps: int) -> list[float]:
    """A plain loop: torch's autograd, AdamW, clipping."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1.0, weight_decay=recipe.weight_decay)
    losses: list[float] = []
    per_epoch = math.ceil(len(data) / recipe.batch_size)
    for epoch in range(steps // per_epoch):
        for batch in epoch_batches(len(data), recipe.batch_size, recipe.seed, epoch):
            tokens, mask, labels = padded([data[index] for index in batch])
            loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
            optimiser.param_groups[0]["lr"] = rate_at(recipe, len(losses) + 1, steps)
            optimiser.step()
            optimiser.zero_grad()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("placement", "act"), [("houlsby", "gelu"), ("pfeiffer", "silu"), ("pfeiffer", "relu")])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_100_steps_lose_what_a_reference_loses(architecture: str, placement: str, act: str) -> None:
    """Same start, same data order: every loss within 1e-5, beside a wider neighbour of another activation."""
    mine = settings(
        dropout=0, epochs=50, batch_size=4, learning_rate=5e-3, schedule="cosine", warmup=0.1, weight_decay=0.01,
        placement=placement, non_linearity=act,
    )  # fmt: skip
    method, other = mine.method, settings(width=9, non_linearity="silu" if act == "gelu" else "gelu", epochs=50)
    assert isinstance(method, BottleneckSpec)
    data, base = examples(3, count=8), freeze(ARCHITECTURES[architecture](), None)
    bank = bottleneck_bank(base, [method, spec(width=9, non_linearity="silu" if act == "gelu" else "gelu")])
    theirs = reference(architecture, method, bank.to_tensors(bank.start_row(method, mine.seed), method))

    expected = reference_loop(theirs, data, mine, 100)
    cohort = [Learner("wide", other, examples(7, count=8)), Learner("me", mine, data)]
    trained = {one.name: one for one in train(base, cohort, 2, T, bank)}["me"]

    ours = [loss for _, loss in trained.losses]
    assert len(ours) == 100
    assert max(abs(a - b) for a, b in zip(ours, expected, strict=True)) < 1e-5
    assert ours[-1] < ours[0] - 0.02
    ended = {f"base_model.model.{name}".replace(".down", ".adapter_down").replace(".up", ".adapter_up"): tensor
             for name, tensor in theirs.state_dict().items()}  # fmt: skip
    for name, tensor in bank.to_tensors(trained.row_P, method).items():
        torch.testing.assert_close(tensor, ended[name], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("act", ["relu", "gelu", "silu"])
def test_a_fresh_row_and_a_cleared_slot_are_the_base_exactly(base: BaseModel, act: str) -> None:
    """Up is zero: the first step starts from the base's own logits, to the bit, also beside a trained user."""
    method = spec(non_linearity=act)
    bank = bottleneck_bank(base, [method, spec(non_linearity="silu")])
    tokens = torch.tensor([examples(1)[0].tokens])
    with torch.inference_mode():
        plain = base.model(tokens.expand(3, -1)).logits

    fresh = logits(base, bank, [bank.start_row(method, 1), None, random_row(bank, method)], tokens)

    assert torch.equal(plain[:2], fresh[:2])
    assert not torch.allclose(plain[2], fresh[2], atol=1e-3)


def test_detaching_gives_the_base_back(base: BaseModel) -> None:
    """The very same modules and outputs, also after an error."""
    bank = bottleneck_bank(base, [spec()])
    before, tokens = dict(base.model.named_modules()), torch.arange(6)[None]
    said = base.model(tokens).logits

    with pytest.raises(KeyError), bank.attached(base, Cohort(1, bank.width, base.model.device, base.model.dtype)):
        raise KeyError

    assert dict(base.model.named_modules()) == before
    assert not any("forward" in vars(module) for module in base.model.modules())
    assert torch.equal(base.model(tokens).logits, said)


def test_the_places_are_where_a_layer_adds_to_its_stream() -> None:
    """Found by trying: a block, a linear inside a block that adds by itself, a norm behind a block."""
    mpt = MptForCausalLM(MptConfig(vocab_size=WORDS, d_model=32, n_layers=1, n_heads=4))
    gemma = Gemma2ForCausalLM(
        Gemma2Config(vocab_size=WORDS, hidden_size=32, intermediate_size=56, num_hidden_layers=1, num_attention_heads=4,
                     num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    )  # fmt: skip

    found = [[place.name for place in residual_places(freeze(model, None))] for model in (mpt, gemma)]

    assert found == [
        ["transformer.blocks.0.attn", "transformer.blocks.0.ffn.down_proj"],
        ["model.layers.0.post_attention_layernorm", "model.layers.0.post_feedforward_layernorm"],
    ]


def test_what_the_base_does_not_have_cannot_be_adapted(llama_base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before the first step, with what to do."""
    with pytest.raises(TrainingError, match="none of layers.*lower layer numbers"):
        bottleneck_bank(llama_base, [spec(layers=[7])])

    monkeypatch.setattr("lora_core.banks.residuals.decoder_layers", lambda base: [])
    with pytest.raises(TrainingError, match="no place.*method=lora"):
        bottleneck_bank(llama_base, [spec()])


@pytest.mark.parametrize("wider", [0, 5])
@pytest.mark.parametrize("biases", [True, False])
def test_tensors_and_rows_are_two_ways_to_say_the_same(base: BaseModel, wider: int, biases: bool) -> None:
    """Also through a wider bank with other activations."""
    method = spec(biases=biases, layers=[1], placement="pfeiffer")
    bank = bottleneck_bank(base, [method, spec(non_linearity="relu")], method.width + wider)

    for row_P in (bank.start_row(method, 3), random_row(bank, method)):
        assert torch.equal(bank.from_tensors(bank.to_tensors(row_P, method), method), row_P)


@pytest.mark.parametrize("act", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("biases", [True, False])
def test_what_a_user_does_not_have_stays_zero_through_training(llama_base: BaseModel, act: str, biases: bool) -> None:
    """No masks are needed: a narrow user of one layer in a bank of wide ones of all."""
    small = user(1, width=2, layers=(0,), placement="pfeiffer", non_linearity=act, biases=biases)
    method = small.recipe.method
    assert isinstance(method, BottleneckSpec)
    bank = bottleneck_bank(llama_base, [method, spec(width=8, non_linearity="silu")])

    (trained,) = train(llama_base, [small], 2, T, bank)

    row_P = bank.from_tensors(bank.to_tensors(trained.row_P, method), method)
    switches = 1 + biases
    assert torch.equal(row_P, trained.row_P)
    assert int((row_P != 0).sum()) - switches == bank.parameters(method) == 2 * 2 * 32 + biases * (2 + 32)


def test_reduction_is_the_bases_width_over_it(llama_base: BaseModel) -> None:
    """As AdapterHub spells it."""
    method = spec(reduction_factor=16)

    bank = bottleneck_bank(llama_base, [method])

    assert bank.size == 32 // 16
    assert bank.parameters(method) == 4 * (2 * 2 * 32 + 2 + 32)


def random_user(generator: random.Random, name: str) -> Learner:
    """Any user: width, places, layers, activation, biases, dropout, early stop."""
    choose = generator.choice
    recipe = settings(
        seed=generator.randrange(1000), width=choose([1, 3, 8, 16]), placement=choose(["houlsby", "pfeiffer"]),
        non_linearity=choose(["relu", "gelu", "swish"]), biases=choose([True, False]),
        layers=choose([None, (0,), (1,)]), dropout=choose([0, 0.3]), weight_decay=choose([0, 0.1]),
        epochs=generator.randrange(1, 4),
        patience=choose([None, 1]), batch_size=choose([1, 4]), batch_rows=choose([None, 2]),
        row_tokens=32, max_length=32,
    )  # fmt: skip
    held_out = examples(generator.randrange(10**6), generator.randrange(0, 4))
    data = examples(generator.randrange(10**6), choose([1, 4, 9]))
    return Learner(name, recipe, data, held_out, priority=generator.randrange(2))


@pytest.mark.parametrize("pack", range(16))
def test_a_user_is_the_same_alone_packed_taken_aside_killed_and_resumed(tmp_path: Path, pack: int) -> None:
    """Rows, losses and held-out losses, to the bit, at the same number of slots, row length and bank."""
    generator = random.Random(pack)
    base = freeze(ARCHITECTURES[generator.choice(["llama", "gpt2"])](), None)
    slots = generator.choice([1, 2, 4])
    cohort = [random_user(generator, f"user{number}") for number in range(generator.randrange(2, 7))]
    bank = bottleneck_bank(base, [one.recipe.method for one in cohort if isinstance(one.recipe.method, BottleneckSpec)])
    middle, one = generator.randrange(1, len(cohort)), generator.choice(cohort)

    alone = run(base, [one], slots, bank)[one.name]
    packed = run(base, cohort[:middle], slots, bank, cohort[middle:])[one.name]
    resumed = killed_and_resumed(base, cohort, slots, bank, tmp_path, generator.randrange(1, 9), ROW_TOKENS)[one.name]

    for other in (packed, resumed):
        assert torch.equal(alone.row_P, other.row_P)
        assert (alone.losses, alone.held_out, alone.outcome) == (other.losses, other.held_out, other.outcome)


@pytest.mark.parametrize(("half", "width"), [(True, 8), (False, 256)])
def test_a_neighbour_who_drops_inputs_changes_nobody(half: bool, width: int) -> None:
    """What is rounded when must not depend on whether there are masks: in bf16 it shows at once, in fp32 where wide."""
    base = freeze(llama().to(torch.bfloat16) if half else llama(), None)
    mine, other = (user(seed, width=width, dropout=dropout) for seed, dropout in ((1, 0.0), (2, 0.1)))
    bank = bottleneck_bank(base, [spec(width=width)])

    (alone,) = train(base, [mine], 2, T, bank)
    packed = {one.name: one for one in train(base, [mine, other], 2, T, bank)}[mine.name]

    assert torch.equal(alone.row_P, packed.row_P)


@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_a_broken_neighbour_changes_nobody(base: BaseModel, act: str) -> None:
    """NaN weights: the others' bytes stay as they were, and it is retired."""
    good = [user(1, non_linearity=act), user(2)]
    bank = bottleneck_bank(base, [spec(non_linearity=act), spec()])
    bad = replace(user(66), start=torch.full((bank.width,), torch.nan))
    expected = {one.name: one.row_P for one in train(base, good, 3, T, bank)}

    found = {one.name: one for one in train(base, [good[0], bad, good[1]], 3, T, bank)}

    assert found["user66"].outcome == "retired"
    assert all(torch.equal(found[name].row_P, row_P) for name, row_P in expected.items())


def test_checkpointing_changes_no_byte(base: BaseModel) -> None:
    """Masks come out the same the second time."""
    learners = [user(seed, dropout=0.2) for seed in (1, 2, 3)]
    plain = {one.name: one.row_P for one in train(base, learners, 2, T)}

    with checkpointed(base):
        forgetful = {one.name: one.row_P for one in train(base, learners, 2, T)}

    assert all(torch.equal(plain[name], row_P) for name, row_P in forgetful.items())


def test_lower_layers_are_computed_once_and_change_no_byte() -> None:
    """A bank says which layers it adapts, so what lies under them is kept."""
    base = freeze(llama(), None)
    learners = [user(seed, layers=(1,), epochs=4, batch_rows=1) for seed in (1, 2)]
    plain = {one.name: one.row_P for one in train(base, learners, 2, T)}
    bank = bottleneck_bank(base, [spec(layers=(1,))])

    lower = LowerLayers(base, bank, RowStore(RowMemory(1 << 24), lambda: 0.0, None))
    kept = {one.name: one.row_P for one in train(base, learners, 2, T, bank, compute=lower.read_rows)}

    assert lower.first == 1
    assert all(torch.equal(plain[name], row_P) for name, row_P in kept.items())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("forget", [False, True])
def test_the_predicted_peak_is_the_measured_one(dropout: float, forget: bool) -> None:
    """Within a quarter of a percent, against torch's own profiler."""
    setting = Setting("llama", 3, 4, 4, 64, 0, "all-linear", dropout, forget)
    base = make_base(setting, "cpu")
    bank = bottleneck_bank(base, [spec(width=16)])

    predicted = predict(base, bank, setting.slots, setting.row_tokens, dropout > 0, forget)

    assert predicted == pytest.approx(measured(base, bank, setting), rel=0.0025)


def test_generation_with_a_cache_says_what_a_whole_pass_says(base: BaseModel) -> None:
    """One token at a time, among other users, as recomputing everything does."""
    method = spec()
    bank = bottleneck_bank(base, [method])
    rows, prompt = [random_row(bank, method, seed) for seed in (1, 2)], torch.arange(5)[None]
    cohort = Cohort(2, bank.width, base.model.device, base.model.dtype)
    for slot, row_P in enumerate(rows):
        cohort.admit(slot, row_P, 1.0)
    ask = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    with bank.attached(base, cohort), torch.inference_mode():
        cached, whole = (
            base.model.generate(prompt.expand(2, -1), attention_mask=torch.ones(2, 5), use_cache=cache, **ask)
            for cache in (True, False)
        )

    assert torch.equal(cached, whole)
    assert not torch.equal(cached[0], cached[1])


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch compiles for a CPU with a C++ compiler")
def test_compiled_layers_learn_the_same(base: BaseModel) -> None:
    """Losses as without; equal bytes alone, among neighbours, and with checkpointing."""
    short = {"row_tokens": 32, "max_length": 32}
    mine, others = user(1, width=3, non_linearity="silu", **short), [user(seed, width=2, **short) for seed in (2, 3, 4)]
    bank = bottleneck_bank(base, [spec(width=3, non_linearity="silu"), spec(width=2)])
    plain = run(base, [mine], 3, bank)["user1"]

    with compiled(base):
        alone, packed = run(base, [mine], 3, bank)["user1"], run(base, [*others, mine], 3, bank)["user1"]
        with checkpointed(base):
            forgetful = run(base, [mine], 3, bank)["user1"]

    assert [loss for _, loss in alone.losses] == pytest.approx([loss for _, loss in plain.losses], abs=1e-4)
    assert torch.equal(alone.row_P, packed.row_P)
    assert torch.equal(alone.row_P, forgetful.row_P)
