"""A mixture of experts in place of a SwiGLU layer, and the loss that keeps its experts equally busy.

Letters: B batch, T local tokens, D hidden_size, E experts, k of them active per token, M width of an expert, L layers,
N = B T k rows, one per token and expert that it takes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hla_dist.functional.exchange_ops import exchange_gather
from hla_dist.nn.gradient_reduction import local
from hla_dist.nn.initialization import normal_linear
from hla_dist.operators.precision import sum_dtype, without_autocast
from hla_dist.parallel.collectives import Group, all_to_all_flat, backward_group, group_size, named, resolve_group

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class MixtureOfExperts(nn.Module):
    """Every token through the ``active`` most probable of ``experts`` SwiGLU networks.

        p = softmax(x W_router)                                     [B, T, E]
        y = sum over the k greatest p_e of w_e SwiGLU_e(x)          [B, T, D]
        w_e = p_e / sum of those; with k = 1 p_e itself

    No token is dropped: y depends on its own x alone. Routing is in float32, or in float64 for float64.
    ``gate_up`` ``[E, 2M, D]`` and ``down`` ``[E, D, M]`` hold one matrix of ``nn.Linear`` per expert.

    Communication: none, or, after ``shard_experts``, one all-to-all of E counts and two of rows
    forward, two of rows backward.

    Args:
        hidden_size: D.
        mlp_size: M, the width of an expert.
        experts: E.
        active: k, the experts that a token takes.
        residual_scale: Factor of the deviation of ``down``.
    """

    def __init__(self, hidden_size: int, mlp_size: int, experts: int, active: int, residual_scale: float = 1.0) -> None:
        super().__init__()
        self.active = active
        self.group: Any = None  # ranks that share the experts out among them (shard_experts)
        self.router = normal_linear(hidden_size, experts, hidden_size**-0.5)
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * mlp_size, hidden_size))
        self.down = nn.Parameter(torch.empty(experts, hidden_size, mlp_size))
        self.deviations = (hidden_size**-0.5, residual_scale * mlp_size**-0.5)

    @property
    def share(self) -> float:
        """The share of the experts that a token takes."""
        return self.active / self.router.out_features

    def reset_parameters(self) -> None:
        """Draw every expert as a SwiGLU layer is drawn, and the router with deviation 1/sqrt(inputs)."""
        self.router.reset_parameters()
        for weight, deviation in zip((self.gate_up, self.down), self.deviations, strict=True):
            nn.init.normal_(weight, std=deviation)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return y ``[B, T, D]`` and loads ``[B, T, 2, E]``: 1 where a token takes an expert, and p."""
        weights, taken, loads = self._route(x)
        order = taken.flatten().argsort(stable=True)  # [N]: rows by expert, those of one in the order of tokens
        rows = x.flatten(0, 1).index_select(0, order // self.active)
        counts = loads[..., 0, :].flatten(0, 1).to(torch.int64).sum(0)  # [E]
        y = self._swiglu(rows, counts) if self.group is None else self._elsewhere(rows, counts, self.group)
        y = y.index_select(0, order.argsort())
        return (y.view(*taken.shape, x.shape[-1]) * weights.to(y.dtype)[..., None]).sum(-2), loads

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights and experts ``[B, T, k]`` of every token, and loads."""
        wide = sum_dtype(x.dtype)
        with without_autocast(x.device):
            p = F.linear(x.to(wide), self.router.weight.to(wide)).softmax(-1)
            weights, taken = p.topk(self.active, -1)
            if self.active > 1:
                weights = weights / weights.sum(-1, keepdim=True)
            loads = torch.stack([torch.zeros_like(p).scatter(-1, taken, 1.0), p], -2)
        return weights, taken, loads

    def _swiglu(self, rows: Tensor, counts: Tensor) -> Tensor:
        """``rows`` ``[N, D]`` through their experts: the first ``counts[0]`` through the first, and so on."""
        gate, up = self._product(rows, self.gate_up, counts).chunk(2, -1)
        return self._product(F.silu(gate) * up, self.down, counts)

    def _elsewhere(self, rows: Tensor, counts: Tensor, pg: Group) -> Tensor:
        """As ``_swiglu``, every row on the rank of the group that has its expert, and back."""
        ranks = group_size(pg)
        each = [len(counts) // ranks] * ranks
        with named("counts of experts", pg):
            arriving = all_to_all_flat(counts, each, each, pg)  # [E]: by rank of origin, then by expert of this rank
        sends, receives = torch.stack([counts, arriving]).view(2, ranks, -1).sum(-1).tolist()
        experts = torch.arange(each[0], device=rows.device).repeat(ranks).repeat_interleave(arriving)
        order = experts.argsort(stable=True)
        arrived = _Travel.apply(rows, sends, receives, pg).index_select(0, order)
        y = self._swiglu(arrived, arriving.view(ranks, -1).sum(0)).index_select(0, order.argsort())
        return _Travel.apply(y, receives, sends, pg)

    def _product(self, rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        """Every row times its expert's matrix: ``[N, I]``, ``[E, O, I]`` -> ``[N, O]``.

        By torch's grouped product, one launch and no look at ``counts`` from the host, where it takes dtype and widths
        (``has_grouped_product``). Else expert by expert, which gives the same to rounding and waits for ``counts``.
        """
        weight = local(weight)
        if torch.is_autocast_enabled(rows.device.type):  # which does not know the grouped product
            dtype = torch.get_autocast_dtype(rows.device.type)
            rows, weight = rows.to(dtype), weight.to(dtype)
        if has_grouped_product(rows.dtype, *weight.shape[1:]):
            return F.grouped_mm(rows, weight.mT, offs=counts.cumsum(0).to(torch.int32))
        parts = rows.split(counts.tolist())
        return torch.cat([F.linear(part, matrix) for part, matrix in zip(parts, weight, strict=True)])

    def extra_repr(self) -> str:
        experts, hidden_size, mlp_size = self.down.shape
        return f"{hidden_size}, {mlp_size}, experts={experts}, active={self.active}"


def has_grouped_product(dtype: torch.dtype, *widths: int) -> bool:
    """Whether torch has a grouped product of this dtype and these widths.

    It takes bfloat16, float16 and float32, and rows of whole 16 bytes; its compiler only bfloat16.
    """
    dtypes = [torch.bfloat16] if torch.compiler.is_compiling() else [torch.bfloat16, torch.float16, torch.float32]
    return dtype in dtypes and all(width * dtype.itemsize % 16 == 0 for width in widths)


class _Travel(torch.autograd.Function):
    """The next ``sends[r]`` rows go to rank r and ``receives[r]`` come from it: ``[sum of sends, D]`` -> the others.

    Communication: one all-to-all forward, one backward.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sends: list[int], receives: list[int], pg: Group) -> Tensor:
        ctx.call = (sends, receives, pg)
        return _travel(rows, sends, receives, pg)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sends, receives, pg = ctx.call
        return _travel(grad, receives, sends, backward_group(pg)), None, None, None


