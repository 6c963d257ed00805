"""SequenceParallelHLA: to the sequence what DistributedDataParallel is to the batch.

The wrapper itself computes nothing. It hands its group to every HLAAttention and SoftmaxAttention inside, so that each
runs over the group, and it leaves the gradient reduction to ``hla_dist.nn.gradient_reduction.GradientReduction``.
"""

from __future__ import annotations

import copy
import hashlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hla_dist.nn.attention import HLAAttention
from hla_dist.nn.gradient_reduction import GradientReduction, broadcast_from_first, is_dtensor
from hla_dist.nn.memory_attention import MemoryAttention
from hla_dist.nn.softmax_attention import SoftmaxAttention
from hla_dist.parallel.collectives import Group, all_gather_objects, group_size, resolve_group

__all__ = ["SequenceParallelHLA"]

_LAYERS = (HLAAttention, SoftmaxAttention)  # what runs over a group
_LOAD_HOOKS = "_load_state_dict_pre_hooks"


class SequenceParallelHLA(nn.Module):
    """Run ``module``, which holds HLAAttention or SoftmaxAttention layers, on this rank's shard of every
    sequence.

        wrapped(x[:, shard]) = module(x)[:, shard]         for every rank's shard, in rank order
        sum over ranks of d loss_r / d w  ->  w.grad       on every rank, after each backward

    Inputs are local shards (``hla_dist.shard_batch``). The loss on each rank is its share of the whole
    (``hla_dist.token_loss``), and gradients are *summed*. Names in ``state_dict``, ``named_parameters``
    and ``named_modules`` are the module's own. Attributes that the wrapper lacks are looked up in
    ``module``.

    Communication: that of the attention layers. At construction an all-gather of names and shapes, and
    a broadcast of parameters. After a backward one all-reduce of all gradients per dtype (in buckets of
    256 MiB), none under ``no_sync()``. Every rank runs backward if one does.

    Args:
        module: One layer or a whole model.
        group: ProcessGroup, one-dimensional DeviceMesh or mpi4py communicator over which sequences are
            sharded, in rank order.
        reduce_gradients: Sum the gradients of plain parameters over ``gradient_group`` once per
            backward. DTensor parameters are left to FSDP2, whose mesh must then contain the sequence
            ranks. Its division of gradients is turned off, unless ``set_gradient_divide_factor`` has
            set one.
        shard_lengths: One length per rank, where they are known: rotary positions then need no
            communication. May be set anew before any step as the attribute of that name.
        gradient_group: The group over which gradients are summed and parameters agreed on; None:
            ``group``. On a mesh of data x sequence axes it is all ranks, with losses divided by *all*
            valid tokens.
        exchange: How summaries travel, for every layer; None: as each layer says.
        wire_dtype: What summaries travel in, for every layer; None: as each layer says.
        sync_parameters: Start from the first rank's parameters and buffers.

    Raises:
        ValueError: The same on every rank of ``gradient_group``, if the module holds no such layer, one
            that has a group already (wrapped twice), parameters on the meta device, or parameters that
            differ between ranks in name, shape, dtype or requires_grad.

    An example on several ranks is in docs/wrap-your-model.md.
    """

    def __init__(
        self,
        module: nn.Module,
        group: Any,
        *,
        reduce_gradients: bool = True,
        shard_lengths: Sequence[int] | None = None,
        gradient_group: Any = None,
        exchange: str | None = None,
        wire_dtype: torch.dtype | None = None,
        sync_parameters: bool = True,
    ) -> None:
        super().__init__()
        pg = resolve_group(group)
        everyone = pg if gradient_group is None else resolve_group(gradient_group)
        problem = _problem(module, pg, shard_lengths)
        # Agreed on before anything is set: a rank with a problem must not leave the others waiting.
        _agree(module, problem, everyone)
        self.module = module
        self.group, self.gradient_group = pg, everyone
        self._layers = [layer for layer in module.modules() if isinstance(layer, _LAYERS)]
        for layer in self._layers:
            layer.group = pg
            if isinstance(layer, (HLAAttention, MemoryAttention)):
                layer.exchange = exchange or layer.exchange
                layer.wire_dtype = wire_dtype or layer.wire_dtype
        self.shard_lengths = shard_lengths
        for part in _under_fsdp(module):
            part.reshard()  # only while FSDP2 has its parameters sharded can one tell that they are its own
        self._fsdp_sums = False
        several = group_size(everyone) > 1
        if sync_parameters and several:
            broadcast_from_first([*module.parameters(), *module.buffers()], everyone)
        self._reduction = GradientReduction(module, everyone) if reduce_gradients and several else None
        self._register_load_state_dict_pre_hook(_add_module_to_keys)

    @property
    def shard_lengths(self) -> Sequence[int] | None:
        """Tokens of every rank's shard, if they are known."""
        return self._shard_lengths

    @shard_lengths.setter
    def shard_lengths(self, lengths: Sequence[int] | None) -> None:
        problem = _length_problem(lengths, group_size(self.group))
        if problem:
            raise ValueError(problem)
        self._shard_lengths = lengths
        for layer in self._layers:
            layer.shard_lengths = lengths

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return ``module(*args, **kwargs)``; tensors are local shards."""
        if not self._fsdp_sums and not torch.compiler.is_compiling():
            self._fsdp_sums = True  # at the first call: fully_shard may come after the wrapper
            _sum_under_fsdp(self)
        output = self.module(*args, **kwargs)
        if self._reduction is not None and not torch.compiler.is_compiling() and torch.is_grad_enabled():
            self._reduction.prepare(output)
        return output

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Keep the gradients of backwards inside on the rank.

        The first backward outside reduces what has accumulated.
        """
        if self._reduction is None:
            yield
            return
        before, self._reduction.enabled = self._reduction.enabled, False
        try:
            yield
        finally:
            self._reduction.enabled = before

    @contextmanager
    def alone(self) -> Iterator[nn.Module]:
        """Run the module inside on whole sequences on this rank alone: to generate, for example."""
        groups = [layer.group for layer in self._layers]
        try:
            with self.no_sync():
                for layer in self._layers:
                    layer.group = None
                yield self.module
        finally:
            for layer, group in zip(self._layers, groups, strict=True):
                layer.group = group

    def unwrap(self) -> nn.Module:
        """Return the module without group and hooks; the wrapper cannot be used afterwards."""
        for layer in self._layers:
            layer.group = layer.shard_lengths = None
        self._layers = []
        if self._reduction is not None:
            self._reduction.remove()
            self._reduction = None
        return self.module

    # Names are those of the module, here and in whatever holds this wrapper: the two share one prefix.

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        memo = set() if memo is None else memo
        if self not in memo:
            if remove_duplicate:
                memo.add(self)
            yield prefix, self
            yield from self.module.named_modules(memo, prefix, remove_duplicate)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        return self.module.load_state_dict(state_dict, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> SequenceParallelHLA:
        # Copies of weights, but handles of the same groups, and hooks of their own.
        memo[id(self.group)], memo[id(self.gradient_group)] = self.group, self.gradient_group
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        own = {key: value for key, value in self.__dict__.items() if key not in ("_reduction", _LOAD_HOOKS)}
        twin.__dict__.update(copy.deepcopy(own, memo))
        twin.__dict__[_LOAD_HOOKS] = copy.copy(self.__dict__[_LOAD_HOOKS])
        twin._reduction = None
        for before, after in zip(self._layers, twin._layers, strict=True):
            after.shard_lengths = before.shard_lengths
        if self._reduction is not None:
            twin._reduction = GradientReduction(twin.module, self.gradient_group)
            twin._reduction.enabled = self._reduction.enabled
        return twin

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "SequenceParallelHLA cannot be pickled, a process group ends with its process: "
            "save its state_dict() or pickle its .module"
        )


