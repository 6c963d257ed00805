"""Modules: an attention layer, and the wrapper that runs a model on shards of a sequence."""

from hla_dist.nn.attention import HLAAttention
from hla_dist.nn.sequence_parallel import SequenceParallelHLA

__all__ = ["HLAAttention", "SequenceParallelHLA"]
