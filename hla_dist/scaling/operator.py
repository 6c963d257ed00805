"""The operator's rows: forward and backward of one call over a group, and its errors against float64.

Inputs as HLAAttention makes them: q and k of length 1, scale sqrt(K), v and the output's gradient normal; gates with
memories of 2 to 4096 tokens from the first head to the last, shaken by half from token to token.

Errors: heads do not meet, so the last K/V head and its queries are computed again in float64, over the whole sequence.
No exchange is used for it, so none can hide an error of its own: each rank waits for the true state of the rank before
it, streams its shard from there and hands on the state after it; gradients come back the same way. In float64 that is
2 / (K/V heads) of the measured call's memory.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import hla_dist
from hla_dist.parallel.collectives import all_reduce_sum, group_rank, group_size
from hla_dist.parallel.shard import default_lengths
from hla_dist.scaling.config import ScalingConfig
from hla_dist.scaling.measure import Clock, Sample, from_rank, measure

NAMES = ("q", "k", "v", "log_decay")


class OperatorCase:
    """One rank's shard of a sequence of ``tokens``, and what is done with it."""

    def __init__(self, config: ScalingConfig, group: dist.ProcessGroup, tokens: int, device: torch.device) -> None:
        self.config, self.group, self.device = config, group, device
        self.rank, self.size = group_rank(group), group_size(group)
        local = default_lengths(tokens, self.size)[self.rank]
        generator = torch.Generator(device).manual_seed(config.seed * 65536 + self.rank)
        heads, kv_heads, width = config.heads, config.kv_heads or config.heads, config.head_dim
        self.heads_per_kv = heads // kv_heads
        dtype = getattr(torch, config.dtype)

        def normal(count: int, unit: bool) -> Tensor:
            x = torch.randn(1, local, count, width, generator=generator, dtype=dtype, device=device)
            return x.div_(torch.linalg.vector_norm(x, dim=-1, keepdim=True)) if unit else x

        self.inputs = [normal(heads, True), normal(kv_heads, True), normal(kv_heads, False)]
        self.dout = normal(heads, False)
        if config.gates != "none":
            memory = torch.logspace(math.log10(2), math.log10(4096), heads, device=device)
            gates = -1 / memory
            if config.gates == "token":
                gates = gates * (0.5 + torch.rand(1, local, heads, generator=generator, device=device))
            self.inputs.append(gates.double() if dtype == torch.float64 else gates)

    def call(self, clock: Clock) -> list[Tensor]:
        """Output and gradients; the inputs are kept, nothing else."""
        leaves = [x.detach().requires_grad_() for x in self.inputs]
        out = self._operator(leaves, group=self.group, exchange=self.config.exchange)[0]
        clock.forward_ended()
        return [out.detach(), *torch.autograd.grad(out, leaves, self.dout)]

    def run(self) -> tuple[list[Tensor], Sample]:
        """The checked head's output and gradients, and this rank's figures."""
        results, sample = measure(self.call, self.group, self.device)
        return [self._checked(x, i in (0, 1, 4)).clone() for i, x in enumerate(results)], sample

    def errors(self, results: list[Tensor]) -> dict[str, float]:
        """Relative 2-norm errors of ``results`` of :meth:`run`, over the sequence."""
        want = self._float64()
        if self.config.gates == "head":  # every rank has its own tokens' share of this gradient
            for x in (results[-1], want[-1]):
                all_reduce_sum(x, self.group)
        sums = torch.zeros(len(want), 2, dtype=torch.float64, device=self.device)
        for i, (got, truth) in enumerate(zip(results, want, strict=True)):
            for piece, true in zip(got.flatten().split(1 << 22), truth.flatten().split(1 << 22)):
                sums[i] += torch.stack([(piece.double() - true).square().sum(), true.square().sum()])
        all_reduce_sum(sums, self.group)
        named = ("out", *(f"d{name}" for name in NAMES))
        return {name: math.sqrt(e / s) if s else math.nan for name, (e, s) in zip(named, sums.tolist())}

    def _operator(self, tensors: list[Tensor], **options: Any) -> Any:
        gates = tensors[3] if len(tensors) > 3 else None
        scale = math.sqrt(self.config.head_dim)
        return getattr(hla_dist, self.config.op)(*tensors[:3], log_decay=gates, scale=scale, **options)

    def _checked(self, x: Tensor, per_query: bool) -> Tensor:
        """The last K/V head of k, v and their gradients; the query heads that read it of all else."""
        last = self.heads_per_kv if per_query else 1
        return x[..., -last:] if x.dim() in (1, 3) else x[..., -last:, :]

    def _float64(self) -> list[Tensor]:
        leaves = [self._checked(x, i in (0, 3)).double().requires_grad_() for i, x in enumerate(self.inputs)]
        dout = self._checked(self.dout, True).double()
        # one token gives the states' type and shapes
        like = self._operator([x[:, :1] if x.dim() > 1 else x for x in leaves], output_final_state=True)[1]
        start = type(like)(*(torch.zeros_like(x) for x in like))
        out, state = None, like
        for turn in range(self.size):
            if turn == self.rank:
                start = type(like)(*(x.detach().requires_grad_() for x in start))
                out, state = self._operator(leaves, initial_state=start, output_final_state=True)
            passed = from_rank(turn, list(state), self.group)
            if turn + 1 == self.rank:
                start = type(like)(*passed)
        assert out is not None
        arriving = [torch.zeros_like(x) for x in like]
        gradients: list[Tensor] = []
        leaving = arriving
        for turn in reversed(range(self.size)):
            if turn == self.rank:
                gradients = list(torch.autograd.grad((out, *state), [*leaves, *start], (dout, *arriving)))
                leaving = gradients[len(leaves) :]
            passed = from_rank(turn, leaving, self.group)
            if turn - 1 == self.rank:
                arriving = passed
        return [out.detach(), *gradients[: len(leaves)]]
