"""Second order with the decay of the paper's own recurrence (docs/algebra.md, the paper's decay).

w = LA(q, k, k) + ridge q,   y_t = C_{t-1}^T k_t = sum_{j<t} Gamma(t - 1, j) (k_t . q_j) v_j,
o = LA(w, q, v) - LA(q, k, y)                                                  state (S, C, G)

Without decay o is that of ``hla2``. ``LA(w, q, v)`` and the strict pass y read one state, C, and share its reverse R1.
"""

from hla_dist.operators.cascade import Fields, Moment, Operator, Pass, decayed
from hla_dist.states import HLA2PaperState


def _combine(left: Fields, right: Fields) -> Fields:
    """S and C as in the prefix form, and the correction G (docs/algebra.md, eq. 17).

    G_AB = rho_B G_A + G_B + Shat_B C_A
    """
    rho = right["rho"]
    return {
        "S": decayed(rho, left["S"]) + right["S"],
        "C": decayed(rho, left["C"]) + right["C"],
        "G": decayed(rho, left["G"]) + right["G"] + right["Shat"] @ left["C"],
        **_combine_kept(left, right),
    }


def _combine_kept(left: Fields, right: Fields) -> Fields:
    """``Shat_AB = rho_B Shat_A + rho_A Shat_B``."""
    shat = decayed(right["rho"], left["Shat"]) + decayed(left["rho"], right["Shat"])
    return {"rho": left["rho"] * right["rho"], "Shat": shat}


def _combine_reverse(left: Fields, left_reverse: Fields, right_reverse: Fields) -> Fields:
    """``R1_AB = R1_A + rho_A R1_B + Shat_A R3_B``; R2 and R3 add up decayed (docs/algebra.md, eq. 19)."""
    r = {name: left_reverse[name] + decayed(left["rho"], right_reverse[name]) for name in ("R1", "R2", "R3")}
    r["R1"] = r["R1"] + left["Shat"] @ right_reverse["R3"]
    return r


HLA2_PAPER = Operator(
    name="hla2_paper",
    state=HLA2PaperState,
    passes=(
        Pass("w", "q", "k", "k", state="S", reverse="R2", ridge=True),
        Pass("y", "k", "q", "v", state="C", reverse="R1", strict=True),
        Pass("o", "w", "q", "v", state="C", reverse="R1"),
        Pass("o", "q", "k", "y", state="G", reverse="R3", sign=-1),
    ),
    moments=(Moment("Shat", "k", "k", through=True),),
    combine=_combine,
    combine_reverse=_combine_reverse,
    backward_fields=("Shat",),
    combine_kept=_combine_kept,
    symmetric=frozenset({"S", "R2", "Shat"}),
)
