"""What a training step will take, before it runs: parameters, FLOPs, bytes of memory by kind, bytes on the wire.

Memory comes from the program itself: one forward and backward on fake tensors, which have shapes and lifetimes but no
contents, over a fake group of as many ranks; every tensor is counted from its birth to its death. Beyond a few thousand
tokens the peak is a straight line in the length of the shard, so two short traces give it for any. What softmax layers
fetch from other ranks, and what FSDP2 gathers, is counted by rules of their own.
"""

import math
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hla_dist.data.text import Codec
from hla_dist.functional.levels import bytes_sent
from hla_dist.models import LanguageModel, ModelConfig
from hla_dist.models.experts import MixtureOfExperts
from hla_dist.nn import HLAAttention, MemoryAttention, SoftmaxAttention
from hla_dist.nn.chunks import map_tokens
from hla_dist.operators import NAMED, OPERATORS
from hla_dist.operators.cascade import Operator
from hla_dist.operators.segment import BLOCK_TOKENS, CHANNEL_CHUNK, CHUNK, TILE_TOKENS
from hla_dist.parallel.agreement import HEADER_BYTES
from hla_dist.parallel.shard import default_lengths
from hla_dist.parallel.topology import set_ranks_per_node
from hla_dist.parallel.wire import WireLayout
from hla_dist.processes.failure import UserError, expect
from hla_dist.processes.options import flag
from hla_dist.softmax.attend import BLOCK_QUERIES, MASK_NUMBERS
from hla_dist.softmax.key_spans import KeySpans
from hla_dist.training.config import TrainConfig

Kind = TypeVar("Kind", bound=nn.Module)
TRACED = 4096  # tokens of the shorter trace
_BLOCK_BUFFERS = 26  # sequences of a block that the torch backend holds: counted, hla2's backward, gates per token
_CHANNEL_BUFFERS = 5  # with a gate per channel: of a product for every pair of tokens of a chunk and channel
_BACKWARD = 2.5  # of a pass's forward: products with both operands' gradients, and the scores again


@dataclass(frozen=True)
class Step:
    """What is estimated: one optimiser step over ``shards`` ranks per sequence.

    Parameters are whole on every rank, or sharded by FSDP2 over ``sharded`` ranks if that is not 0.
    """

    model: ModelConfig
    seq_len: int
    shards: int = 1
    batch_size: int = 1
    accumulate: int = 1
    checkpointing: str = "none"
    bf16: bool = False
    sharded: int = 0


