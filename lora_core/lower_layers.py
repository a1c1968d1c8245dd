"""Never compute twice what cannot change: hidden states under the first adapted layer, kept by row.

They depend on the base and on a row's tokens, positions and documents alone, so a row that comes again enters the model
at the first adapted layer.  K slots, T tokens a slot, D hidden width.
"""

import hashlib
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import chain, islice

import torch
import transformers
from torch import Tensor, nn

from lora_core.banks.bank import Bank
from lora_core.base_model import BaseModel
from lora_core.cohort import Cohort
from lora_core.data.packing import Row, empty_row, pack
from lora_core.data.rendering import Rendered
from lora_core.height import least_height
from lora_core.layers import wrapped
from lora_core.learner import Lesson
from lora_core.micro_step import read_rows
from lora_core.referee import Answers
from lora_core.row_store import RowStore

LOOKED_AT = 8  # rows, for each place that is to be filled
KERNELS = 3  # one more whenever the engine computes the same states to other bits


class LowerLayers:
    """The layers of a base under every site of a bank, and what rows look like above them.

    `read_rows` is a `compute` for `train`, and the same bytes come out.  `first` is the lowest adapted layer; 0, and
    everything is computed as ever, where that is the lowest of all or the base's layers are no plain chain.
    Make it before the bank is attached: it tries the base on a few tokens.
    """

    def __init__(self, base: BaseModel, bank: Bank, store: RowStore) -> None:
        self.base, self.store = base, store
        self._owner = base.digest or uuid.uuid4().hex  # without a digest, no other's rows are this base's
        self.layers, self.first = _layers_under(base, bank)
        if self.first and not self._cuts_cleanly():
            self.first = 0

    def read_rows(self, base: BaseModel, cohort: Cohort, lessons: Sequence[Lesson | None], row_tokens: int) -> Answers:
        """What `train.read_rows` does, entered at the first adapted layer."""
        if not self.first:
            return read_rows(base, cohort, lessons, row_tokens)
        idle = empty_row(row_tokens)
        hidden_KTD = self.states([lesson or Lesson(idle, 0.0, 0.0, 0, (idle,)) for lesson in lessons])
        with self.entered(hidden_KTD):
            return read_rows(base, cohort, lessons, row_tokens)

    def states(self, lessons: Sequence[Lesson]) -> Tensor:
        """What enters the first adapted layer, K x T x D: kept rows' as they were, the others' computed now.

        A computation takes as many rows, for the bytes' sake; places that no missing row needs go to those that are
        about to be missed, so a newcomer among old hands costs few computations.
        """
        context = self._context(len(lessons))
        known = {lesson.row.digest: self._kept(context, lesson) for lesson in lessons}
        missing = [lesson for lesson in lessons if known[lesson.row.digest] is None]
        if missing:
            known |= self._computed(context, missing, len(lessons))
        rows_TD = [known[lesson.row.digest] for lesson in lessons]
        return torch.stack([hidden_TD for hidden_TD in rows_TD if hidden_TD is not None]).to(self.base.model.device)

    @contextmanager
    def entered(self, hidden_KTD: Tensor) -> Iterator[None]:
        """While inside, the base runs no lower layer: `hidden_KTD` is what they give."""
        with _forward_of(self.layers[: self.first], lambda _: hidden_KTD):
            yield

    def _kept(self, context: str, lesson: Lesson) -> Tensor | None:
        return self.store.get(f"{context}/{lesson.row.digest}") if lesson.recurring else None

    def _computed(self, context: str, missing: Sequence[Lesson], slots: int) -> dict[str, Tensor]:
        """States of the missing rows and of some to come, T x D each, by digest; what comes again is kept."""
        due = {lesson.row.digest: lesson.row for lesson in missing}
        group = {**due, **self._coming(context, missing, slots - len(due))}
        rows = [*group.values(), *[empty_row(len(missing[0].row.tokens))] * (slots - len(group))]
        hidden_KTD = self.store.compute(lambda: self._run_lower(rows), slots)
        # Cloned: a view would hold all K rows in memory for as long as one of them is kept.
        found = {digest: hidden_TD.clone() for digest, hidden_TD in zip(group, hidden_KTD, strict=False)}
        once = {lesson.row.digest for lesson in missing if not lesson.recurring}
        for digest in group.keys() - once:
            if digest in due or self.store.has_room(found[digest].nbytes):
                self.store.put(f"{context}/{digest}", found[digest])
        return found

    def _coming(self, context: str, missing: Sequence[Lesson], places: int) -> dict[str, Row]:
        """Rows not kept yet that come beside the missing ones, by digest: as many as there are places."""
        due = {lesson.row.digest for lesson in missing}
        recurring = {id(lesson.recurring): lesson.recurring for lesson in missing}  # a user may read in several slots
        seen = islice(chain(*recurring.values()), LOOKED_AT * places)  # a user of many rows is not searched for ever
        peers = (row for row in seen if row.digest not in due)
        unkept = (row for row in peers if f"{context}/{row.digest}" not in self.store)
        return {row.digest: row for row in islice(unkept, places)}

    @torch.no_grad()
    def _run_lower(self, rows: Sequence[Row]) -> Tensor:
        """What enters the first adapted layer, K x T x D on the CPU."""
        entering: list[Tensor] = []

        def note(hidden_KTD: Tensor) -> Tensor:
            entering.append(hidden_KTD)
            return hidden_KTD

        with _forward_of(self.layers[self.first :], note):
            self.base.model.base_model(**self.base.stack(rows).inputs)
        return entering[0].cpu()

    @torch.no_grad()
    def _cuts_cleanly(self) -> bool:
        """Tried rather than read off the architecture: an upper layer may look at more than the one below gives it."""
        words = self.base.model.config.get_text_config().vocab_size
        documents = [Rendered(tuple(n % words for n in range(start, start + 4)), (True,) * 4) for start in range(4)]
        rows = pack(list(enumerate(documents)), min(8, self.base.longest))
        inputs = self.base.stack(rows).inputs
        whole_KTD = self.base.model.base_model(**inputs).last_hidden_state
        try:
            with self.entered(self._run_lower(rows).to(self.base.model.device)):
                return torch.equal(whole_KTD, self.base.model.base_model(**inputs).last_hidden_state)
        except (LookupError, RuntimeError, TypeError, ValueError, AttributeError):  # whatever it looked for and missed
            return False

    def _context(self, slots: int) -> str:
        """SHA-256 over all that decides a row's states besides the row: what computes them, and in which shapes."""
        model = self.base.model
        machine = (
            (torch.backends.cpu.get_cpu_capability(), torch.get_num_threads())
            if model.device.type == "cpu"
            else (torch.cuda.get_device_name(model.device),)
        )
        attention = model.config._attn_implementation
        versions = (torch.__version__, transformers.__version__, KERNELS)
        shape = least_height(self.base, slots)  # that of more rows rounds alike
        facts = (self._owner, self.first, shape, model.dtype, attention, *versions, model.device.type, *machine)
        return hashlib.sha256(repr(tuple(map(str, facts))).encode()).hexdigest()


def _layers_under(base: BaseModel, bank: Bank) -> tuple[list[nn.Module], int]:
    """The base's layers in their order, and the number of the lowest with a site; 0 where a site lies outside them."""
    places = [_place(site.name) for site in bank.sites]
    paths = {path for path, _ in places}
    layers = base.model.get_submodule(paths.pop()) if len(paths) == 1 else None
    return (list(layers), min(number for _, number in places)) if isinstance(layers, nn.ModuleList) else ([], 0)


def _place(site: str) -> tuple[str, int]:
    """Where the layers are that a site lies in, and in which: `model.layers.3.mlp.up_proj` is 3 of `model.layers`."""
    parts = site.split(".")
    at = next((at for at, part in enumerate(parts) if part.isdigit()), None)
    return ("", 0) if at is None else (".".join(parts[:at]), int(parts[at]))


def _forward_of(layers: Sequence[nn.Module], instead: Callable[[Tensor], Tensor]) -> AbstractContextManager[None]:
    """While inside, layers give `instead` of the hidden states that enter them."""

    def forward(*inputs: Tensor, **named: Tensor) -> Tensor:
        return instead(inputs[0] if inputs else named["hidden_states"])

    return wrapped(layers, lambda _: forward)
