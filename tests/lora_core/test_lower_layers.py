"""What lies under the first adapted layer is computed once, and nobody can tell from the bytes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lora_core.banks.table import make_bank
from lora_core.base_model import BaseModel, freeze
from lora_core.data.packing import DenseRows
from lora_core.learner import Learner, Trained
from lora_core.lower_layers import LowerLayers
from lora_core.row_store import RowFolder, RowMemory, RowStore
from lora_core.train import train
from tests.lora_core.conftest import WORDS, T, examples, learner

K = 3
PLENTY = 1 << 24  # bytes
ROW = T * 32 * 4  # bytes of a row's states


def tall_llama() -> PreTrainedModel:
    """Four layers."""
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=56, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def tall_gpt2() -> PreTrainedModel:
    """Four layers."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_embd=32, n_layer=4, n_head=4, n_positions=128))


@pytest.fixture(params=[tall_llama, tall_gpt2])
def tall(request: pytest.FixtureRequest) -> BaseModel:
    """A frozen base of four layers, of each architecture in turn."""
    torch.manual_seed(0)
    return freeze(request.param(), None, digest="d" * 64)


@pytest.fixture
def llama4() -> BaseModel:
    """A frozen Llama of four layers."""
    torch.manual_seed(0)
    return freeze(tall_llama(), None, digest="d" * 64)


def learners(**settings: Any) -> list[Learner]:  # a recipe's
    """Five users for three slots, of unlike sizes, who adapt the top layer or the two top ones."""
    shared: dict[str, Any] = {
        "epochs": 3,
        "held_out": 4,
        "patience": 3,
        "batch_rows": 2,
        "layers": (2, 3),
        **settings,
    }
    return [learner(seed, count=4 + 5 * seed, **shared) for seed in range(4)] + [
        learner(9, count=6, **{**shared, "layers": (3,)})
    ]


def lower_layers(base: BaseModel, users: Sequence[Learner], store: RowStore) -> LowerLayers:
    """The lower layers of a cohort."""
    return LowerLayers(base, make_bank(base, [user.recipe.method for user in users]), store)


def kept(budget: int = PLENTY, folder: RowFolder | None = None, **seconds: float) -> RowStore:
    """A store whose clock stands still, or goes on by `tick` each time it is read."""
    ticks = count()
    return RowStore(RowMemory(budget), lambda: next(ticks) * seconds.get("tick", 0.0), folder)


def run(base: BaseModel, users: Sequence[Learner], lower: LowerLayers | None = None) -> dict[str, Trained]:
    """Train packed, with or without keeping lower states; results by name."""
    compute = lower.read_rows if lower else None
    return {trained.name: trained for trained in train(base, users, K, T, compute=compute)}


@contextmanager
def counted(base: BaseModel) -> Iterator[list[int]]:
    """How often the lowest layer's attention runs: it does in a computation, and not where rows enter above."""
    runs = [0]
    attention = next(module for name, module in base.model.named_modules() if name.endswith(("0.self_attn", "0.attn")))
    hook = attention.register_forward_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
    yield runs
    hook.remove()


def assert_same(found: dict[str, Trained], expected: dict[str, Trained]) -> None:
    """Every user's row, losses and examinations are equal to the bit."""
    assert found.keys() == expected.keys()
    for name, trained in found.items():
        assert torch.equal(trained.row_P, expected[name].row_P)
        assert (trained.losses, trained.held_out) == (expected[name].losses, expected[name].held_out)


@pytest.mark.parametrize("batch_rows", [1, 2, None])
def test_kept_states_change_no_byte(tall: BaseModel, batch_rows: int | None) -> None:
    """Three epochs with dropout, examinations, users of unlike sizes and a waiting list."""
    users = learners(batch_rows=batch_rows)

    found = run(tall, users, lower_layers(tall, users, kept()))

    assert_same(found, run(tall, users))


