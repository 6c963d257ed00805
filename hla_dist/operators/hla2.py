"""Second order, symmetric (the paper's HLA), and the paper's prefix form (docs/algebra.md).

causal:  u = gain LA(q, k, k) + ridge q + skip k,   o = LA(q, u, v)     state (S, F)
prefix:  w = LA(q, k, k) + ridge q,                 o = LA(w, q, v)     state (S, C)
"""

from hla_dist.operators.cascade import Fields, Moment, Operator, Pass, decayed
from hla_dist.operators.hla2_paper import HLA2_PAPER
from hla_dist.states import HLA2State, PrefixState


def _combine(left: Fields, right: Fields) -> Fields:
    """``S_AB = rho_B S_A + S_B``, ``C_AB = C_A + C_B``, ``F_AB = rho_B F_A + F_B + rho_B S_A C_B``; C with the gain."""
    rho = right["rho"]
    s = decayed(rho, left["S"])
    return {
        "rho": left["rho"] * rho,
        "S": s + right["S"],
        "C": left["C"] + right["C"],
        "F": decayed(rho, left["F"]) + right["F"] + s @ right["C"],
    }


def _combine_reverse(left: Fields, left_reverse: Fields, right_reverse: Fields) -> Fields:
    """``R1_AB = R1_A + rho_A R1_B``, ``R2_AB = R2_A + rho_A R2_B + rho_A C_A R1_B^T``; C times the gain.

    Only ``R2 + R2^T`` is ever read, so the symmetric part stands for R2 throughout.
    """
    r1 = decayed(left["rho"], right_reverse["R1"])
    cross = left["C"] @ r1.mT
    r2 = left_reverse["R2"] + decayed(left["rho"], right_reverse["R2"]) + (cross + cross.mT) / 2
    return {"R1": left_reverse["R1"] + r1, "R2": r2}


def _combine_prefix(left: Fields, right: Fields) -> Fields:
    """Both carries are additive: ``S_AB = rho_B S_A + S_B``, ``C_AB = rho_B C_A + C_B`` (C decayed here)."""
    rho = right["rho"]
    return {
        "rho": left["rho"] * rho,
        "S": decayed(rho, left["S"]) + right["S"],
        "C": decayed(rho, left["C"]) + right["C"],
    }


def _combine_prefix_reverse(left: Fields, left_reverse: Fields, right_reverse: Fields) -> Fields:
    """``R1_AB = R1_A + rho_A R1_B`` and likewise R2."""
    return {name: left_reverse[name] + decayed(left["rho"], right_reverse[name]) for name in ("R1", "R2")}


HLA2_PREFIX = Operator(
    name="hla2_prefix",
    state=PrefixState,
    passes=(
        Pass("w", "q", "k", "k", state="S", reverse="R2", ridge=True),
        Pass("o", "w", "q", "v", state="C", reverse="R1"),
    ),
    moments=(),
    combine=_combine_prefix,
    combine_reverse=_combine_prefix_reverse,
    symmetric=frozenset({"S", "R2"}),
)

HLA2 = Operator(
    name="hla2",
    state=HLA2State,
    passes=(
        Pass("u", "q", "k", "k", state="S", reverse="R2", ridge=True, keyed=True),
        Pass("o", "q", "u", "v", state="F", reverse="R1"),
    ),
    moments=(Moment("C", "q", "v"),),
    combine=_combine,
    combine_reverse=_combine_reverse,
    full=(("k", "k"), ("q", "v")),
    forms={"prefix": HLA2_PREFIX, "paper": HLA2_PAPER},
    backward_fields=("C",),
    gained=frozenset({"C"}),
    symmetric=frozenset({"S", "R2"}),
)