def _add_module_to_keys(state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Lets a parent's load_state_dict find what this wrapper's state_dict left without ``module.``."""
    for key in [key for key in state_dict if key.startswith(prefix)]:
        state_dict[f"{prefix}module.{key[len(prefix) :]}"] = state_dict.pop(key)


def _under_fsdp(module: nn.Module) -> list[Any]:
    """The modules that FSDP2 shards; none where nobody has imported it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [part for part in module.modules() if isinstance(part, fsdp.FSDPModule)]


def _sum_under_fsdp(module: nn.Module) -> None:
    """Have FSDP2 sum gradients of shares, where it would divide by its ranks and nothing else was asked of it."""
    for part in _under_fsdp(module):
        state = part._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        if all(group is None or group.gradient_divide_factor is None for group in groups):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it sums


def _length_problem(lengths: Sequence[int] | None, ranks: int) -> str:
    if lengths is not None and (len(lengths) != ranks or min(lengths) < 0):
        return f"shard_lengths: expected one length >= 0 for each of {ranks} ranks, got {list(lengths)}"
    return ""


def _problem(module: Any, pg: Group, lengths: Sequence[int] | None) -> str:
    """What keeps this rank from wrapping ``module``; empty if nothing does."""
    if not isinstance(module, nn.Module):
        return f"module: expected a torch.nn.Module, got {type(module).__name__}"
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, _LAYERS)}
    if not layers:
        kind = type(module).__name__
        return f"module: expected at least one HLAAttention or SoftmaxAttention inside, got {kind} with none"
    for name, layer in layers.items():
        if layer.group is not None:
            return (
                f"module: expected attention layers without a group, got {name or 'one'} that has one "
                "(wrapped twice? unwrap() undoes it)"
            )
    if any(p.is_meta and not is_dtensor(p) for p in module.parameters()):
        return "module: expected parameters on a real device (to_empty before wrapping), got the meta device"
    return _length_problem(lengths, group_size(pg))


def _agree(module: nn.Module, problem: str, pg: Group) -> None:
    """Raise the same ValueError on every rank if one has a ``problem``, or parameters that differ from the first's."""
    described = []
    if not problem:
        described = [
            f"{n} {p.dtype} {list(p.shape)} requires_grad={p.requires_grad}" for n, p in module.named_parameters()
        ]
    digest = hashlib.sha256("\n".join(described).encode()).hexdigest()
    answers = all_gather_objects((problem, digest), pg)
    problems = [other for other, _ in answers]
    if any(problems):
        alike = len(set(problems)) == 1
        named = "; ".join(f"rank {rank}: {other}" for rank, other in enumerate(problems) if other)
        raise ValueError(problem if alike else named)
    if len({d for _, d in answers}) > 1:
        everything = all_gather_objects(described, pg)
        rank = next(r for r, other in enumerate(everything) if other != everything[0])
        first, other = everything[0], everything[rank]
        alone = [[item for item in a if item not in set(b)] for a, b in ((first, other), (other, first))]
        raise ValueError(
            "module: expected the same parameters in the same order on every rank, got "
            f"{(alone[0] or ['another order'])[0]} on rank 0 and {(alone[1] or ['another order'])[0]} on rank {rank}"
        )
