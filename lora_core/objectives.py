"""What a user's training makes smaller: the settings of each objective.  The losses: `preference.py`."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator


class ObjectiveSpec(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """Next-token loss (`sft`), or direct preference optimisation (`dpo`; Rafailov et al., 2023) of pairs of answers."""

    name: Literal["sft", "dpo"] = "sft"
    beta: Annotated[float, Field(gt=0, le=100)] = 0.1  # the higher, the nearer to the base the adapter stays
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0  # share of pairs taken to be the wrong way round

    @model_validator(mode="after")
    def _only_dpo_weighs(self) -> "ObjectiveSpec":
        weights = [name for name in ("beta", "label_smoothing") if getattr(self, name) != DEFAULTS[name]]
        if self.name == "sft" and weights:
            raise ValueError(f"{' and '.join(weights)} belong to objective dpo; add objective=dpo or leave them out")
        return self

    @property
    def paired(self) -> bool:
        """Whether it learns from pairs, a chosen and a rejected answer each."""
        return self.name == "dpo"


DEFAULTS = {name: field.default for name, field in ObjectiveSpec.model_fields.items()}
