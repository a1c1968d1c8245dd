"""A LoRA row: what it does to the forward pass, and that it comes back as it was."""

import pytest
import torch

from lora_core.banks.lora import LoraBank, lora_bank
from lora_core.base_model import BaseModel
from lora_core.cohort import Cohort
from lora_core.data.packing import pack
from lora_core.errors import TrainingError
from lora_core.forward import token_losses
from tests.lora_core.conftest import T, examples, lora_of, recipe
from tests.lora_core.test_peft_parity import our_logits, random_row


def test_a_fresh_row_is_the_base_exactly(base: BaseModel) -> None:
    """B = 0: the first step starts from the base's own logits, to the bit."""
    spec = lora_of(recipe())
    bank = lora_bank(base, [spec])
    tokens = torch.tensor([examples(1)[0].tokens])
    cohort = Cohort(3, bank.width, base.model.device, base.model.dtype)
    for slot in range(3):
        cohort.admit(slot, bank.start_row(spec, slot), spec.scale)

    with torch.inference_mode():
        plain = base.model(tokens.expand(3, -1)).logits
        with bank.attached(base, cohort):
            fresh = base.model(tokens.expand(3, -1)).logits

    assert torch.equal(plain, fresh)


def test_detaching_gives_the_base_back(base: BaseModel) -> None:
    """The very same modules, also after an error."""
    bank = LoraBank(base.sites, 2)
    before = dict(base.model.named_modules())

    with pytest.raises(KeyError), bank.attached(base, Cohort(1, bank.width, base.model.device, base.model.dtype)):
        raise KeyError

    assert dict(base.model.named_modules()) == before


@pytest.mark.parametrize("wider", [0, 5])
def test_tensors_and_rows_are_two_ways_to_say_the_same(base: BaseModel, wider: int) -> None:
    """Also through a bank of another rank."""
    spec = lora_of(recipe())
    bank = LoraBank(base.sites, spec.rank + wider)
    row_P = random_row(bank, spec)

    assert torch.equal(bank.from_tensors(bank.to_tensors(row_P, spec), spec), row_P)


def test_unused_ranks_and_sites_stay_zero_through_training(llama_base: BaseModel) -> None:
    """No masks are needed: zero rows and columns have zero gradient."""
    from lora_core.train import train
    from tests.lora_core.conftest import learner

    small = learner(1, rank=2, targets=("q_proj",), layers=(0,), weight_decay=0.1)
    spec, bank = lora_of(small.recipe), LoraBank(llama_base.sites, 8)

    (trained,) = train(llama_base, [small], 2, T, bank)

    assert torch.equal(bank.from_tensors(bank.to_tensors(trained.row_P, spec), spec), trained.row_P)
    assert int((trained.row_P != 0).sum()) == bank.parameters(spec) == 2 * (32 + 32)


def test_a_document_does_not_see_its_neighbours_in_the_row(base: BaseModel) -> None:
    """Attention and positions restart at each example."""
    data = examples(4, count=3, longest=14)
    together = base.stack(pack(list(enumerate(data)), T))
    losses_KT, _ = token_losses(base, together)

    start = 0
    for number, one in enumerate(data):
        alone_KT, _ = token_losses(base, base.stack(pack([(number, one)], T)))
        length = len(one.tokens)
        torch.testing.assert_close(losses_KT[0, start : start + length], alone_KT[0, :length], atol=1e-5, rtol=1e-5)
        start += length


def test_a_rows_losses_do_not_depend_on_the_other_rows(base: BaseModel) -> None:
    """To the bit, whatever the neighbours hold."""
    (mine,), (theirs,) = pack([(0, examples(1)[0])], T), pack([(0, examples(2)[0])], T)
    with torch.inference_mode():
        one, _ = token_losses(base, base.stack([mine, theirs]))
        two, _ = token_losses(base, base.stack([mine, mine]))

    assert torch.equal(one[0], two[0])


def test_an_adapter_in_one_slot_leaves_the_next_slot_the_base(base: BaseModel) -> None:
    """Row k is slot k's, nobody else's."""
    spec = lora_of(recipe())
    bank = lora_bank(base, [spec])
    tokens = torch.tensor([examples(1)[0].tokens])
    cohort = Cohort(2, bank.width, base.model.device, base.model.dtype)
    cohort.admit(1, random_row(bank, spec), spec.scale)

    with bank.attached(base, cohort), torch.inference_mode():
        both = base.model(tokens.expand(2, -1)).logits

    with torch.inference_mode():
        assert torch.equal(both[0], base.model(tokens.expand(2, -1)).logits[0])
    assert torch.equal(both[1:], our_logits(base, bank, random_row(bank, spec), spec.scale, tokens))


@pytest.mark.parametrize(("settings", "words"), [({"targets": "nope"}, "choose from"), ({"layers": [7]}, "layers")])
def test_what_the_base_does_not_have_cannot_be_adapted(
    llama_base: BaseModel, settings: dict[str, object], words: str
) -> None:
    """Said before the first step, with what there is."""
    with pytest.raises(TrainingError, match=words):
        lora_bank(llama_base, [lora_of(recipe(**settings))])


def mask(cohort: Cohort, site: int = 0) -> torch.Tensor:
    """The dropout mask of one site for T x 64 inputs."""
    found = cohort.dropout_mask(torch.tensor(site), torch.zeros(cohort.slots, T, 64))
    assert found is not None
    return found


def test_dropout_depends_on_the_users_own_key_alone() -> None:
    """Not on the slot, the neighbours or any generator's state; it differs by site and by step."""
    here, there = Cohort(2, 4, torch.device("cpu"), torch.float32), Cohort(5, 4, torch.device("cpu"), torch.float32)
    here.set_dropout([0.3, 0.0], [11, 12])
    there.set_dropout([0.5, 0.1, 0.2, 0.3, 0.3], [1, 2, 3, 11, 13])

    assert torch.equal(mask(here)[0], mask(there)[3])
    assert not torch.equal(mask(there)[3], mask(there)[4])
    assert not torch.equal(mask(here)[0], mask(here, site=1)[0])
    assert torch.equal(mask(here)[1], torch.ones(T, 64))


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    """What is kept is scaled up."""
    cohort = Cohort(1, 4, torch.device("cpu"), torch.float32)
    cohort.set_dropout([0.25], [99])

    dropped = torch.cat([mask(cohort, site) for site in range(40)])

    assert float((dropped == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.02)