def planned(config: TrainConfig, world_size: int) -> Step:
    """The step that launch/train.py's options describe; UserError for what is not estimated."""
    options = config.to_dict()
    for name, wanted in (("exchange", ("auto", "all_gather")), ("bf16_wire", (False,)),
                         ("offload_activations", (False,)), ("offload_parameters", (False,)),
                         ("ep", (1,))):  # fmt: skip
        expect(options[name] in wanted, "--dry-run", f"{flag(name)} {wanted[-1]}", options[name])
    described = config.describes_model or (config.output.init_from is None and config.output.resume is None)
    expect(
        described, "--dry-run", "options of the model, since it reads no files", "none beside --init-from or --resume"
    )
    model = config.model_config(config.data.vocab_size or Codec(config.data.tokenizer).vocab_size)
    step, ranks = config.optimisation, config.ranks
    shards = ranks.sp or max(1, world_size // (max(1, ranks.dp_shard) * max(1, ranks.dp_replicate)))
    return Step(
        model, config.data.seq_len, shards, step.batch_size, step.accumulate, step.checkpoint_activations, step.bf16,
        ranks.dp_shard * shards,
    )  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """FLOPs are those of all ranks of a sequence; memory and wire those of one rank, by kind."""

    parameters: int
    active: int  # those that a token meets: of experts, the active ones
    flops: dict[str, float]
    memory: dict[str, int]
    wire: dict[str, int]

    def lines(self) -> list[str]:
        """For a terminal."""
        total = sum(self.memory.values())
        rows = [f"parameters: {self.parameters:,}"]
        if self.active < self.parameters:
            rows.append(f"parameters that a token meets: {self.active:,}")
        rows += [f"FLOPs per step, {kind}: {value:.3g}" for kind, value in self.flops.items()]
        rows += [f"memory per rank, {kind}: {value / 2**20:,.1f} MiB" for kind, value in self.memory.items()]
        rows += [f"memory per rank, tensors in all: {total / 2**20:,.1f} MiB (libraries, the allocator's gaps apart)"]
        return rows + [f"sent per rank and step, {kind}: {value:,} bytes" for kind, value in self.wire.items()]


def estimate(step: Step) -> Estimate:
    """The estimate of a step, by rank 0 of ``shards``. Starts a fake process group if shards > 1: call it alone.

    Raises UserError for layers whose bytes nobody has modelled.
    """
    if "memory" in step.model.mixers:
        raise UserError("--dry-run: expected a pattern of operators and softmax, got memory layers, not modelled yet")
    local = -(-step.seq_len // step.shards)
    if step.shards > 1 and step.model.attention.get("levels") and step.seq_len != step.shards << local.bit_length() - 1:
        raise UserError(
            f"--seq-len: expected {step.shards} ranks times a power of two with --levels, got {step.seq_len}"
        )
    short = 1 << max(1, TRACED // step.batch_size).bit_length() - 1  # a power of two: what shards with levels are
    if local <= 2 * short:
        peak, parameters, gradients = _trace(step, local)
    else:
        low, parameters, gradients = _trace(step, short)
        high, _, _ = _trace(step, 2 * short)
        peak = low + (high - low) * (local - short) // short
    tokens = 8 * step.batch_size * (step.seq_len + 1)
    parts = max(1, step.sharded)
    memory = {
        "parameters": -(-4 * parameters // parts),
        "gradients": -(-gradients // parts),
        "optimiser": -(-8 * parameters // parts),
        "activations": max(0, peak - gradients),
        "an operator's blocks": _blocks(step, local),
        "the batch's tokens": tokens,
    }
    if step.sharded:
        block, rest = _units(step.model)
        # a block is computed while the next one comes, and its gradient while the last one's is on its way
        memory |= {"gathered parameters": 4 * (rest + 2 * block), "gradients of a block": 4 * max(2 * block, rest)}
    idle = 0.0
    for mixture in _all(MixtureOfExperts, _build(step.model)):
        idle += (mixture.gate_up.numel() + mixture.down.numel()) * (1 - mixture.share)
    return Estimate(parameters, parameters - round(idle), step_flops(step), memory, wire_bytes(step, parameters))


def _units(config: ModelConfig) -> tuple[int, int]:
    """Parameters of the largest block, and of all that is in none: the units of FSDP2 (``fully_sharded.py``)."""
    model = _build(config)
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    return max(blocks), sum(p.numel() for p in model.parameters()) - sum(blocks)


def _blocks(step: Step, local: int) -> int:
    """Inside an operator, where no trace looks; of softmax over ranks a block of queries' mask, and it as floats."""
    sizes = [0]
    if step.shards > 1 and "softmax" in step.model.mixers:
        sizes.append(5 * min(MASK_NUMBERS, BLOCK_QUERIES * step.seq_len))
    for layer in _all(HLAAttention, _build(step.model)):
        tokens = min(TILE_TOKENS, min(BLOCK_TOKENS, local) * step.batch_size * layer.num_heads)
        buffers = _BLOCK_BUFFERS + (_CHANNEL_BUFFERS * CHANNEL_CHUNK if _operator(layer).products else 0)
        sizes.append(4 * buffers * tokens * max(layer.head_dim, layer.value_dim))
    return max(sizes)


def _operator(layer: HLAAttention) -> Operator:
    """The cascade that a layer runs, as far as bytes and FLOPs differ."""
    named = OPERATORS[layer.op]
    return named.forms["channels"] if layer.decay == "channel" else named


def wire_bytes(step: Step, parameters: int) -> dict[str, int]:
    """Bytes that a rank sends in a step, ``exchange="all_gather"``; of keys and values, the rank that sends most.

    With the gradients goes one number per tensor that says who has one. Of what FSDP2 sends, as a ring does it: a
    block's parameters are gathered for forward and again for backward, the others once, and every micro-batch reduces
    its gradients.
    """
    model = _build(step.model)
    sent: dict[str, int] = {}
    if step.shards > 1:
        sent |= _frames(step, model)
        if softmax := _all(SoftmaxAttention, model):
            sent["keys and values"] = sum(_keys_and_values(step, layer) for layer in softmax)
    if step.sharded > 1:
        block, rest = _units(step.model)
        blocks = parameters - rest
        others = (step.sharded - 1) / step.sharded
        sent["FSDP2, parameters"] = round(4 * others * (2 * blocks + rest))
        sent["FSDP2, gradients"] = round(4 * others * parameters)
    sent = {kind: step.accumulate * count for kind, count in sent.items()}
    if step.shards > 1 and not step.sharded:
        sent["gradients"] = 4 * (parameters + len(list(model.parameters())))
    return sent | ({"agreement on the step": 4 * 8} if sent else {})


def _frames(step: Step, model: nn.Module) -> dict[str, int]:
    """Summaries and the halos of convolutions, by direction.

    A group's frames of one direction are as long as the longest: a softmax layer's too, of three whole numbers.
    """
    payloads: dict[str, list[int]] = {"summaries, forward": [3 * 8] * len(_all(SoftmaxAttention, model))}
    for layer in _all(HLAAttention, model):
        op = _operator(layer)
        value_dim = layer.value_dim + int(layer.normalize)
        layout = WireLayout(
            op, step.batch_size, layer.num_heads, layer.head_dim, value_dim, torch.float32, torch.float32
        )
        sizes = {
            "summaries, forward": layout.nbytes(["rho", *op.fields]),
            "summaries, backward": layout.nbytes(list(op.reverses)),
        }
        if layer.levels is not None:
            dims = [step.batch_size, layer.num_heads, layer.head_dim, layer.value_dim]
            sent = bytes_sent(op, dims, layer.levels, step.seq_len // step.shards, step.shards)
            sizes = dict(zip(sizes, sent))
        if layer.conv is not None:
            last = step.batch_size * (layer.conv.width - 1) * layer.conv.channels * (2 if step.bf16 else 4)
            sizes |= {"halos, forward": 8 * step.batch_size + last, "halos, backward": last}
        for kind, size in sizes.items():
            payloads.setdefault(kind, []).append(size)
    if mixtures := _all(MixtureOfExperts, model):
        payloads["experts' counts"] = [4 * len(mixtures) * step.batch_size * step.model.experts]
    return {kind: len(sizes) * (HEADER_BYTES + max(sizes)) for kind, sizes in payloads.items()}


def _keys_and_values(step: Step, layer: SoftmaxAttention) -> int:
    """Forward and backward, of the rank that sends most."""
    lengths, ranks = default_lengths(step.seq_len, step.shards), range(step.shards)
    size = step.batch_size * layer.head_dim * (2 if step.bf16 else 4)
    if _by_heads(step, layer):  # heads for tokens and back, forward and backward
        numbers = 2 * layer.num_heads + 2 * layer.num_kv_heads
        return size * numbers * (max(lengths) * step.shards + step.seq_len) // step.shards
    whole, nothing = torch.tensor([0, step.seq_len]), torch.zeros(1, dtype=torch.int64)
    spans = KeySpans(whole, lengths, nothing, layer.window, False, False)
    sizes = [[0 if a == b else len(range(*spans.sent(a, b))) for b in ranks] for a in ranks]
    most = max(sum(sizes[rank]) + sum(row[rank] for row in sizes) for rank in ranks)
    return size * 2 * layer.num_kv_heads * most


def _by_heads(step: Step, layer: SoftmaxAttention) -> bool:
    """Whether the layer's own choice is Ulysses."""
    return layer.num_kv_heads % step.shards == 0 and layer.window is None


def _build(config: ModelConfig) -> LanguageModel:
    with FakeTensorMode():
        return LanguageModel(config)


def _all(kind: type[Kind], model: nn.Module) -> list[Kind]:
    return [module for module in model.modules() if isinstance(module, kind)]


def step_flops(step: Step) -> dict[str, float]:
    """Two per multiply-add; whole chunk squares counted, as they are computed.

    Of softmax attention, as is the custom: two products forward and four backward of each query with the keys it sees,
    those of the whole sequence or its window, whatever documents it holds. The scores that backward computes again are
    not counted.
    """
    model = _build(step.model)
    output = model.embedding if model.lm_head is None else model.lm_head
    matrices: float = sum(p.numel() for p in (*model.blocks.parameters(), output.weight) if p.dim() == 2)
    matrices += sum(
        (layer.gate_up.numel() + layer.down.numel()) * layer.share for layer in _all(MixtureOfExperts, model)
    )
    passes = 0.0
    for layer in _all(HLAAttention, model):
        op, K, V = _operator(layer), layer.head_dim, layer.value_dim
        c = layer.chunk_size or (CHANNEL_CHUNK if op.products else CHUNK)
        passes += layer.num_heads * _head_flops(op, K, V, c)
        if layer.levels is not None:  # half of the tokens read at each level above a chunk
            above = math.log2(max(1.0, step.seq_len / step.shards / c))
            passes += layer.num_heads * K * op.columns(op.passes[-1].c, K, V) * (above - 2)
    attention = 0.0
    for softmax in _all(SoftmaxAttention, model):
        if isinstance(softmax, MemoryAttention):
            op, K, V = NAMED[softmax.op], softmax.head_dim * (2 if softmax.q_map else 1), softmax.head_dim + 1
            passes += softmax.num_heads * _head_flops(op, K, V, CHUNK)
            if softmax.window is None:
                continue
        window = min(softmax.window or step.seq_len, step.seq_len)
        keys = window - window * (window - 1) / 2 / step.seq_len  # seen by the mean query
        attention += 2 * 2 * softmax.num_heads * softmax.head_dim * keys
    tokens = float(step.seq_len * step.batch_size * step.accumulate)
    again = 0 if step.checkpointing == "none" else 1
    return {
        "matrices": tokens * 2 * matrices * 3,
        "operators": tokens * passes * (1 + _BACKWARD),
        **({"softmax": tokens * attention * 3} if attention else {}),
        "computed again": tokens * again * (2 * matrices + passes + attention),
    }


def _head_flops(op: Operator, K: int, V: int, chunk: int) -> int:
    """Of every pass, per token of a head: scores inside a chunk, and states."""
    return sum(2 * chunk * (K + size) + 4 * K * size for size in (op.columns(p.c, K, V) for p in op.passes))


class _Live(TorchDispatchMode):
    """Bytes of all tensors made inside that are still alive, and their peak; views of ``parameters`` are not new."""

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = {x.untyped_storage()._cdata for x in parameters}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._known:
                    self._known.add(key)
                    self.live += size
                    weakref.finalize(storage, self._gone, key, size)
        self.peak = max(self.peak, self.live)
        return result

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class _Attended(torch.autograd.Function):
    """What softmax attention over ``fetched`` keys of other ranks and the own ones holds, without computing it.

    Forward: the rows as they arrive and in their order, kept for backward. Backward: gradients of all keys in float32,
    on their way, and of the own ones.
    """

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, fetched: int) -> torch.Tensor:
        rows = torch.cat([k, v], -1)
        if fetched:
            arriving = rows.new_empty(rows.shape[0], fetched, *rows.shape[2:])
            rows = torch.cat([arriving, rows], 1)
        out = torch.empty_like(q)
        ctx.save_for_backward(q, rows, out)
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, rows, _ = ctx.saved_tensors
        drows = torch.empty_like(rows, dtype=torch.float32)
        dq, leaving = torch.empty_like(q), torch.empty_like(rows)
        own = drows[:, leaving.shape[1] - q.shape[1] :].to(q.dtype)
        dk, dv = own.chunk(2, -1)
        return dq, dk, dv, None


def _hold_only(layer: SoftmaxAttention, step: Step, tokens: int) -> None:
    """Let a layer hold what the last rank's does, which fetches most, for a shard of ``tokens``."""
    if step.shards == 1 or _by_heads(step, layer):
        fetched = 0
    elif layer.window is None:
        fetched = tokens * (step.shards - 1)
    else:
        fetched = min(layer.window - 1, step.seq_len - step.seq_len // step.shards)

    def attend(x: torch.Tensor, call: Any) -> tuple[torch.Tensor, None]:
        positions = torch.arange(x.shape[1]).expand(x.shape[:2])
        q, k, v = map_tokens(layer._operands, x, positions, modules=[layer], tokens=layer.chunk_tokens)
        o = _Attended.apply(q, k, v, fetched)
        return map_tokens(layer._result, o, modules=[layer], tokens=layer.chunk_tokens), None

    layer._attend = attend  # type: ignore[method-assign]


def _trace(step: Step, tokens: int) -> tuple[int, int, int]:
    """Peak bytes of a forward and backward over a shard of ``tokens``, parameters, bytes of gradients."""
    with _fake_group(step.shards) as group, FakeTensorMode():
        model = LanguageModel(step.model)
        model.activation_checkpointing = step.checkpointing
        for layer in _all(HLAAttention, model):
            layer.group = group
            layer.shard_lengths = [tokens] * step.shards  # as a run gives them; positions count from them
        for softmax in _all(SoftmaxAttention, model):
            _hold_only(softmax, step, tokens)
        for mixture in _all(MixtureOfExperts, model):  # where rows go is not known without contents
            mixture._product = lambda rows, weight, counts: F.linear(rows, weight[0])  # type: ignore[method-assign]
        live = _Live(model.parameters())
        with live:
            text, labels = torch.zeros(2, step.batch_size, tokens, dtype=torch.int64)
            with torch.autocast("cpu", torch.bfloat16, enabled=step.bf16):
                loss = model(text, labels=labels)
            loss.backward()
        parameters = sum(p.numel() for p in model.parameters())
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    return live.peak, parameters, gradients


@contextmanager
def _fake_group(size: int) -> Iterator[Any]:
    """For as long as the block runs, a group of ``size`` ranks that sends nothing; None for one."""
    made = size > 1 and not dist.is_initialized()
    if made:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    if size > 1:
        set_ranks_per_node(dist.group.WORLD, size)  # nobody to ask
    try:
        yield dist.group.WORLD if size > 1 else None
    finally:
        if made:
            dist.destroy_process_group()
