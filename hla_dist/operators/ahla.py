"""Second order, asymmetric: ``r = LA(q, k, v)``, ``o = LA(q, k, r)``; state (P, E) (docs/algebra.md)."""

from hla_dist.operators.cascade import Fields, Moment, Operator, Pass, decayed
from hla_dist.states import AHLAState


def _combine(left: Fields, right: Fields) -> Fields:
    """``P_AB = rho_B P_A + P_B``, ``R_AB = R_A + R_B``, ``E_AB = rho_B E_A + E_B + rho_B R_B P_A``."""
    rho = right["rho"]
    p = decayed(rho, left["P"])
    return {
        "rho": left["rho"] * rho,
        "P": p + right["P"],
        "R": left["R"] + right["R"],
        "E": decayed(rho, left["E"]) + right["E"] + right["R"] @ p,
    }


def _combine_reverse(left: Fields, left_reverse: Fields, right_reverse: Fields) -> Fields:
    """``R1_AB = R1_A + rho_A R1_B``, ``R2_AB = R2_A + rho_A R2_B + rho_A R_A^T R1_B``."""
    r1 = decayed(left["rho"], right_reverse["R1"])
    r2 = decayed(left["rho"], right_reverse["R2"])
    return {"R1": left_reverse["R1"] + r1, "R2": left_reverse["R2"] + r2 + left["R"].mT @ r1}


AHLA = Operator(
    name="ahla",
    state=AHLAState,
    passes=(
        Pass("r", "q", "k", "v", state="P", reverse="R2"),
        Pass("o", "q", "k", "r", state="E", reverse="R1"),
    ),
    moments=(Moment("R", "k", "q"),),
    combine=_combine,
    combine_reverse=_combine_reverse,
    full=(("k", "q"), ("k", "v")),
    backward_fields=("R",),
)
