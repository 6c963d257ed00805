"""Public operators: validation, the choice of a backend, autograd."""

from hla_dist.functional.any_order import Cascade, CausalPass
from hla_dist.functional.attention import ahla, hla2, hla3, linear_attention, summarize

__all__ = ["Cascade", "CausalPass", "ahla", "hla2", "hla3", "linear_attention", "summarize"]
