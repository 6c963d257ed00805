"""Public operators: validation, the choice of a backend, autograd."""

from hla_dist.functional.attention import hla2, linear_attention, summarize

__all__ = ["hla2", "linear_attention", "summarize"]
