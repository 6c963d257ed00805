"""First order: ``o = LA(q, k, v)``; a segment is described by ``P = sum Gamma(end, i) k_i v_i^T`` (docs/algebra.md)."""

from hla_dist.operators.cascade import Fields, Operator, Pass, decayed
from hla_dist.operators.channels import CHANNELS
from hla_dist.states import LinearState


def _combine(left: Fields, right: Fields) -> Fields:
    """``P_AB = rho_B P_A + P_B``."""
    return {"rho": left["rho"] * right["rho"], "P": decayed(right["rho"], left["P"]) + right["P"]}


def _combine_reverse(left: Fields, left_reverse: Fields, right_reverse: Fields) -> Fields:
    """``R1_AB = R1_A + rho_A R1_B``."""
    return {"R1": left_reverse["R1"] + decayed(left["rho"], right_reverse["R1"])}


LINEAR_ATTENTION = Operator(
    name="linear_attention",
    state=LinearState,
    passes=(Pass("o", "q", "k", "v", state="P", reverse="R1"),),
    moments=(),
    combine=_combine,
    combine_reverse=_combine_reverse,
    full=(("k", "v"),),
    forms={"channels": CHANNELS},
)
