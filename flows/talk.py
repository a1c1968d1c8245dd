"""A pulled adapter on its base, ready to answer."""

from dataclasses import dataclass

from flows.errors import Unready
from flows.factory import Factory
from lora_core.banks.bank import Bank
from lora_core.banks.table import make_bank
from lora_core.base_model import BaseModel, load_base
from lora_core.data.rendering import text_to_prompt
from lora_core.evaluate import Asked, Trial
from lora_core.generate import generate
from lora_core.intake import read_artifact
from registry import queries
from registry.names import Reference
from registry.session import reading


@dataclass(frozen=True)
class Voice:
    """One user's adapter and the bare base, side by side."""

    base: BaseModel
    bank: Bank
    adapter: Trial

    @classmethod
    def of(cls, reference: str, base_name: str | None = None) -> "Voice":
        """The adapter that a reference means, on the base it was trained on.  Raises Unready for another base."""
        factory = Factory.from_environment()
        wanted = Reference.parse(reference)
        folder = factory.client.pull(wanted)
        with reading(factory.engine) as session:
            tenant = queries.tenant_id(session, wanted.tenant)
            _, made_on, _ = queries.lineage(session, tenant, queries.version(session, tenant, wanted))
        name, device = base_name or made_on.name, factory.settings.device or None
        base = load_base(name, made_on.revision, device, quantise=made_on.quantised)
        if base.digest != made_on.digest:
            raise Unready(f"{base.name} is not the base that {reference} was trained on", "pass that one with --base")
        files = read_artifact(folder, base)
        bank = make_bank(base, [files.spec])
        return cls(base, bank, Asked(files.spec, files.tensors).trial(bank))

    def answers(self, text: str, tokens: int) -> tuple[str, str]:
        """What the adapter and what the bare base say, generated in one batch."""
        prompt = text_to_prompt(text, self.base.tokenizer)
        own, plain = generate(self.base, self.bank, [(self.adapter, prompt), (Trial(None, 0, ()), prompt)], 2, tokens)
        return own.strip(), plain.strip()
