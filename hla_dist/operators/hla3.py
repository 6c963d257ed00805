"""Third order: ``u = gain LA(q, k, k) + ridge q + skip k``, ``r = LA(q, k, v)``, ``o = LA(q, u, r)``; state (S, P, F).

The cascade equals the masked matrix form and combines with 3 K^2 + 3 K V numbers per head (docs/algebra.md).
"""

from hla_dist.operators.cascade import Fields, Moment, Operator, Pass, decayed
from hla_dist.states import HLA3State


def _combine(left: Fields, right: Fields) -> Fields:
    """The third-order semidirect product; Q and X times the gain.

    Q_AB = Q_A + rho_A Q_B      X_AB = X_A + X_B + Q_B P_A      Y_AB = Y_A + Y_B + S_A Q_B
    F_AB = rho_B F_A + F_B + rho_B (S_A X_B + Y_B P_A + S_A Q_B P_A)
    """
    rho = right["rho"]
    s, p = left["S"], left["P"]
    settled = _settle(right, left)
    return {
        "rho": left["rho"] * rho,
        "S": decayed(rho, s) + right["S"],
        "P": decayed(rho, p) + right["P"],
        "Q": left["Q"] + decayed(left["rho"], right["Q"]),
        "X": left["X"] + settled["X"],
        "Y": left["Y"] + settled["Y"],
        "F": decayed(rho, left["F"] + s @ right["X"] + settled["Y"] @ p) + right["F"],
    }


def _settle(summary: Fields, before: Fields) -> Fields:
    """X and Y of a segment with the true r and u, the carry included: ``X + Q P``, ``Y + S Q``."""
    return {"X": summary["X"] + summary["Q"] @ before["P"], "Y": summary["Y"] + before["S"] @ summary["Q"]}


def _combine_reverse(left: Fields, left_reverse: Fields, right_reverse: Fields) -> Fields:
    """``R2_AB = R2_A + rho_A R2_B + rho_A X_A R1_B^T``, ``R3_AB = R3_A + rho_A R3_B + rho_A Y_A^T R1_B``; X, Y settled.

    Only ``R2 + R2^T`` is ever read, so the symmetric part stands for R2 throughout.
    """
    r1, r2, r3 = (decayed(left["rho"], right_reverse[name]) for name in ("R1", "R2", "R3"))
    cross = left["X"] @ r1.mT
    return {
        "R1": left_reverse["R1"] + r1,
        "R2": left_reverse["R2"] + r2 + (cross + cross.mT) / 2,
        "R3": left_reverse["R3"] + r3 + left["Y"].mT @ r1,
    }


HLA3 = Operator(
    name="hla3",
    state=HLA3State,
    passes=(
        Pass("u", "q", "k", "k", state="S", reverse="R2", ridge=True, keyed=True),
        Pass("r", "q", "k", "v", state="P", reverse="R3"),
        Pass("o", "q", "u", "r", state="F", reverse="R1"),
    ),
    moments=(Moment("Q", "q", "q", from_start=True), Moment("X", "q", "r"), Moment("Y", "u", "q")),
    combine=_combine,
    combine_reverse=_combine_reverse,
    full=(("k", "k"), ("q", "q"), ("k", "v")),
    backward_fields=("X", "Y"),
    settle=_settle,
    gained=frozenset({"Q", "X"}),
    symmetric=frozenset({"S", "Q", "R2"}),
)
