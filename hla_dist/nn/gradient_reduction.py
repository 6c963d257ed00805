"""Parameter gradients summed over a group, once a backward.

Autograd runs a hook of ours before it adds a gradient to a parameter, and at the gradient of the module's output; the
first of them in a backward asks the engine for a call at its end, where all gradients are reduced together in the
parameters' order. They are not overlapped with the backward: the order then never depends on timing, and ranks whose
shard is empty, or whose parameters went unused, need no special case.
"""

import sys
import weakref
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils._pytree import tree_leaves

from hla_dist.parallel.agreement import settle_all
from hla_dist.parallel.collectives import Group, all_reduce_sum, broadcast, group_rank

__all__ = ["GradientReduction", "broadcast_from_first"]

_BUCKET_BYTES = 256 << 20


def is_dtensor(x: Tensor) -> bool:
    """Whether ``x`` is a DTensor."""
    # Importing torch.distributed.tensor takes a second, which only those should pay who use it.
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and isinstance(x, loaded.DTensor)


def local(x: Tensor) -> Tensor:
    """What this rank has of a tensor."""
    return x.to_local() if is_dtensor(x) else x  # type: ignore[attr-defined]


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype and device together, in order, at most _BUCKET_BYTES unless one alone is more."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for x in tensors:
        kinds.setdefault((x.dtype, x.device), []).append(x)
    for kind in kinds.values():
        bucket: list[Tensor] = []
        size = 0
        for x in kind:
            if bucket and size + x.nbytes > _BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append(x)
            size += x.nbytes
        yield bucket


def broadcast_from_first(tensors: Iterable[Tensor], pg: Group) -> None:
    """Overwrite ``tensors`` with those of the group's rank 0; DTensors are left alone. One broadcast per bucket."""
    with torch.no_grad():
        for bucket in _buckets(x.detach() for x in tensors if not is_dtensor(x)):
            flat = torch.cat([x.flatten() for x in bucket])
            broadcast(flat.view(torch.uint8), pg)  # as bytes: every dtype travels
            for x, piece in zip(bucket, flat.split([x.numel() for x in bucket]), strict=True):
                x.copy_(piece.view(x.shape))


