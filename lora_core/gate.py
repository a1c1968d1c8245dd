"""The rule that decides whether a candidate is accepted: a gain on held-out examples that chance does not explain."""

from dataclasses import dataclass
from math import floor, log2

from scipy.stats import wilcoxon

from lora_core.evaluate import Scores
from lora_core.recipe import GateSpec


@dataclass(frozen=True)
class Verdict:
    """Whether a candidate is accepted, why, and the figures behind it (gain in nats a token, or a pair)."""

    accepted: bool
    reason: str
    gain: float
    p_value: float


def judge(candidate: Scores, rival: Scores, rival_name: str, gate: GateSpec) -> Verdict:
    """Accept a candidate whose loss is below its rival's by more than chance would give.

    Paired by example, one-sided Wilcoxon signed-rank test (Wilcoxon, 1945) on the mean loss a token, or on
    a pair's.  The rival is the live version where there is one, else the base.
    """
    pairs = [
        (theirs.loss / theirs.tokens, ours.loss / ours.tokens)
        for theirs, ours in zip(rival.examples, candidate.examples, strict=True)
        if theirs.tokens
    ]
    gains = [theirs - ours for theirs, ours in pairs]
    gain = rival.loss - candidate.loss
    p_value = float(wilcoxon(gains, alternative="greater").pvalue) if any(gains) else 1.0
    facts = (
        f"gain {gain:+.4f} nats a {candidate.unit} over {rival_name}, p = {p_value:.2g}, {len(gains)} held-out examples"
    )
    if not gain > gate.min_gain:
        return Verdict(False, f"no better: {facts}; min_gain is {gate.min_gain:g}", gain, p_value)
    if not p_value < gate.significance:
        fewest = floor(-log2(gate.significance)) + 1  # half to the power of so many is the least p there is
        wanted = f"{gate.significance:g}" + (f", which takes {fewest}: add examples" if len(gains) < fewest else "")
        return Verdict(False, f"not beyond chance: {facts}; it must be below {wanted}", gain, p_value)
    return Verdict(True, facts, gain, p_value)
