"""Modules: attention layers, and the wrapper that runs a model on shards of a sequence."""

from hla_dist.nn.attention import HLAAttention
from hla_dist.nn.memory_attention import MemoryAttention
from hla_dist.nn.sequence_parallel import SequenceParallelHLA
from hla_dist.nn.short_convolution import ShortConvolution
from hla_dist.nn.softmax_attention import SoftmaxAttention

__all__ = ["HLAAttention", "MemoryAttention", "SequenceParallelHLA", "ShortConvolution", "SoftmaxAttention"]
