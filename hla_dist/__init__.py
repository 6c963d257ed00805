"""Higher-order Linear Attention with the sequence sharded over ranks: operators, modules, training.

    out, state = hla_dist.hla2(q, k, v, log_decay=log_decay, group=group)

Importing this package needs neither a GPU nor Triton nor a process group. See docs/ for the algebra.
"""

from hla_dist import reference
from hla_dist.functional.any_order import Cascade, CausalPass
from hla_dist.functional.attention import ahla, hla2, hla3, linear_attention, start, summarize
from hla_dist.functional.exchange_ops import checkpoint_context
from hla_dist.functional.pending import Pending
from hla_dist.functional.validate import validation
from hla_dist.nn import HLAAttention, MemoryAttention, SequenceParallelHLA, SoftmaxAttention
from hla_dist.operators.summary import Summary, combine, identity, scan_exclusive
from hla_dist.parallel.collectives import counter
from hla_dist.parallel.shard import ShardedBatch, shard, shard_batch, token_loss, unshard
from hla_dist.parallel.topology import set_ranks_per_node
from hla_dist.states import AHLAState, HLA2PaperState, HLA2State, HLA3State, KVState, LinearState, PrefixState

__version__ = "0.1.0"  # the only place: pyproject.toml reads it

__all__ = [
    "AHLAState",
    "Cascade",
    "CausalPass",
    "HLA2PaperState",
    "HLA2State",
    "HLA3State",
    "HLAAttention",
    "KVState",
    "LinearState",
    "MemoryAttention",
    "Pending",
    "PrefixState",
    "SequenceParallelHLA",
    "ShardedBatch",
    "SoftmaxAttention",
    "Summary",
    "ahla",
    "checkpoint_context",
    "combine",
    "counter",
    "hla2",
    "hla3",
    "identity",
    "linear_attention",
    "reference",
    "scan_exclusive",
    "set_ranks_per_node",
    "shard",
    "shard_batch",
    "start",
    "summarize",
    "token_loss",
    "unshard",
    "validation",
]
