"""What a training step will take, before it runs: parameters, FLOPs, bytes of memory by kind, bytes on the wire.

Memory comes from the program itself: one forward and backward on fake tensors, which have shapes and lifetimes but no
contents, over a fake group of as many ranks; every tensor is counted from its birth to its death. Beyond a few thousand
tokens the peak is a straight line in the length of the shard, so two short traces give it for any.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hla_dist.data.text import Codec
from hla_dist.models import LanguageModel, ModelConfig
from hla_dist.nn import HLAAttention, SoftmaxAttention
from hla_dist.operators import OPERATORS
from hla_dist.operators.segment import CHUNK, TILE_TOKENS
from hla_dist.parallel.agreement import HEADER_BYTES
from hla_dist.parallel.topology import set_ranks_per_node
from hla_dist.parallel.wire import WireLayout
from hla_dist.processes.failure import UserError
from hla_dist.processes.options import flag
from hla_dist.training.config import TrainConfig

TRACED = 4096  # tokens of the shorter trace
_BLOCK_BUFFERS = 26  # sequences of a block that the torch backend holds: counted, hla2's backward, gates per token
_BACKWARD = 2.5  # of a pass's forward: products with both operands' gradients, and the scores again


@dataclass(frozen=True)
class Step:
    """What is estimated: one optimiser step over ``shards`` ranks per sequence, parameters whole on every rank."""

    model: ModelConfig
    seq_len: int
    shards: int = 1
    batch_size: int = 1
    accumulate: int = 1
    checkpointing: str = "none"
    bf16: bool = False


def planned(config: TrainConfig, world_size: int) -> Step:
    """The step that launch/train.py's options describe; UserError for what is not estimated."""
    options = config.to_dict()
    for name, wanted in (("dp_shard", (0,)), ("exchange", ("auto", "all_gather")), ("bf16_wire", (False,)),
                         ("offload_activations", (False,)), ("offload_parameters", (False,))):  # fmt: skip
        if options[name] not in wanted:
            raise UserError(f"--dry-run: expected {flag(name)} {wanted[-1]}, got {options[name]}")
    model = config.model_config(config.data.vocab_size or Codec(config.data.tokenizer).vocab_size)
    if "softmax" in model.mixers:
        raise UserError(f"--dry-run: expected a --pattern without softmax, got {config.model.pattern}")
    step = config.optimisation
    return Step(
        model, config.data.seq_len, config.ranks.sp or world_size, step.batch_size, step.accumulate,
        step.checkpoint_activations, step.bf16,
    )  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """FLOPs are those of all ranks of a sequence; memory and wire those of one rank, by kind."""

    parameters: int
    flops: dict[str, float]
    memory: dict[str, int]
    wire: dict[str, int]

    def lines(self) -> list[str]:
        """For a terminal."""
        total = sum(self.memory.values())
        rows = [f"parameters: {self.parameters:,}"]
        rows += [f"FLOPs a step, {kind}: {value:.3g}" for kind, value in self.flops.items()]
        rows += [f"memory a rank, {kind}: {value / 2**20:,.1f} MiB" for kind, value in self.memory.items()]
        rows += [f"memory a rank, tensors in all: {total / 2**20:,.1f} MiB (libraries and the allocator's gaps apart)"]
        return rows + [f"sent a rank and step, {kind}: {value:,} bytes" for kind, value in self.wire.items()]


