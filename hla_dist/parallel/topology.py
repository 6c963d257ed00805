"""Which ranks of a group share a machine, and which exchange ``"auto"`` means.

auto    up to 8 ranks, or all on one machine       all_gather
        several machines of equal ranks, in order  hierarchical
        otherwise                                  scan

Why all_gather where the simulator has scan ahead (from 3 ranks on): it is one collective that every transport offers
and tunes, issued at once and waited for once, so it compiles, needs no thread and leaves a GPU's host free. scan is
ceil(log2 P) messages that wait for one another, after the host has read every header. The simulator leaves out these
costs (benchmarks/simulator/README.md) and neither exchange has been timed on a cluster: until one decides, the simple
one. Beyond 8 ranks over a network bytes decide: all_gather's grow with the ranks, the others' with their logarithm.
"""

import socket
from weakref import WeakKeyDictionary

from hla_dist.parallel import collectives
from hla_dist.parallel.compiling import assume_constant_result

EXCHANGES = ("auto", "all_gather", "scan", "hierarchical")  # the one list of them
_SMALL = 8  # ranks

_ranks_per_node: WeakKeyDictionary[collectives.Group, int] = WeakKeyDictionary()


def ranks_per_node(pg: collectives.Group) -> int:
    """Ranks on each machine if every machine has as many, in rank order; else 1.

    Communication: one gather of host names at a group's first call, nothing after it.
    """
    if pg not in _ranks_per_node:
        _ranks_per_node[pg] = _equal_runs(collectives.all_gather_objects(socket.gethostname(), pg))
    return _ranks_per_node[pg]


def set_ranks_per_node(group: object, number: int) -> None:
    """Say how many consecutive ranks share a machine, where host names do not tell.

    Containers and several switches hide it. Call it alike on every rank, before the group's first
    operator. No communication.

    Args:
        group: The ranks, as the operators take it.
        number: Ranks on each machine; ValueError unless it divides the group's size.
    """
    pg = collectives.resolve_group(group)
    size = collectives.group_size(pg)
    if not isinstance(number, int) or isinstance(number, bool) or number < 1 or size % number:
        raise ValueError(f"number: expected a divisor of the group's {size} ranks, got {number!r}")
    _ranks_per_node[pg] = number


def _equal_runs(hosts: list[str]) -> int:
    count = len(hosts) // len(set(hosts))
    runs = [hosts[i : i + count] for i in range(0, len(hosts), count)]
    return count if len(runs) == len(set(hosts)) and all(len(set(run)) == 1 for run in runs) else 1


@assume_constant_result
def resolve(exchange: str, group_name: str) -> str:
    """The exchange that runs: ``all_gather``, ``scan``, or ``hierarchical:N`` with N ranks per machine."""
    pg = collectives.group_by_name(group_name)
    size, node = collectives.group_size(pg), ranks_per_node(pg)
    if exchange == "auto":
        if size <= _SMALL or node == size:
            return "all_gather"
        exchange = "hierarchical" if node > 1 else "scan"
    if exchange == "hierarchical":
        return f"hierarchical:{node}"
    return exchange
