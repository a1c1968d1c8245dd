"""Many users served from one base: an answer is the one that its request alone would get."""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lora_core import serving
from lora_core.banks.lora import LoraBank
from lora_core.base_model import BaseModel
from lora_core.decoding import GREEDY, Sampling, draw, end_tokens
from lora_core.errors import PromptRefused
from lora_core.serving import Adapter, Request, Server
from tests.lora_core.conftest import CHATML, WORDS, lora_of, make_tokenizer, recipe
from tests.lora_core.test_peft_parity import random_row

RANK = 6  # of the bank; users have it or a lower one


class Shelf:
    """Adapters by name, each of another rank; remembers what was asked for."""

    def __init__(self, base: BaseModel, count: int = 6) -> None:
        self.bank = LoraBank(base.sites, RANK)
        self.adapters = {f"user{seed}": self.made(seed) for seed in range(count)}
        self.loads: list[str] = []

    def made(self, seed: int) -> Adapter:
        """An adapter that does a lot to the base."""
        spec = lora_of(recipe(rank=1 + seed % RANK, alpha=16))
        return Adapter(random_row(self.bank, spec, seed) * 3, spec.scale)

    def __call__(self, name: str) -> Adapter:
        """As a server loads."""
        self.loads.append(name)
        return self.adapters[name]

    def server(self, base: BaseModel, slots: int) -> Server:
        """A server that loads from here."""
        return Server(base, self.bank, slots, self)


def request(generator: random.Random, adapters: Sequence[str | None], longest_prompt: int = 40) -> Request:
    """Any adapter or the base, any length of prompt and answer, greedy or not."""
    prompt = tuple(generator.randrange(WORDS) for _ in range(generator.randint(1, longest_prompt)))
    sampling = generator.choice([GREEDY, Sampling(0.9, 0.8, generator.randrange(99)), Sampling(1.4, 1.0, 7)])
    return Request(generator.choice(adapters), prompt, generator.randint(1, 24), sampling)


@pytest.mark.parametrize("seed", range(12))
def test_any_mix_is_answered_as_each_request_alone(base: BaseModel, seed: int) -> None:
    """Ranks, prompt lengths, limits, greedy and sampled rows, base rows, more requests than slots."""
    generator, shelf = random.Random(seed), Shelf(base)
    requests = [request(generator, [None, *shelf.adapters]) for _ in range(generator.randint(2, 9))]

    mixed = shelf.server(base, generator.randint(2, 5)).answer(requests)

    alone = shelf.server(base, 1)
    assert mixed == [alone.answer([one])[0] for one in requests]
    assert all(len(said) <= one.max_new_tokens for said, one in zip(mixed, requests, strict=True))


def logits_of(server: Server, requests: Sequence[Request], adapter: str) -> list[Tensor]:
    """The logits V behind every token of the one row of an adapter, in one batch."""
    seen: list[Tensor] = []

    def note(_: nn.Module, __: object, output: Tensor) -> None:
        seen.append(output[:, -1].clone())

    hook = server.base.model.get_output_embeddings().register_forward_hook(note)
    server.answer(requests)
    hook.remove()
    (slot,) = [slot for slot, held in server.seated.items() if held == adapter]
    return [logits_KV[slot] for logits_KV in seen]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("seed", range(6))
def test_a_rows_logits_have_the_same_bits_whoever_the_neighbours_are(base: BaseModel, seed: int) -> None:
    """At the same K and padded length: beside idle slots, beside strangers, beside one whose adapter is broken."""
    generator, shelf = random.Random(seed), Shelf(base)
    shelf.adapters["broken"] = Adapter(torch.full((shelf.bank.width,), torch.nan), 1.0)
    mine = Request("user3", tuple(generator.randrange(WORDS) for _ in range(generator.randint(1, 31))), 12)
    length = len(mine.prompt) // 16 * 16 + 15  # the longest that is padded to as much
    others = [request(generator, [None, "user1", "user2"], length) for _ in range(3)]
    full = replace(others[0], prompt=(3,) * length)

    alone = logits_of(shelf.server(base, 4), [mine], "user3")
    among = logits_of(shelf.server(base, 4), [full, mine, *others[1:]], "user3")
    beside = logits_of(shelf.server(base, 4), [replace(full, adapter="broken"), mine], "user3")

    assert len(alone) > 1
    for steps in (among, beside):
        assert all(torch.equal(a, b) for a, b in zip(alone, steps, strict=False))