class GradientReduction:
    """Sums ``.grad`` of the module's plain parameters over ``pg`` at the end of every backward while ``enabled``.

        grad_r <- sum over ranks r of grad_r                      one all-reduce per bucket of one dtype, fixed order

    fp16 and bf16 gradients are summed in float32. A parameter that no rank has a gradient for keeps None; where only
    some have one, the others count as zero. What is in ``.grad`` from an earlier reduction counts once, not once per
    rank: it stays on the group's rank 0 when new gradients are added to it. Raises ValueError for sparse gradients.
    """

    def __init__(self, module: nn.Module, pg: Group) -> None:
        self.enabled = True
        self._module, self._pg = module, pg
        # The plain parameters of now. FSDP2 puts plain ones in their place between a forward and its
        # backward, but those are other objects.
        self._wrapped = {id(p): weakref.ref(p) for p in module.parameters() if self._group_of(p) is not None}
        self._hooks: dict[int, Any] = {}
        self._summed: set[int] = set()  # ids of parameters whose .grad is a sum over the group already
        self._at_end: weakref.ref | None = None
        self._hook_parameters()

    def _group_of(self, p: Tensor) -> Group | None:
        """Over whom a gradient is summed: of a DTensor the group that it names, if any (``models.experts``)."""
        return getattr(p, "gradient_group", None) if is_dtensor(p) else self._pg

    def _parameters(self) -> list[nn.Parameter]:
        """The parameters to reduce, in order; raises ValueError if one was replaced by another after construction."""
        parameters = [p for p in self._module.parameters() if p.requires_grad and self._group_of(p) is not None]
        wrapped = [p for p in parameters if id(p) in self._wrapped and self._wrapped[id(p)]() is p]
        if len(wrapped) < len(parameters) and "torch.distributed.fsdp" not in sys.modules:
            new = {id(p) for p in parameters} - {id(p) for p in wrapped}
            names = [name for name, p in self._module.named_parameters() if id(p) in new]
            raise ValueError(
                f"module: expected the parameters it was wrapped with, got others for {names}: wrap it last"
            )
        return wrapped

    def _hook_parameters(self) -> None:
        """Before every step, since a parameter without gradient takes no hook and may be unfrozen later."""
        for p in self._parameters():
            if id(p) not in self._hooks:
                # the hook keeps the reduction: gradients are summed even where nobody has kept the wrapper
                self._hooks[id(p)] = p.register_hook(partial(self._before_accumulation, self._wrapped[id(p)]))

    def prepare(self, output: Any) -> None:
        """After a forward: see to it that a backward through ``output`` ends in a reduction, whatever it reaches."""
        self._hook_parameters()

        for x in tree_leaves(output):
            if isinstance(x, Tensor) and x.grad_fn is not None:
                x.register_hook(lambda _: self._ask_for_reduction())

    def remove(self) -> None:
        """Take every hook off the parameters."""
        for handle in self._hooks.values():
            handle.remove()
        self._hooks.clear()
        self.enabled = False

    def _before_accumulation(self, parameter: weakref.ref, _: Tensor) -> None:
        self._keep_sum_on_first(parameter())
        self._ask_for_reduction()

    def _keep_sum_on_first(self, p: nn.Parameter | None) -> None:
        if p is not None and id(p) in self._summed:
            self._summed.discard(id(p))
            group = self._group_of(p)
            if p.grad is not None and group is not None and group_rank(group) != 0:
                p.grad.detach().zero_()

    def _ask_for_reduction(self) -> None:
        """Once a backward; if that fails, the engine drops the callback, the reference dies, and the next asks anew."""
        if not self.enabled or (self._at_end is not None and self._at_end() is not None):
            return
        callback = partial(self.reduce)  # the engine alone keeps it alive until then
        self._at_end = weakref.ref(callback)
        Variable._execution_engine.queue_callback(callback)

    @torch.no_grad()
    def reduce(self) -> None:
        """Sum the gradients now; every rank of the group must call it."""
        self._at_end = None
        parameters = self._parameters()
        for p in parameters:
            if p.grad is not None and p.grad.layout != torch.strided:
                raise ValueError(f"gradients: expected dense ones (nn.Embedding(sparse=False)), got {p.grad.layout}")
            self._keep_sum_on_first(p)
        settle_all()
        groups: dict[Any, list[Tensor]] = {}
        for p in parameters:
            groups.setdefault(self._group_of(p), []).append(p)
        for pg, members in groups.items():
            for bucket in _buckets(members):
                self._reduce_bucket(bucket, pg)
        self._summed = {id(p) for p in parameters if p.grad is not None}

    def _reduce_bucket(self, bucket: list[Tensor], pg: Group) -> None:
        dtype = torch.float32 if bucket[0].dtype in (torch.float16, torch.bfloat16) else bucket[0].dtype
        pieces = [local(torch.zeros_like(p) if p.grad is None else p.grad) for p in bucket]
        present = torch.tensor([float(p.grad is not None) for p in bucket], device=bucket[0].device)
        flat = torch.cat([x.flatten().to(dtype) for x in (*pieces, present)])
        all_reduce_sum(flat, pg)
        *sums, counts = flat.split([*(x.numel() for x in pieces), len(bucket)])
        # counts are read only where a gradient is missing: on a GPU that waits for the reduction
        counted = counts.real.tolist() if any(p.grad is None for p in bucket) else []
        for i, (p, total) in enumerate(zip(bucket, sums, strict=True)):
            if p.grad is None and counted[i] > 0:
                p.grad = torch.zeros_like(p)
            if p.grad is not None:
                local(p.grad).copy_(total.view(pieces[i].shape))
