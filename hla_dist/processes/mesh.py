"""Which rank does what: the mesh of data and sequence axes, and the process groups along them.

    world = dp_replicate x dp_shard x cp x tp           torchtitan's axes in torchtitan's order, tp being 1
    world = ep x dp_replicate x cp                      where experts are spread over ep ranks

``cp`` shards sequences; ranks of one ``cp`` group read the same samples; the ``dp`` axes and ``ep`` are data axes.
Parameters are whole on every rank or, with FSDP2, sharded over ``dp_shard x cp`` and replicated over ``dp_replicate``.
"""

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from hla_dist.parallel.collectives import Group, group_rank, group_size, resolve_group
from hla_dist.processes.failure import UserError, expect

AXES = ("dp_replicate", "dp_shard", "cp", "tp")


@dataclass(frozen=True)
class Degrees:
    """Ranks along each axis, and whether FSDP2 shards the parameters."""

    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int = 1
    fully_sharded: bool = False
    ep: int = 1


@dataclass(frozen=True)
class MeshPlace:
    """This rank's place in the mesh."""

    world: Group
    sequence: Group  # ranks that share one sample, each with its shard
    rank: int
    replica: int  # this rank's sequence group among those of all data axes
    replicas: int
    device: torch.device
    saving: dist.ProcessGroup | None = None  # the world again, for the thread that writes checkpoints; gloo
    parameters: DeviceMesh | None = None  # what FSDP2 shards over; None: parameters are whole on every rank
    degrees: Degrees | None = None
    experts: DeviceMesh | None = None  # what experts are spread over; None: every rank has all
    same_experts: Group | None = None  # the ranks that have the same experts

    @property
    def shards(self) -> int:
        return group_size(self.sequence)

    @property
    def sharding(self) -> str:
        """How parameters are held, for the first line of a run; nothing where every rank has them whole."""
        if self.degrees is not None and self.experts is not None:
            return f"; experts spread over {self.degrees.ep} ranks"
        if self.degrees is None or self.parameters is None:
            return ""
        return f"; parameters sharded over {self.degrees.dp_shard} x {self.degrees.cp} ranks"

    @property
    def shard(self) -> int:
        return group_rank(self.sequence)


def factorise(
    world_size: int, sp: int = 0, dp_shard: int = 0, dp_replicate: int = 0, tp: int = 1, ep: int = 1
) -> Degrees:
    """The degrees that the flags of those names ask for; UserError if their product is not the world.

    ``sp`` is the degree of cp: 0 means all ranks that the data axes leave. ``dp_shard`` 0 means whole parameters on
    every rank, any other number FSDP2. ``dp_replicate`` 0 means what the others leave. They divide what ``ep`` leaves.
    """
    expect(ep >= 1 and not world_size % ep, "--ep", f"a divisor of the world size {world_size}", ep)
    world_size //= ep
    expect(tp == 1, "--tp", "1 (there is no tensor parallelism; its axis keeps its place)", tp)
    shard = dp_shard or 1
    cp, replicate = sp, dp_replicate
    if not cp:
        replicate = replicate or 1
        cp = world_size // (replicate * shard)
    elif not replicate:
        replicate = world_size // (cp * shard)
    if min(sp, dp_shard, dp_replicate) < 0 or replicate * shard * cp != world_size:
        expect(dp_shard or dp_replicate, "--sp", f"a divisor of the world size {world_size} (or 0 for all ranks)", sp)
        raise UserError(
            f"--dp-replicate, --dp-shard, --sp: expected a product of {world_size}, the world size (0: what the others "
            f"leave), got {dp_replicate}, {dp_shard}, {sp}"
        )
    return Degrees(replicate, shard, cp, tp, dp_shard > 0, ep)


def build_mesh(degrees: Degrees, device: torch.device, save_timeout_s: float = 1800.0) -> MeshPlace:
    """One mesh over the world, whose process groups must be initialised."""
    axes = dict(zip(AXES, (degrees.dp_replicate, degrees.dp_shard, degrees.cp, degrees.tp), strict=True))
    axes = {"ep": degrees.ep} | axes if degrees.ep > 1 else axes
    mesh = dist.init_device_mesh(device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))
    parameters = None
    if degrees.fully_sharded:
        parameters = mesh["dp_shard", "cp"]._flatten("dp_shard_cp")
        if degrees.dp_replicate > 1:  # two axes make FSDP2 shard over the second and sum gradients over both
            # slicing the mesh by a flattened axis is deprecated: the same groups, as a mesh of their own
            groups = [mesh["dp_replicate"].get_group(), parameters.get_group()]
            ranks = mesh.mesh.view(degrees.dp_replicate, -1)
            names = ("dp_replicate", "dp_shard_cp")
            parameters = DeviceMesh.from_group(groups, device.type, mesh=ranks, mesh_dim_names=names)
    spread = degrees.ep > 1
    return MeshPlace(
        world=resolve_group(dist.group.WORLD),
        sequence=mesh["cp"].get_group(),
        rank=dist.get_rank(),
        replica=dist.get_rank() // degrees.cp,
        replicas=degrees.ep * degrees.dp_replicate * degrees.dp_shard,
        device=device,
        saving=dist.new_group(backend="gloo", timeout=timedelta(seconds=save_timeout_s)),
        parameters=parameters,
        degrees=degrees,
        experts=mesh["ep"] if spread else None,
        same_experts=mesh["dp_replicate", "dp_shard", "cp"]._flatten("same_experts").get_group() if spread else None,
    )