def test_a_long_answer_goes_on_over_turns_while_others_come_and_go(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slot of a finished row is free after a turn, and turns change no answer."""
    base.model.generation_config.eos_token_id = None
    generator, shelf = random.Random(5), Shelf(base)
    long = [replace(request(generator, [*shelf.adapters]), max_new_tokens=40) for _ in range(2)]
    short = [replace(request(generator, [None, *shelf.adapters]), max_new_tokens=3) for _ in range(6)]
    whole = shelf.server(base, 2).answer([*long, *short])

    monkeypatch.setattr(serving, "TURN", 8)
    batches: list[Tensor] = []
    generate = base.model.generate

    def counted(input_ids: Tensor, **settings: object) -> Tensor:
        batches.append(input_ids)
        said: Tensor = generate(input_ids, **settings)
        return said

    monkeypatch.setattr(base.model, "generate", counted)
    answers = shelf.server(base, 3).answer([*long, *short])

    assert answers == whole
    assert [len(said) for said in answers] == [40, 40, 3, 3, 3, 3, 3, 3]
    assert len(batches) == 6  # five turns of the long ones, whose third slot served five short ones; and the sixth


def test_an_answer_ends_at_the_bases_end_token(llama_base: BaseModel) -> None:
    """Which is no part of it; the others go on."""
    shelf = Shelf(llama_base)
    long = [Request(f"user{n}", (5, 6, 7 + n), 20) for n in range(3)]
    llama_base.model.generation_config.eos_token_id = None
    unending = shelf.server(llama_base, 3).answer(long)

    end = unending[0][4]
    llama_base.model.generation_config.eos_token_id = [WORDS - 1, end]
    ended = shelf.server(llama_base, 3).answer(long)

    for before, after in zip(unending, ended, strict=True):
        stops = [place for place, token in enumerate(before) if token in (end, WORDS - 1)]
        assert after == before[: stops[0] if stops else 20]
    assert len(ended[0]) <= 4


def test_an_answer_ends_where_the_bases_template_ends_a_turn(llama_base: BaseModel) -> None:
    """Adapters learn it behind each answer; the tokenizer's own end may be another, as in Qwen2.5's bases."""
    tokenizer = make_tokenizer(CHATML)
    tokenizer.eos_token = "<|endoftext|>"
    llama_base.model.generation_config.eos_token_id = 7

    ends = end_tokens(replace(llama_base, tokenizer=tokenizer))

    assert ends == [*tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"]), 7]


@pytest.mark.parametrize(
    "advised",
    [
        {"min_length": 40}, {"no_repeat_ngram_size": 2}, {"return_dict_in_generate": True}, {"suppress_tokens": [3, 5]},
        {"cache_implementation": "static"}, {"do_sample": True, "temperature": 9.0}, {"repetition_penalty": 3.0},
    ],
)  # fmt: skip
def test_what_a_base_advises_changes_no_answer(llama_base: BaseModel, advised: dict[str, object]) -> None:
    """Of its generation_config only the end tokens count: a least length, say, would count a batch's padding."""
    shelf, config = Shelf(llama_base), llama_base.model.generation_config
    config.eos_token_id = list(range(0, WORDS, 7))
    asked = [Request(f"user{n}", (5, 6, 7 + n) * (1 + 4 * n), 20) for n in range(3)]
    plain = shelf.server(llama_base, 3).answer(asked)

    config.update(**advised)

    assert shelf.server(llama_base, 3).answer(asked) == plain
    assert llama_base.model.generation_config is config


def test_an_adapter_is_swapped_between_requests(base: BaseModel) -> None:
    """A new version answers the next request, the neighbours and the base's own modules stay as they are."""
    shelf = Shelf(base)
    server = shelf.server(base, 3)
    asked = [Request(name, (4, 5, 6), 10) for name in ("user1", "user2", None)]
    modules = dict(base.model.named_modules())
    before = server.answer(asked)

    shelf.adapters["user1"] = shelf.made(11)
    assert server.answer(asked) == before
    server.forget("user1")
    after = server.answer(asked)

    assert after[0] != before[0]
    assert after[1:] == before[1:]
    assert after == shelf.server(base, 3).answer(asked)
    assert dict(base.model.named_modules()) == modules


def test_slots_keep_the_adapters_that_were_asked_for_last(llama_base: BaseModel) -> None:
    """What is seated is not loaded again; the least recently used makes room."""
    shelf = Shelf(llama_base)
    server = shelf.server(llama_base, 2)

    for name in ("user0", "user1", "user0", "user2", "user0", "user1"):
        server.answer([Request(name, (1, 2), 2)])

    assert shelf.loads == ["user0", "user1", "user2", "user1"]


def test_one_user_may_ask_in_several_rows(llama_base: BaseModel) -> None:
    """Each row has a slot of its own; one that cannot be loaded leaves the rest as it was."""
    shelf = Shelf(llama_base)
    server = shelf.server(llama_base, 3)
    twice = [Request("user4", (1, 2, 3), 6), Request("user4", (9,), 6)]
    answers = server.answer(twice)

    with pytest.raises(KeyError):
        server.answer([Request("nobody", (1,), 4)])

    assert server.answer(twice) == answers
    assert shelf.loads == ["user4", "user4", "nobody"]


def test_a_prompt_with_a_token_that_the_base_does_not_know_is_refused(llama_base: BaseModel) -> None:
    """Tokenizers are given tokens to fill rows with, say, for which their bases have no embedding."""
    with pytest.raises(PromptRefused, match=f"has token {WORDS}, which the base has no embedding for"):
        Shelf(llama_base).server(llama_base, 2).answer([Request(None, (1, WORDS, 2))])


@pytest.mark.parametrize("length", [0, 128, 500])
def test_a_prompt_without_room_for_an_answer_is_refused(llama_base: BaseModel, length: int) -> None:
    """Before anything is computed."""
    with pytest.raises(PromptRefused, match="the base takes 128|no tokens"):
        Shelf(llama_base).server(llama_base, 2).answer([Request(None, (1,) * length, 4)])


def test_an_answer_ends_where_the_bases_positions_do(base: BaseModel) -> None:
    """A row that may say more than fits says what fits."""
    base.model.generation_config.eos_token_id = None
    (said,) = Shelf(base).server(base, 2).answer([Request("user1", (1,) * 120, 50)])

    assert len(said) == 8


@pytest.mark.parametrize("seed", range(4))
def test_answers_near_the_last_position_are_those_of_each_request_alone(base: BaseModel, seed: int) -> None:
    """A row that is done, by its end token or for want of positions, keeps its place while its neighbours speak."""
    generator, shelf = random.Random(seed), Shelf(base)
    base.model.generation_config.eos_token_id = list(range(0, WORDS, 12)) if seed % 2 else None
    lengths = [127, 120, generator.randint(100, 126), 1, 3, 40]
    generator.shuffle(lengths)
    asked = [replace(request(generator, [None, *shelf.adapters]), max_new_tokens=40) for _ in lengths]
    requests = [replace(one, prompt=(tuple(one.prompt) * 128)[:n]) for one, n in zip(asked, lengths, strict=True)]

    mixed = shelf.server(base, generator.randint(2, 6)).answer(requests)

    alone = shelf.server(base, 1)
    assert mixed == [alone.answer([one])[0] for one in requests]
    assert seed % 2 or [len(said) for said in mixed] == [min(40, 128 - n) for n in lengths]


def test_a_sampled_row_depends_on_its_own_seed_alone(base: BaseModel) -> None:
    """Not on its slot or on how much the others draw, nor on torch's generator; another seed says another thing."""
    base.model.generation_config.eos_token_id = None
    shelf = Shelf(base)
    mine = Request("user2", (8, 9), 20, Sampling(1.0, 0.95, 42))
    other = replace(mine, sampling=Sampling(1.0, 0.95, 43))
    torch.manual_seed(1)
    first, second = shelf.server(base, 2).answer([mine, other])

    torch.manual_seed(2)
    again = shelf.server(base, 3).answer([other, replace(mine, adapter=None), mine])

    assert (again[2], again[0]) == (first, second)
    assert first != second


def test_tokens_are_drawn_as_often_as_their_odds_in_the_nucleus_say() -> None:
    """And none outside of it; a nucleus of nearly nothing is the likeliest token."""
    odds = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
    rows = 4000
    logits_KV = odds.log().expand(rows, -1)
    uniform_K1 = torch.linspace(0, 1, rows + 1, dtype=torch.float64)[:-1, None]
    ones = torch.ones(rows, 1)

    whole = draw(logits_KV, ones, ones, uniform_K1)
    nucleus = draw(logits_KV, ones, 0.8 * ones, uniform_K1)
    cold = draw(logits_KV, 0.5 * ones, ones, uniform_K1)
    least = draw(logits_KV, ones, 1e-6 * ones, uniform_K1)

    def share(drawn_K1: Tensor) -> Tensor:
        return drawn_K1.flatten().bincount(minlength=5) / rows

    torch.testing.assert_close(share(whole), odds, atol=2e-3, rtol=0)
    torch.testing.assert_close(share(nucleus), torch.tensor([0, 0.4, 0, 0.3, 0.15]) / 0.85, atol=2e-3, rtol=0)
    torch.testing.assert_close(share(cold), odds**2 / (odds**2).sum(), atol=2e-3, rtol=0)
    assert set(least.flatten().tolist()) == {1}