def _travel(rows: Tensor, sends: list[int], receives: list[int], pg: Group) -> Tensor:
    width = rows.shape[1]
    sent, received = ([width * n for n in numbers] for numbers in (sends, receives))
    with named("rows of experts", pg):
        return all_to_all_flat(rows.flatten(), sent, received, pg).view(-1, width)


def shard_experts(model: nn.Module, mesh: DeviceMesh, replicas: Any = None) -> None:
    """Keep of every mixture in ``model`` this rank's experts only; rows travel to the rank that has theirs.

        gate_up [E, 2M, D], down [E, D, M]  ->  DTensors of the same shapes, sharded over E

    Every rank of the one-dimensional ``mesh`` reads other tokens; gradients are those of one process that reads them
    all. Parameters must be equal on all ranks before. Call it before ``SequenceParallelHLA`` wraps the model, which
    sums gradients of experts over ``replicas``, the group of ranks that hold the same ones (None: no other rank does),
    and before the optimiser is made. Raises ValueError unless E is a multiple of the ranks.
    """
    from torch.distributed.tensor import DTensor, Shard  # late: a second

    pg = resolve_group(mesh)
    ranks = group_size(pg)
    replicas = None if replicas is None or group_size(resolve_group(replicas)) == 1 else resolve_group(replicas)
    mixtures = [module for module in model.modules() if isinstance(module, MixtureOfExperts)]
    number = mixtures[0].router.out_features if mixtures else 0
    if not number or number % ranks:
        raise ValueError(f"experts: expected a multiple of the {ranks} ranks of the expert axis, got {number}")
    for mixture in mixtures:
        mixture.group = pg
        for name in ("gate_up", "down"):
            part = getattr(mixture, name).detach().chunk(ranks)[mesh.get_local_rank()].clone()
            weight = nn.Parameter(DTensor.from_local(part, mesh, [Shard(0)], run_check=False))
            weight.gradient_group = replicas  # type: ignore[attr-defined]  # read by GradientReduction
            setattr(mixture, name, weight)


def balance_loss(loads: Tensor, group: Any = None) -> Tensor:
    """Return this rank's share of the balance loss of L layers, ``loads`` ``[L, B, 2, E]`` summed over its tokens.

        f_e = share of the rows that expert e takes in the whole sequence, over all ranks of ``group``
        loss = sum over tokens t of the mean over layers of E sum_e f_e p_te

    It is 1 per token where all experts are equally busy, and greater elsewhere. f has no gradient, so the gradient of a
    share is that of the rank's tokens, and shares add up. Each sequence of a batch is balanced alone: the loss does not
    depend on what else a step reads.

    Communication: one all-gather of L B E numbers forward, none backward.
    """
    counts, p = loads.detach()[..., 0, :].contiguous(), loads[..., 1, :]  # [L, B, E]
    if group is not None and group_size(pg := resolve_group(group)) > 1:
        description = f"counts {list(counts.shape)} {counts.dtype}"
        counts = exchange_gather([counts], pg.group_name, "experts forward", description)[0].sum(0)
    share = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    return p.shape[-1] * (share * p).sum() / len(p)