def test_each_row_passes_the_lower_layers_once(tall: BaseModel) -> None:
    """However often it is read, and newcomers' rows fill a computation that one of them needs."""
    users = learners()
    lower = lower_layers(tall, users, kept())
    rows = sum(len(DenseRows(user.train, T)) for user in users)
    held_out = len(users)  # a row each

    with counted(tall) as runs:
        run(tall, users, lower)

    assert lower.first == 2
    assert (rows + held_out) / K <= runs[0] <= (rows + held_out) / K + 2 * len(users)
    with counted(tall) as without:
        run(tall, users)
    assert runs[0] < without[0] / 2


def test_a_second_training_of_the_same_data_runs_no_lower_layer(tall: BaseModel) -> None:
    """Another rate is another trial; the rows are the same."""
    store = kept()
    run(tall, learners(), lower_layers(tall, learners(), store))
    trial = learners(learning_rate=1e-3, alpha=32, rank=8)
    lower = lower_layers(tall, trial, store)

    with counted(tall) as runs:
        found = run(tall, trial, lower)

    assert runs[0] == 0
    assert_same(found, run(tall, trial))


def test_a_later_process_finds_them_on_disk(tall: BaseModel, tmp_path: Path) -> None:
    """Nothing in memory, a new folder object, the same bytes."""
    run(tall, learners(), lower_layers(tall, learners(), kept(folder=RowFolder(tmp_path, PLENTY))))
    store = kept(folder=RowFolder(tmp_path, PLENTY))
    store.compute(lambda: torch.zeros(1), 1)
    lower = lower_layers(tall, learners(), store)

    with counted(tall) as runs:
        found = run(tall, learners(), lower)

    assert runs[0] == 0
    assert store.loaded.rows > 0
    assert_same(found, run(tall, learners()))


def test_rows_that_do_not_come_again_are_not_kept(llama4: BaseModel) -> None:
    """Batches of examples are packed anew in every epoch: keeping them would push out what helps."""
    users = [learner(1, count=12, batch_size=4, epochs=3, layers=(3,))]
    store = kept()

    run(llama4, users, lower_layers(llama4, users, store))

    assert store.memory.used <= ROW  # of an idle slot


def test_a_small_budget_is_respected(llama4: BaseModel) -> None:
    """With room for four rows, four are kept, and nothing else changes."""
    store = kept(budget=4 * ROW + 10)

    found = run(llama4, learners(), lower_layers(llama4, learners(), store))

    assert store.memory.used == 4 * ROW
    assert_same(found, run(llama4, learners()))


def test_an_adapter_on_the_lowest_layer_leaves_nothing_to_keep(llama4: BaseModel) -> None:
    """One user of the cohort is enough; training goes on as ever."""
    users = [*learners(), learner(77, layers=(0, 3))]
    store = kept()
    lower = lower_layers(llama4, users, store)

    found = run(llama4, users, lower)

    assert (lower.first, store.memory.used) == (0, 0)
    assert_same(found, run(llama4, users))


def test_a_base_whose_upper_layers_look_further_down_is_computed_whole(llama4: BaseModel) -> None:
    """Tried, not believed: here the top layer adds what the lowest one gave."""
    layers = llama4.model.get_submodule("model.layers")
    seen: list[torch.Tensor] = []
    layers[0].self_attn.register_forward_hook(lambda _, __, output: seen.append(output[0]))
    layers[3].register_forward_hook(lambda _, __, output: output + seen.pop() if seen else output * 2)

    lower = lower_layers(llama4, learners(), kept())

    assert lower.first == 0


def test_other_bases_and_shapes_have_other_states(llama4: BaseModel) -> None:
    """One store may serve a whole worker: a base without a digest shares with nobody."""
    store = kept()
    run(llama4, learners(), lower_layers(llama4, learners(), store))
    torch.manual_seed(1)
    others = [freeze(tall_llama(), None), freeze(tall_llama(), None), freeze(tall_llama(), None, digest="e" * 64)]

    for other in others:
        found = run(other, learners(), lower_layers(other, learners(), store))
        assert_same(found, run(other, learners()))


