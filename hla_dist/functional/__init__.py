"""Public operators: validation, the choice of a backend, autograd."""

from hla_dist.functional.attention import ahla, hla2, hla3, linear_attention, summarize

__all__ = ["ahla", "hla2", "hla3", "linear_attention", "summarize"]
