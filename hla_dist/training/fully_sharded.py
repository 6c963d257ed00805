"""Parameters sharded by FSDP2 over the data and sequence ranks of a mesh, and whole tensors from and to shards."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hla_dist import HLAAttention, MemoryAttention, SequenceParallelHLA
from hla_dist.models import LanguageModel
from hla_dist.models.experts import shard_experts
from hla_dist.nn.gradient_reduction import is_dtensor, local
from hla_dist.processes.mesh import MeshPlace


def distributed(
    model: LanguageModel, mesh: MeshPlace, sync_parameters: bool = True, on_host: bool = False, **options: Any
) -> SequenceParallelHLA:
    """``model`` over the mesh: sequences sharded over ``mesh.sequence``, gradients summed over all ranks.

    With ``mesh.parameters`` every block, and what is around them, becomes a unit of FSDP2, sharded over that mesh:
    before it runs its parameters are gathered, after its backward its gradients are summed and sharded. Losses are
    shares of the whole (``token_loss``), so nothing is divided. ``on_host`` keeps the shards, their gradients and so
    the optimiser's moments in host memory. With ``mesh.experts`` each rank keeps its share of the experts. Call it
    before the optimiser is made.
    """
    if mesh.parameters is not None:
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard  # late: seconds of imports

        policy = CPUOffloadPolicy(pin_memory=mesh.device.type != "cpu") if on_host else OffloadPolicy()
        for unit in (*model.blocks, model):
            fully_shard(unit, mesh=mesh.parameters, offload_policy=policy)
            unit.set_gradient_divide_factor(1.0)
            # gloo has no sum with a factor: without a division there need not be one
            unit.set_force_sum_reduction_for_comms(True)
    if mesh.experts is not None:
        shard_experts(model, mesh.experts, mesh.same_experts)
    return SequenceParallelHLA(
        model, mesh.sequence, gradient_group=mesh.world, sync_parameters=sync_parameters, **options
    )


def twin_in(dtype: torch.dtype, model: SequenceParallelHLA, mesh: MeshPlace) -> SequenceParallelHLA:
    """A copy of a sharded model in another dtype: FSDP2 remembers the one in which a model first ran, and a DTensor
    whose gradients are watched cannot change its own.
    """
    original = model.module
    assert isinstance(original, LanguageModel)
    copy = LanguageModel(original.config).to(dtype).to(mesh.device)
    copy.activation_checkpointing = original.activation_checkpointing
    kinds = (HLAAttention, MemoryAttention)
    for layer, source in zip(copy.modules(), original.modules(), strict=True):
        if isinstance(layer, kinds) and isinstance(source, kinds):
            layer.exchange, layer.wire_dtype = source.exchange, source.wire_dtype
    twin = distributed(copy, mesh, sync_parameters=False, shard_lengths=model.shard_lengths)
    with torch.no_grad():
        for target, given in zip(twin.parameters(), model.parameters(), strict=True):
            local(target).copy_(local(given))
    return twin


def alike(tensors: Iterable[Any]) -> list[list[Any]]:
    """Plain tensors and sharded ones apart, where there are any: torch's fused operations take one kind at a time."""
    kinds: dict[bool, list[Any]] = {}
    for x in tensors:
        kinds.setdefault(is_dtensor(x), []).append(x)
    return list(kinds.values())


def whole(x: Any) -> Tensor:
    """All of a tensor that may be sharded; then every rank must ask, and it is gathered."""
    return x.full_tensor() if is_dtensor(x) else x


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """``model.state_dict()`` of whole tensors; every rank must ask."""
    return {name: whole(x) for name, x in model.state_dict().items()}