def estimate(step: Step) -> Estimate:
    """The estimate of a step, by rank 0 of ``shards``. Starts a fake process group if shards > 1: call it alone."""
    local = -(-step.seq_len // step.shards)
    short = max(1, TRACED // step.batch_size)
    if local <= 2 * short:
        peak, parameters, gradients = _trace(step, local)
    else:
        low, parameters, gradients = _trace(step, short)
        high, _, _ = _trace(step, 2 * short)
        peak = low + (high - low) * (local - short) // short
    tokens = 8 * step.batch_size * (step.seq_len + 1)
    memory = {
        "parameters": 4 * parameters,
        "gradients": gradients,
        "optimiser": 8 * parameters,
        "activations": max(0, peak - gradients),
        "an operator's blocks": _blocks(step, local),
        "the batch's tokens": tokens,
    }
    return Estimate(parameters, step_flops(step), memory, wire_bytes(step, parameters))


def _blocks(step: Step, local: int) -> int:
    """Inside an operator, where no trace looks."""
    sizes = [0]
    for layer in _layers(_build(step.model)):
        tokens = min(TILE_TOKENS, local * step.batch_size * layer.num_heads)
        sizes.append(4 * _BLOCK_BUFFERS * tokens * max(layer.head_dim, layer.value_dim))
    return max(sizes)


def wire_bytes(step: Step, parameters: int) -> dict[str, int]:
    """Bytes that a rank sends in a step, ``exchange="all_gather"``; independent of the sequence's length.

    With the gradients goes one number per tensor that says who has one.
    """
    if step.shards == 1:
        return {}
    sent = {"forward": 0, "backward": 0}
    halo = {"forward": 0, "backward": 0}
    model = _build(step.model)
    tensors = len(list(model.parameters()))
    for layer in _layers(model):
        op = OPERATORS[layer.op]
        value_dim = layer.value_dim + int(layer.normalize)
        layout = WireLayout(
            op, step.batch_size, layer.num_heads, layer.head_dim, value_dim, torch.float32, torch.float32
        )
        sent["forward"] += HEADER_BYTES + layout.nbytes(["rho", *op.fields])
        sent["backward"] += HEADER_BYTES + layout.nbytes(list(op.reverses))
        if layer.conv is not None:
            last = step.batch_size * (layer.conv.width - 1) * layer.conv.channels * (2 if step.bf16 else 4)
            halo["forward"] += HEADER_BYTES + 8 * step.batch_size + last
            halo["backward"] += HEADER_BYTES + last
    wire = {f"summaries, {way}": step.accumulate * count for way, count in sent.items()}
    wire |= {f"halos, {way}": step.accumulate * count for way, count in halo.items() if count}
    return wire | {"gradients": 4 * (parameters + tensors), "agreement on the step": 4 * 8}


def _build(config: ModelConfig) -> LanguageModel:
    with FakeTensorMode():
        return LanguageModel(config)


def _layers(model: nn.Module) -> list[HLAAttention]:
    return [layer for layer in model.modules() if isinstance(layer, HLAAttention)]


def step_flops(step: Step) -> dict[str, float]:
    """Two per multiply-add; whole chunk squares counted, as they are computed.

    Of softmax attention, as is the custom: two products forward and four backward of each query with the keys it sees,
    those of the whole sequence or its window, whatever documents it holds. The scores that backward computes again are
    not counted.
    """
    model = _build(step.model)
    output = model.embedding if model.lm_head is None else model.lm_head
    matrices = sum(p.numel() for p in (*model.blocks.parameters(), output.weight) if p.dim() == 2)
    passes = 0
    for layer in _layers(model):
        op, K, V, c = OPERATORS[layer.op], layer.head_dim, layer.value_dim, layer.chunk_size or CHUNK
        for size in (op.columns(p.c, K, V) for p in op.passes):
            passes += layer.num_heads * (2 * c * (K + size) + 4 * K * size)
    attention = 0.0
    for softmax in (layer for layer in model.modules() if isinstance(layer, SoftmaxAttention)):
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


class _Live(TorchDispatchMode):
    """Bytes of all tensors made inside that are still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

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


def _trace(step: Step, tokens: int) -> tuple[int, int, int]:
    """Peak bytes of a forward and backward over a shard of ``tokens``, parameters, bytes of gradients."""
    group = _fake_group(step.shards)
    with FakeTensorMode():
        model = LanguageModel(step.model)
        model.activation_checkpointing = step.checkpointing
        for layer in _layers(model):
            layer.group = group
        live = _Live()
        with live:
            text, labels = torch.zeros(2, step.batch_size, tokens, dtype=torch.int64)
            with torch.autocast("cpu", torch.bfloat16, enabled=step.bf16):
                loss = model(text, labels=labels)
            loss.backward()
        parameters = sum(p.numel() for p in model.parameters())
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    return live.peak, parameters, gradients


def _fake_group(size: int) -> Any:
    """A group of ``size`` ranks that sends nothing; None for one."""
    if size == 1:
        return None
    if not dist.is_initialized():
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    group = dist.group.WORLD
    set_ranks_per_node(group, size)  # nobody to ask
    return group
