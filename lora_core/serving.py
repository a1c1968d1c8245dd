"""Serve many users from one base: K slots that hold the adapters asked for last, and answers in mixed batches."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from lora_core.banks.bank import Bank
from lora_core.base_model import BaseModel
from lora_core.cohort import Cohort
from lora_core.decoding import GREEDY, IDLE, Line, Sampling, decode, end_tokens
from lora_core.errors import PromptRefused

TURN = 128  # tokens that a row says before its batch is put together anew


@dataclass(frozen=True)
class Adapter:
    """What a slot needs: a user's row P and its scale."""

    row_P: Tensor
    scale: float


@dataclass(frozen=True)
class Request:
    """One prompt for one adapter, by name; None asks the base."""

    adapter: str | None
    prompt: Sequence[int]
    max_new_tokens: int = 64
    sampling: Sampling = GREEDY


class Server:
    """One base, a bank and K slots; `load` brings an adapter by name when no slot holds it.

    An adapter that is asked for takes the slot that was not needed for the longest; the base is never loaded again.
    `positions` are those of the base that adapters take for themselves.
    """

    def __init__(
        self, base: BaseModel, bank: Bank, slots: int, load: Callable[[str], Adapter], positions: int = 0
    ) -> None:
        self.base, self.bank, self.load = base, bank, load
        self.longest = base.room(positions)  # of a prompt and its answer
        self.cohort = Cohort(slots, bank.width, base.model.device, base.model.dtype, learns=False)
        self.seated: dict[int, str | None] = dict.fromkeys(range(slots))  # by slot, the least recently used first

    def answer(self, requests: Sequence[Request]) -> list[list[int]]:
        """The tokens of each answer, without the one that ends it.  Raises PromptRefused, and what `load` raises.

        K at a time, whoever they are.  An answer of more than TURN tokens, or one beside a row that is near the base's
        last position, takes several turns, at each of which what was said is read anew: so the slot of a finished row
        is free for the next request at most TURN tokens later.
        """
        for request in requests:
            self._check(request)
        said: list[list[int]] = [[] for _ in requests]
        ends = end_tokens(self.base) or []
        waiting = deque(number for number, request in enumerate(requests) if request.max_new_tokens > 0)
        while waiting:
            turn = [waiting.popleft() for _ in range(min(self.cohort.slots, len(waiting)))]
            lines = [_line(requests[number], said[number], self._most(requests[number])) for number in turn]
            for number, tokens in zip(turn, self._decode([requests[n].adapter for n in turn], lines), strict=True):
                said[number] += tokens
            waiting.extendleft(n for n in reversed(turn) if not self._finished(requests[n], said[n], ends))
        return [tokens[:-1] if tokens and tokens[-1] in ends else tokens for tokens in said]

    def forget(self, adapter: str) -> None:
        """Empty the slots that hold an adapter: who asks for it again gets what `load` brings by then."""
        for slot, held in self.seated.items():
            if held == adapter:
                self._put(slot, None)

    def _check(self, request: Request) -> None:
        if not 0 < len(request.prompt) < self.longest:
            raise PromptRefused(len(request.prompt), self.longest)
        if max(request.prompt) >= self.base.words:
            raise PromptRefused(len(request.prompt), self.longest, max(request.prompt))

    def _most(self, request: Request) -> int:
        """How long an answer may get: as asked for, and no longer than the base knows positions."""
        return min(request.max_new_tokens, self.longest - len(request.prompt))

    def _finished(self, request: Request, said: Sequence[int], ends: Sequence[int]) -> bool:
        return len(said) >= self._most(request) or said[-1] in ends

    def _decode(self, adapters: Sequence[str | None], lines: Sequence[Line]) -> list[list[int]]:
        """One batch, each line in a slot of its adapter; always K rows, so its shape does not tell how many ask.

        No row may pass the base's last position, and all go on until the last is done: so each says at most what the
        longest has room for, and the rest in a later turn.
        """
        places = self._seat(adapters)
        room = min(self.longest - len(line.tokens) for line in lines)
        batch = [IDLE] * self.cohort.slots
        for slot, line in zip(places, lines, strict=True):
            batch[slot] = replace(line, most=min(line.most, room))
        with self.bank.attached(self.base, self.cohort):
            answers = decode(self.base, batch)
        return [answers[slot] for slot in places]

    def _seat(self, adapters: Sequence[str | None]) -> list[int]:
        """A slot for each: one that holds the adapter already, else the least recently used of the others."""
        free, places = dict(self.seated), dict[int, int]()
        for number, adapter in enumerate(adapters):
            slot = next((slot for slot, held in free.items() if held == adapter), None)
            if slot is not None:
                places[number] = slot
                del free[slot]
        for number, slot in zip((n for n in range(len(adapters)) if n not in places), free, strict=False):
            places[number] = slot
            self._put(slot, adapters[number])
        for slot in places.values():
            self.seated[slot] = self.seated.pop(slot)  # to the end: the most recently used
        return [places[number] for number in range(len(adapters))]

    def _put(self, slot: int, name: str | None) -> None:
        if name is None:
            self.cohort.clear(slot)
        else:
            adapter = self.load(name)
            self.cohort.admit(slot, adapter.row_P, adapter.scale)
        self.seated[slot] = name


def _line(request: Request, said: Sequence[int], most: int) -> Line:
    return Line((*request.prompt, *said), min(TURN, most - len(said)), request.sampling, len(said))
