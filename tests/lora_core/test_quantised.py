"""Bases in 4 or 8 bits and bases on several devices: other weights, the same bank."""

import hashlib
from pathlib import Path
from statistics import fmean

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lora_core import base_files
from lora_core.banks.lora import LoraBank, lora_bank
from lora_core.banks.lora_sites import Link, LoraGroup, LoraSite, Lows, Sums
from lora_core.base_files import fingerprint
from lora_core.base_model import BaseModel, check_device, load_base, outline
from lora_core.cohort import Cohort
from lora_core.data.packing import pack
from lora_core.errors import BaseModelError, ExportRefused, TrainingError
from lora_core.export import merge
from lora_core.forward import token_losses
from lora_core.full_tuning import trainable
from lora_core.learner import Learner
from lora_core.quantised import quantisation
from lora_core.train import train
from tests.lora_core.conftest import CHATML, WORDS, T, examples, learner, lora_of, make_tokenizer, recipe
from tests.lora_core.test_peft_parity import load_row, padded, peft_model

STEPS = 20
ROOMY = {"vocab_size": WORDS, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of hidden size 64 on disk: bitsandbytes packs 64 numbers under one scale."""
    torch.manual_seed(0)
    made = tmp_path_factory.mktemp("base") / "llama"
    model = LlamaForCausalLM(
        LlamaConfig(**ROOMY, hidden_size=64, intermediate_size=112, num_key_value_heads=2, attention_bias=True)
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(made)
    make_tokenizer(CHATML).save_pretrained(made)
    return made


@pytest.fixture(scope="session", params=["4bit", "8bit"])
def packed(request: pytest.FixtureRequest, folder: Path) -> BaseModel:
    """The base in few bits, each way in turn."""
    return load_base(str(folder), quantise=request.param)


@pytest.fixture(scope="session")
def packed_files(packed: BaseModel, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose files are in few bits already, as hubs have them."""
    made = tmp_path_factory.mktemp("packed") / packed.quantised
    how = quantisation(packed.quantised, torch.float32)
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, device_map={"": "cpu"}).save_pretrained(made)
    make_tokenizer(CHATML).save_pretrained(made)
    return made


def digest(row_P: Tensor) -> str:
    """SHA-256 of a row."""
    return hashlib.sha256(row_P.numpy().tobytes()).hexdigest()


def test_a_quantised_base_has_the_same_sites_and_numbers_in_less_memory(folder: Path, packed: BaseModel) -> None:
    """The bank must not see how few bits a number has; whoever resolves a version must."""
    plain = load_base(str(folder))

    assert packed.sites == plain.sites
    assert packed.parameters == plain.parameters
    assert packed.plain_head
    assert packed.digest == fingerprint(folder, packed.quantised)
    assert len({fingerprint(folder, quantise) for quantise in ("", "4bit", "8bit")}) == 3
    sizes = [
        sum(p.untyped_storage().nbytes() for p in base.model.model.layers.parameters()) for base in (packed, plain)
    ]
    assert sizes[0] < sizes[1] * {"4bit": 0.15, "8bit": 0.28}[packed.quantised]


def test_a_base_whose_files_are_packed_is_a_quantised_one(packed: BaseModel, packed_files: Path) -> None:
    """Nobody asked for it, but a delta must not be rounded into packed numbers, nor these be trained."""
    base = load_base(str(packed_files))

    assert (base.quantised, base.sites, base.digest) == (packed.quantised, packed.sites, fingerprint(packed_files))
    assert outline(packed_files).quantised == packed.quantised
    with pytest.raises(ExportRefused, match=f"{packed.quantised} weights"):
        merge(base, {})
    with pytest.raises(TrainingError, match=f"weights in {packed.quantised} cannot be trained"):
        trainable(base)


def test_a_base_whose_files_are_packed_is_packed_no_other_way(packed: BaseModel, packed_files: Path) -> None:
    """It would keep its own bits, under the digest of others."""
    other = {"4bit": "8bit", "8bit": "4bit"}[packed.quantised]

    with pytest.raises(BaseModelError, match=f"files are in {packed.quantised} already; unset LORA_QUANTISE"):
        load_base(str(packed_files), quantise=other)