def test_layers_are_put_back(llama4: BaseModel) -> None:
    """Also those that had a forward of their own, as a dispatched model's have, and after an error."""
    layers = list(llama4.model.get_submodule("model.layers").children())
    own = layers[1].forward
    layers[1].forward = own  # as accelerate does
    lower = lower_layers(llama4, learners(), kept())

    with pytest.raises(ZeroDivisionError), lower.entered(torch.zeros(K, T, 32)):
        raise ZeroDivisionError

    assert [vars(layer).get("forward") for layer in layers] == [None, own, None, None]


def test_a_broken_file_is_a_miss(tmp_path: Path) -> None:
    """Cut, flipped, empty, or another row's under this name: computed again, no error."""
    folder = RowFolder(tmp_path, PLENTY)
    hidden_TD = torch.randn(T, 32).bfloat16()
    folder.save("context/row", hidden_TD)
    sound = (tmp_path / "context/row").read_bytes()
    flipped = bytes([*sound[:-1], sound[-1] ^ 1])
    assert torch.equal(folder.load("context/row"), hidden_TD)  # type: ignore[arg-type]  # it is there

    for broken in (sound[:-1], flipped, b"", sound[:32]):
        (tmp_path / "context/row").write_bytes(broken)
        assert folder.load("context/row") is None
        assert "context/row" not in folder
    (tmp_path / "context/other").write_bytes(sound)
    assert folder.load("context/other") is None


def test_training_goes_on_over_broken_files(llama4: BaseModel, tmp_path: Path) -> None:
    """And the bytes are those of a training without any."""
    run(llama4, learners(), lower_layers(llama4, learners(), kept(folder=RowFolder(tmp_path, PLENTY))))
    for file in tmp_path.glob("*/*"):
        file.write_bytes(file.read_bytes()[:-5])

    found = run(llama4, learners(), lower_layers(llama4, learners(), kept(folder=RowFolder(tmp_path, PLENTY))))

    assert_same(found, run(llama4, learners()))
    folder = RowFolder(tmp_path, PLENTY)
    assert all(folder.load(f"{file.parent.name}/{file.name}") is not None for file in tmp_path.glob("*/*"))  # mended


def test_a_disk_that_is_slower_than_computing_is_given_up(llama4: BaseModel, tmp_path: Path) -> None:
    """A load takes one tick and so does a computation of K rows, so a row is computed in less."""
    run(llama4, learners(), lower_layers(llama4, learners(), kept(folder=RowFolder(tmp_path, PLENTY))))
    store = kept(folder=RowFolder(tmp_path, PLENTY), tick=1.0)

    found = run(llama4, learners(), lower_layers(llama4, learners(), store))

    assert store.folder is None
    assert store.loaded.rows + store.saved.rows <= 2 * RowStore.TRIED
    assert_same(found, run(llama4, learners()))


def test_a_disk_that_cannot_be_written_is_given_up(llama4: BaseModel, tmp_path: Path) -> None:
    """A file stands where the folder should be."""
    (tmp_path / "file").write_text("")
    store = kept(folder=RowFolder(tmp_path / "file", PLENTY))

    found = run(llama4, learners(), lower_layers(llama4, learners(), store))

    assert store.folder is None
    assert_same(found, run(llama4, learners()))


def test_a_full_folder_makes_room_for_the_newest_and_can_be_cleared(tmp_path: Path) -> None:
    """Not above its budget, whoever filled it; forgetting a user clears it."""
    size = 32 + len(RowFolder(tmp_path, 0).path.name) + ROW + 200  # a little more than a file
    for number in range(20):
        folder = RowFolder(tmp_path, 6 * size)
        folder.save(f"context/{number}", torch.full((T, 32), float(number)))
        assert sum(file.stat().st_size for file in tmp_path.glob("*/*")) <= 6 * size

    assert folder.load("context/19") is not None
    assert folder.load("context/0") is None
    folder.clear()
    assert not list(tmp_path.glob("*/*"))


def test_a_row_is_named_by_tokens_positions_and_documents() -> None:
    """Two documents are not one, whatever their tokens."""
    rows = DenseRows(examples(1, 12), T)
    again = DenseRows(examples(1, 12), T)

    assert [row.digest for row in rows] == [row.digest for row in again]
    assert len({row.digest for row in rows}) == len(rows)
