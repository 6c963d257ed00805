"""Which rank does what: the mesh of data and sequence axes, and the process groups along them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from hla_dist.parallel.collectives import group_rank, group_size, resolve_group
from hla_dist.training.failure import UserError
from hla_dist.training.rendezvous import fresh_store


@dataclass(frozen=True)
class Layout:
    """This rank's place: ``world = dp_replicate x cp``, the sequence axis ``cp`` innermost as in torchtitan."""

    world: dist.ProcessGroup
    sequence: dist.ProcessGroup  # ranks that share one sample, each with its shard
    rank: int
    replica: int  # this rank's sequence group among the replicas
    replicas: int
    device: torch.device
    saving: dist.ProcessGroup | None = None  # the world again, for the thread that writes checkpoints; gloo

    @property
    def shards(self) -> int:
        return group_size(self.sequence)

    @property
    def shard(self) -> int:
        return group_rank(self.sequence)


def sequence_ranks(world_size: int, sp: int) -> int:
    """Ranks a sequence is sharded over, ``sp`` 0 meaning all; UserError if that does not divide the world."""
    if sp < 0 or (sp and world_size % sp):
        raise UserError(f"--sp: expected a divisor of the world size {world_size} (or 0 for all ranks), got {sp}")
    return sp or world_size


def connect(rank: int, world_size: int, device: torch.device, timeout_s: float, from_env: bool) -> None:
    """Joins the process group: NCCL on GPUs, gloo elsewhere; a world of one needs no rendezvous."""
    options: dict[str, Any] = {"timeout": timedelta(seconds=timeout_s)}
    if device.type == "cuda":
        options["device_id"] = device
    store: dist.Store = dist.HashStore()
    if from_env:
        common, _, _ = next(dist.rendezvous("env://", timeout=options["timeout"]))
        store = fresh_store(common, rank, world_size, timeout_s)
    options |= {"store": store, "rank": rank, "world_size": world_size}
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **options)


def build_layout(sp: int, device: torch.device, save_timeout_s: float = 1800.0) -> Layout:
    """The mesh ``(dp_replicate, cp)`` over the world; process groups must be initialised."""
    world_size = dist.get_world_size()
    shards = sequence_ranks(world_size, sp)
    mesh = dist.init_device_mesh(device.type, (world_size // shards, shards), mesh_dim_names=("dp_replicate", "cp"))
    replica, _ = mesh.get_coordinate() or (0, 0)
    return Layout(
        world=resolve_group(dist.group.WORLD),
        sequence=mesh["cp"].get_group(),
        rank=dist.get_rank(),
        replica=replica,
        replicas=world_size // shards,
        device=device,
        saving=dist.new_group(backend="gloo", timeout=timedelta(seconds=save_timeout_s)),
    )
