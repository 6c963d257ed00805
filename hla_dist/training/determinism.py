"""The same bits twice, and the same bits on every rank."""

from typing import Any

import torch
from torch import Tensor, nn

from hla_dist.nn.gradient_reduction import is_dtensor
from hla_dist.parallel.collectives import all_gather_flat, group_size
from hla_dist.processes.failure import UserError

_BLOCK = 1 << 20  # bounds the memory of a hash
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def be_deterministic() -> None:
    """Only operations whose result does not depend on timing; torch raises RuntimeError naming one without.

    On GPUs cuBLAS also needs the environment variable CUBLAS_WORKSPACE_CONFIG before its first use; launch/train.py
    sets it.
    """
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def random_state(device: torch.device) -> Tensor:
    """torch's random state on this rank as bytes, the GPU's after the CPU's."""
    cpu = torch.get_rng_state()
    return torch.cat([cpu, torch.cuda.get_rng_state(device)]) if device.type == "cuda" else cpu


def set_random_state(state: Tensor) -> None:
    """Inverse of :func:`random_state`; the GPU's part is set only where there is one."""
    size = torch.get_rng_state().numel()
    torch.set_rng_state(state[:size].clone())  # a clone: torch reads it as a struct, which must be aligned
    if state.numel() > size and torch.cuda.is_available():
        torch.cuda.set_rng_state(state[size:].clone())


def check_equal_parameters(model: nn.Module, group: Any, advice: str = "resume from the last checkpoint") -> None:
    """Raise UserError, the same on every rank of ``group``, unless all hold the same bits of every parameter.

    The error ends in ``advice``. Of a sharded parameter (DTensor) the ranks are compared that hold the same slice. One
    all-gather of two numbers per parameter, and one pass over the parameters.
    """
    names, numbers = [], []
    for name, parameter in model.named_parameters():
        local, place = _local(parameter.detach())
        names.append(name)
        numbers += [torch.tensor(place, device=local.device), bit_hash(local)]
    if not names:
        return
    gathered, _ = all_gather_flat(torch.stack(numbers), group)
    table = gathered.view(group_size(group), len(names), 2).tolist()
    for index, name in enumerate(names):
        holders: dict[int, dict[int, list[int]]] = {}  # place -> hash -> ranks
        for rank, row in enumerate(table):
            place, value = row[index]
            holders.setdefault(place, {}).setdefault(value, []).append(rank)
        for values in holders.values():
            if len(values) > 1:
                few = min(values.values(), key=len)
                raise UserError(
                    f"parameters: expected the same bits on every rank, got others on rank(s) "
                    f"{', '.join(map(str, few))} in {name}; {advice}"
                )


def bit_hash(x: Tensor) -> Tensor:
    """An int64 scalar that changes with any single bit of ``x``, and, nearly surely, with any other change.

    sum over i of (2 i + 1) bits_i  modulo 2^64            exact, so no order of summation matters
    """
    bits = x.contiguous().view(-1).view(_INTEGERS[x.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for begin in range(0, len(bits), _BLOCK):
        block = bits[begin : begin + _BLOCK].to(torch.int64)
        weights = torch.arange(begin, begin + len(block), device=x.device) * 2 + 1  # odd: no bit is multiplied away
        total += (block * weights).sum()
    return total


def _local(parameter: Tensor) -> tuple[Tensor, int]:
    """This rank's part of a parameter, and a number that ranks with the same part share."""
    if not is_dtensor(parameter):
        return parameter, 0
    place, mesh = 0, parameter.device_mesh  # type: ignore[attr-defined]
    for dim, (placement, coordinate) in enumerate(zip(parameter.placements, mesh.get_coordinate(), strict=True)):  # type: ignore[attr-defined]
        if placement.is_shard():
            place = place * mesh.size(dim) + coordinate
    return parameter.to_local(), place  # type: ignore[attr-defined]