def test_a_fresh_row_is_the_quantised_base_exactly(packed: BaseModel) -> None:
    """B = 0, to the bit, also where a site has a bias."""
    spec = lora_of(recipe())
    bank = lora_bank(packed, [spec])
    tokens = torch.tensor([examples(1)[0].tokens]).expand(3, -1)
    cohort = Cohort(3, bank.width, packed.model.device, packed.model.dtype)
    for slot in range(3):
        cohort.admit(slot, bank.start_row(spec, slot), spec.scale)

    with torch.inference_mode():
        plain = packed.model(tokens).logits
        with bank.attached(packed, cohort):
            assert torch.equal(plain, packed.model(tokens).logits)


def test_a_quantised_base_answers_nearly_as_bitsandbytes_own_modules_do(folder: Path, packed: BaseModel) -> None:
    """Only the rounding differs: theirs also rounds activations in 8 bits."""
    tokens = torch.tensor([examples(1)[0].tokens])
    theirs = bitsandbytes_model(folder, packed.quantised)

    expected = theirs(tokens).logits

    tolerance = {"4bit": 1e-5, "8bit": 2e-2}[packed.quantised]
    torch.testing.assert_close(packed.model(tokens).logits, expected, atol=tolerance, rtol=tolerance)


def test_a_row_does_not_feel_a_neighbours_outliers(packed: BaseModel) -> None:
    """LLM.int8's own product treats a column differently when anybody in the batch has an outlier in it."""
    linear = packed.model.get_submodule(packed.sites[0].name)
    x_KTI = torch.randn(2, T, 64, generator=torch.Generator().manual_seed(0))
    loud_KTI = torch.stack([x_KTI[0], x_KTI[1] * 100])

    assert torch.equal(linear(x_KTI)[0], linear(loud_KTI)[0])


def test_reading_leaves_the_weights_as_they_were(packed: BaseModel) -> None:
    """bitsandbytes' own 4-bit module repacks them when some CPUs first run it without gradient."""
    tokens = torch.tensor([examples(1)[0].tokens])
    before = packed.model(tokens).logits

    with torch.inference_mode():
        read = packed.model(tokens).logits

    assert torch.equal(before, read)
    assert torch.equal(before, packed.model(tokens).logits)


def test_a_user_learns_the_same_adapter_packed_or_alone(packed: BaseModel) -> None:
    """Sharing a quantised base changes nobody's bytes either; and there is something learnt."""
    bank = LoraBank(packed.sites, 4)
    users = [learner(seed, epochs=6, learning_rate=1e-2) for seed in (1, 2, 3)]

    (alone,) = train(packed, [users[1]], 3, T, bank)
    together = {one.name: one for one in train(packed, users, 3, T, bank)}

    assert digest(together["user2"].row_P) == digest(alone.row_P)
    losses = [loss for _, loss in alone.losses]
    assert fmean(losses[-3:]) < fmean(losses[:3]) - 0.1


def bitsandbytes_model(folder: Path, quantise: str) -> LlamaForCausalLM:
    """The base as bitsandbytes runs it: in training mode, which keeps it from repacking itself."""
    model: LlamaForCausalLM = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=quantisation(quantise, torch.float32), device_map={"": "cpu"}
    )
    return model.train()


def test_20_steps_lose_what_peft_loses_on_bitsandbytes(folder: Path) -> None:
    """QLoRA by PEFT's own Linear4bit, same start, same data: every loss within 1e-4."""
    base = load_base(str(folder), quantise="4bit")
    settings = recipe(dropout=0, epochs=STEPS, batch_size=8, learning_rate=3e-3, weight_decay=0.0, warmup=0.0,
                      schedule="constant")  # fmt: skip
    data = examples(3, count=8)
    bank = lora_bank(base, [lora_of(settings)])
    theirs = peft_model(bitsandbytes_model(folder, "4bit"), lora_of(settings)).train()
    load_row(theirs, bank.to_tensors(bank.start_row(lora_of(settings), settings.seed), lora_of(settings)))
    parameters = [p for p in theirs.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)

    expected = []
    tokens, mask, labels = padded(data)
    for _ in range(STEPS):
        loss = theirs(input_ids=tokens, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
        optimiser.step()
        optimiser.zero_grad()
        expected.append(loss.item())
    (trained,) = train(base, [Learner("me", settings, data)], 2, T, bank)

    ours = [loss for _, loss in trained.losses]
    assert len(ours) == STEPS
    assert "4bit" in type(theirs.base_model.model.model.layers[0].mlp.up_proj).__name__
    assert max(abs(a - b) for a, b in zip(ours, expected, strict=True)) < 1e-4
    assert ours[-1] < ours[0] - 0.1


@pytest.mark.parametrize("missing", ["bitsandbytes", "accelerate"])
def test_a_missing_library_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    """With what to install, before anything is loaded."""
    monkeypatch.setattr(base_files, "find_spec", lambda name: None if name == missing else name)

    with pytest.raises(BaseModelError, match=rf"{missing}.*lora-factory\[quantise\]"):
        load_base(str(folder), quantise="4bit")


def test_an_unknown_quantisation_is_told(folder: Path) -> None:
    """With what there is."""
    with pytest.raises(BaseModelError, match="'2bit'; give 4bit or 8bit"):
        load_base(str(folder), quantise="2bit")


def test_a_quantised_conv1d_is_a_linear(tmp_path: Path) -> None:
    """GPT-2's weights lie the other way round; packed they do not, and its head stays tied to the embeddings."""
    GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_embd=64, n_layer=1, n_head=4, n_positions=128)).save_pretrained(
        tmp_path
    )
    make_tokenizer(CHATML).save_pretrained(tmp_path)
    whole, base = load_base(str(tmp_path)), load_base(str(tmp_path), quantise="8bit")
    row = pack([(0, examples(1)[0])], T)[0]

    assert base.sites == whole.sites
    assert (whole.transposed, base.transposed) == (True, False)
    assert base.plain_head
    losses_KT, _ = token_losses(base, base.stack([row]))
    torch.testing.assert_close(losses_KT, token_losses(whole, whole.stack([row]))[0], atol=1e-2, rtol=1e-2)


