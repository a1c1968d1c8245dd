"""What a trained and judged candidate comes to: files, scores and facts.  The same in, the same out."""

import math
import platform
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch

from flows.candidates import Candidate
from flows.costs import Meter
from lora_core.artifact import public_name, write_artifact
from lora_core.banks.bank import Bank
from lora_core.base_model import BaseModel
from lora_core.halving import Report
from registry.jobs import ClaimedJob
from registry.names import RunId
from registry.publishing import Finished

LIBRARIES = ("lora-factory", "torch", "transformers", "safetensors", "numpy")


def finished(
    base: BaseModel, run_id: RunId, bank: Bank, job: ClaimedJob, candidate: Candidate, meter: Meter
) -> Finished:
    """A candidate as files and facts; the same candidate gives the same bytes, whatever it cost."""
    trained, plan, verdict = candidate.trained, candidate.plan, candidate.verdict
    assert trained  # it came through training
    assert plan  # by a plan
    assert verdict  # and through the gate
    spec = candidate.recipe.method
    tensors = bank.to_tensors(trained.row_P, spec)
    scores = {
        name: figures.summary() | {f"answer_{key}": value for key, value in _task(candidate, name).items()}
        for name, figures in candidate.scores.items()
    }
    facts: dict[str, object] = {
        "base": {"name": public_name(base.name, base.digest), "digest": job.base_digest,
                 "quantised": job.base_quantised},
        "dataset": {"digest": job.dataset_digest, "cut": candidate.cut, "dropped": candidate.dropped},
        "recipe": candidate.recipe.model_dump(mode="json"),
        "scores": scores,
        "training": {"steps": trained.steps, "best_step": trained.best_step, "tokens": trained.tokens,
                     "outcome": trained.outcome, "losses": trained.losses, "held_out": trained.held_out},
        "gate": {"accepted": verdict.accepted, "reason": verdict.reason},
        "cohort": {"slots": plan.slots, "row_tokens": plan.row_tokens, "rank": bank.size,
                   "compiled": plan.compiled},
        "device": computed_on(base),
        "versions": dict(code_versions()),
    }  # fmt: skip
    if candidate.search:
        tried = [trial_facts(report) for report in candidate.trials]
        facts["search"] = {"spec": candidate.search.spec.model_dump(mode="json"), "trials": tried}
    files = write_artifact(base, spec, tensors, facts)
    return Finished(
        files, verdict.accepted, verdict.reason, bank.parameters(spec), scores, run_id,
        code_versions()["lora-factory"], meter.tokens(candidate.names), meter.seconds(candidate.names),
    )  # fmt: skip


def trial_facts(report: Report) -> dict[str, object]:
    """One trial of a search: what it was, how far it came and how good it was, and whether it won."""
    recipe, trained = report.learner.recipe, report.trained
    return {
        "rank": getattr(recipe.method, "rank", None), "layers": recipe.method.layers,
        "learning_rate": recipe.learning_rate,
        "rung": report.rung, "outcome": trained.outcome, "steps": trained.steps, "tokens": trained.tokens,
        "loss": report.loss if math.isfinite(report.loss) else None, "bytes": report.size, "won": report.won,
    }  # fmt: skip


def _task(candidate: Candidate, subject: str) -> dict[str, float]:
    return asdict(candidate.tasks[subject]) if subject in candidate.tasks else {}


@cache
def code_versions() -> Mapping[str, str]:
    """What computes versions in this process: this code, Python and the libraries under it."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def computed_on(base: BaseModel) -> dict[str, str]:
    """The kind of device and of numbers, and the threads of a CPU, which decide the last bits."""
    device = base.model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    dtype = str(base.model.dtype).removeprefix("torch.")
    return {"device": f"{device.type} {name}", "dtype": dtype, "threads": str(torch.get_num_threads())}