def test_auto_is_handed_to_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which spreads the layers over the GPUs by accelerate; without a GPU it is the CPU."""
    asked: dict[str, object] = {}

    def from_pretrained(_: Path, **settings: object) -> None:
        asked.update(settings)
        raise OSError("no GPU here")

    assert check_device("auto") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)

    with pytest.raises(BaseModelError, match="no GPU here"):
        load_base(str(folder), device="auto", quantise="4bit")

    assert asked["device_map"] == "auto"
    assert asked["quantization_config"] == quantisation("4bit", torch.bfloat16)
    assert asked["dtype"] == torch.bfloat16


def test_what_does_not_fit_on_the_gpus_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate would leave some weights on the CPU or the disk, where no site can read them."""
    with torch.device("meta"):
        left_out = LlamaForCausalLM(LlamaConfig(**ROOMY, hidden_size=64, intermediate_size=112))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: left_out)

    with pytest.raises(BaseModelError, match="does not fit.*LORA_QUANTISE"):
        load_base(str(folder), device="auto")


def test_a_sites_factors_follow_its_layer_to_another_gpu() -> None:
    """Two GPUs that torch only pretends to have: mixing their tensors raises, so nothing here mixes them."""
    with FakeTensorMode(), torch.no_grad():
        here, there = torch.device("cuda:0"), torch.device("cuda:1")
        cohort = Cohort(2, 4 * (64 + 112), here, torch.float32)
        cohort.drops = True
        # views of the matrix cannot be taken on a pretended device
        (down_KRI, up_KRO), gradients = (
            (torch.empty(2, 4, 64, device=here), torch.empty(2, 4, 112, device=here)) for _ in range(2)
        )
        linear = torch.nn.Linear(64, 112, device="meta")
        linear.weight = torch.nn.Parameter(torch.empty(112, 64, device=there))
        linear.bias = torch.nn.Parameter(torch.empty(112, device=there))
        x_KTI = torch.empty(2, T, 64, device=there)

        (down_gradient_KRI, up_gradient_KRO) = gradients
        group = LoraGroup([linear], down_KRI, [up_KRO], down_gradient_KRI, [up_gradient_KRO], cohort, 0)
        y_KTO = LoraSite(group, 0)(x_KTI)
        narrow, wide, link = Context(), Context(), Link(group, group.factors(there))
        low_KST = Lows.forward(narrow, x_KTI, down_KRI, cohort.dropout_mask(group.number, x_KTI), link)
        Sums.forward(wide, x_KTI, low_KST, link)
        Sums.backward(wide, torch.empty_like(y_KTO))
        x_g_KTI, *_ = Lows.backward(narrow, low_KST)

    assert y_KTO.device == torch.device("cuda:1")
    assert x_g_KTI is not None
    assert x_g_KTI.device == torch.device("cuda:1")
    assert down_gradient_KRI.device == torch.device("cuda:0")


class Context:
    """What torch hands to an autograd function: autograd itself does not run on pretended devices."""

    needs_input_grad = (True,)

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep what the backward pass needs."""
        self.saved_tensors = tensors
