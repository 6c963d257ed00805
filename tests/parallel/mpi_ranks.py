"""What ``test_mpi.py`` runs: ``mpirun -n 8 python -m mpi4py -m tests.parallel.mpi_ranks DIRECTORY NAME...``

The public functions named run on every rank, in order, and raise where something is wrong; every rank leaves its
tracebacks in DIRECTORY, and the first failure ends the run. torch.distributed is never initialised here.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor, nn

import hla_dist
from hla_dist.functional import exchange_ops
from hla_dist.operators import OPERATORS
from hla_dist.operators.summary import Summary
from hla_dist.parallel import collectives, mpi
from tests.harness import assert_bitwise, assert_close, compile_whole, raises_value_error, shifted
from tests.parallel.sharded import assemble, run_shard, whole_problem
from tests.problems import KINDS, STREAMING, Problem, check, mask_options
from tests.tolerances import FLOAT64

WORLD = MPI.COMM_WORLD
# every size, some of them in an order that is not the world's; the groups of a row work at the same time
GROUPS = {
    "8": [list(range(8))],
    "1, 3 and 4": [[5], [1, 4, 7], [6, 0, 3, 2]],
    "2": [[6, 3], [0, 7]],
}
SPLITS = {
    1: [65],
    2: [0, 65],
    3: [32, 0, 33],
    4: [64, 1, 0, 0],
    8: [9, 8, 0, 8, 16, 0, 23, 1],
}
EXCHANGES = ("all_gather", "scan", "hierarchical:2")
B, T, H, K, V = 1, 7, 3, 4, 2


def _mine(groups: list[list[int]]) -> Any:
    """The communicator of this rank's list of world ranks, in the list's order; COMM_NULL in none."""
    for color, ranks in enumerate(groups):
        if WORLD.rank in ranks:
            return WORLD.Split(color, ranks.index(WORLD.rank))
    return WORLD.Split(MPI.UNDEFINED)


def _outcome(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


def _exclusive_scan(own: Summary) -> Summary:
    """MPI's own, with ``combine`` as a non-commutative operator; zero on rank 0."""
    names = list(own.fields)

    def flat(summary: Summary) -> Tensor:
        return torch.cat([x.flatten() for x in (summary.rho, *(summary.fields[name] for name in names))])

    def summary(numbers: Tensor) -> Summary:
        rho, *rest = numbers.split([own.rho.numel(), *(own.fields[name].numel() for name in names)])
        fields = {name: x.view(own.fields[name].shape) for name, x in zip(names, rest, strict=True)}
        return Summary(own.operator, rho.view(own.rho.shape), fields)

    def combine(left: Any, right: Any, datatype: Any) -> None:
        earlier, later = (torch.frombuffer(x, dtype=torch.float64) for x in (left, right))
        later.copy_(flat(hla_dist.combine(summary(earlier.clone()), summary(later.clone()))))

    sent = flat(own)
    received = torch.zeros_like(sent)
    whole = MPI.DOUBLE.Create_contiguous(len(sent)).Commit()  # one element: MPI may not cut it
    operator = MPI.Op.Create(combine, commute=False)
    WORLD.Exscan([sent.numpy(), 1, whole], [received.numpy(), 1, whole], op=operator)
    operator.Free()
    whole.Free()
    return summary(received)


def scans() -> None:
    """What enters each rank is MPI's own exclusive scan, however it travelled."""
    for name, mask in STREAMING:
        generator = torch.Generator().manual_seed(shifted(100 + WORLD.rank))
        shapes = ((B, T, H, K), (B, T, H, K), (B, T, H, V), (B, T, H))
        q, k, v, gates = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
        own = hla_dist.summarize(name, q, k, v, log_decay=-gates.abs() / 4, **mask_options(mask))
        expected = _exclusive_scan(own).fields
        group = collectives.resolve_group(WORLD).group_name
        for exchange in EXCHANGES:
            layout = (own.operator, [B, H, K, V], True, exchange, "")
            fields, what = [own.rho, *own.fields.values()], f"{exchange} of {own.operator}"
            ticket = exchange_ops.exchange_start(fields, [], False, group, "forward", what, *layout)
            carry = exchange_ops.exchange_finish(ticket, [], own.rho, False, group, *layout)
            for field, x in zip(OPERATORS[own.operator].states, carry, strict=False):
                if WORLD.rank:
                    assert_close(f"{field}, {what}", x, expected[field], FLOAT64)
                else:
                    assert not x.any()


def every_operator() -> None:
    """Forward and every gradient, on 1, 2, 3, 4 and 8 ranks; one all-gather each way, or messages."""
    for row in GROUPS.values():
        comm = _mine(row)
        if comm == MPI.COMM_NULL:
            continue
        for name, mask in KINDS:
            streaming = mask != "full"
            gates = "BTG" if streaming else "none"
            p = Problem(name, mask, B=2, T=65, H=4, G=2, gates=gates, gate_values="per_head", state=streaming)
            problems = [p]
            if comm.size == 8:
                problems.append(replace(p, dtype=torch.float32))
            if comm.size in (4, 8) and streaming:
                problems += [replace(p, exchange=e.partition(":")[0], node=2) for e in EXCHANGES[1:]]
            for problem in problems:
                lengths = SPLITS[comm.size]
                first, second = run_shard(comm, problem, lengths, repeats=2)
                if comm.size > 1 and problem.exchange == "auto":
                    assert second["sent"]["forward"][0] == second["sent"]["backward"][0] == 1
                by_rank = comm.gather(first["values"])
                if comm.rank == 0:
                    check(problem, whole_problem(problem, comm.size), assemble(problem, lengths, by_rank))
                for key, x in first["values"].items():
                    assert_bitwise(f"{key} of the second call", second["values"][key], x)
        comm.Free()


def documents() -> None:
    """Packed documents that cross, start and end in shards."""
    lengths = [9, 8, 0, 8, 16, 0, 23, 1]
    p = Problem("hla2", T=65, H=2, G=2, documents=(20, 0, 1, 30, 14), state=True)
    by_rank = WORLD.gather(run_shard(WORLD, p, lengths)[0]["values"])
    if WORLD.rank == 0:
        check(p, whole_problem(p, WORLD.size), assemble(p, lengths, by_rank))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.layers = nn.ModuleList(
            [
                hla_dist.HLAAttention(16, 2, rope_theta=100.0),
                hla_dist.HLAAttention(16, 4, op="ahla", num_kv_heads=2),
            ]
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + layer(x)[0]
        return x @ self.embedding.weight.T


def model() -> None:
    """SequenceParallelHLA, shard_batch, token_loss, unshard and the reduction of gradients."""
    torch.manual_seed(shifted(0))
    alone = Model().double()
    torch.manual_seed(shifted(WORLD.rank))  # parameters are the first rank's
    sharded = hla_dist.SequenceParallelHLA(Model().double() if WORLD.rank else alone, WORLD)
    alone = alone if WORLD.rank else Model().double()
    alone.load_state_dict(sharded.state_dict())
    tokens = torch.randint(11, (2, 38), generator=torch.Generator().manual_seed(shifted(1)))
    whole, part = (hla_dist.shard_batch(tokens, group) for group in (None, WORLD))
    want, got = alone(whole.inputs), sharded(part.inputs)
    assert_close("logits", hla_dist.unshard(got, WORLD), want, FLOAT64)
    hla_dist.token_loss(want, whole.labels).backward()
    hla_dist.token_loss(got, part.labels, WORLD).backward()
    names = {n for n, p in alone.named_parameters() if p.grad is not None}
    assert len(names) > 10
    for (name, p), (_, q) in zip(alone.named_parameters(), sharded.named_parameters(), strict=True):
        assert_close(f"gradient of {name}", q.grad, p.grad, FLOAT64)


def softmax() -> None:
    """SoftmaxAttention: keys to the ranks that see them, and heads for tokens; outputs and every gradient."""
    lengths, start = SPLITS[8], sum(SPLITS[8][: WORLD.rank])
    generator = torch.Generator().manual_seed(shifted(2))
    x, weight = (torch.randn(1, sum(lengths), 16, dtype=torch.float64, generator=generator) for _ in range(2))
    here = slice(start, start + lengths[WORLD.rank])
    for options in (
        {"exchange": "gather", "num_kv_heads": 2},
        {"exchange": "gather", "window": 11},
        {"exchange": "ulysses"},
    ):
        torch.manual_seed(shifted(0))
        layer = hla_dist.SoftmaxAttention(16, 8, **options).double()
        whole, part = x.clone().requires_grad_(), x[:, here].clone().requires_grad_()
        want, _ = layer(whole)
        (want * weight).sum().backward()
        gradients = {name: p.grad for name, p in layer.named_parameters()}
        layer.zero_grad(set_to_none=True)
        sharded = hla_dist.SequenceParallelHLA(layer, WORLD)
        got, _ = sharded(part)
        assert_close(f"y, {options}", hla_dist.unshard(got, WORLD, lengths), want, FLOAT64)
        (got * weight[:, here]).sum().backward()
        assert_close(f"dx, {options}", hla_dist.unshard(part.grad, WORLD, lengths), whole.grad, FLOAT64)
        for name, p in layer.named_parameters():
            assert_close(f"gradient of {name}, {options}", p.grad, gradients[name], FLOAT64)


def mistakes() -> None:
    """A mistake on one rank is the same ValueError on all, and the group goes on working."""
    x = torch.ones(1, 3, 2, 4)
    calls = {
        "operator": lambda odd: (hla_dist.ahla if odd else hla_dist.hla2)(x, x, x, group=WORLD),
        "scale": lambda odd: hla_dist.hla2(x, x, x, scale=0.5 if odd else 1.0, group=WORLD),
        "a failed check": lambda odd: hla_dist.hla2(x, x, x[0] if odd else x, group=WORLD),
    }
    for what, call in calls.items():
        text = _outcome(lambda call=call: call(WORLD.rank == 2))
        everyone = WORLD.allgather(text)
        assert text.startswith("ValueError: ") and set(everyone) == {text}, f"{what}: {everyone}"
        assert "rank 2" in text, text
        assert _outcome(lambda: hla_dist.hla2(x, x, x, group=WORLD)) == "nothing raised"


def groups() -> None:
    """What is no usable group is refused by name; a group's name lasts as long as its communicator."""
    x = torch.ones(1, 3, 2, 4)
    with raises_value_error("group: expected a communicator that contains this rank, got MPI.COMM_NULL"):
        hla_dist.hla2(x, x, x, group=MPI.COMM_NULL)
    halves = WORLD.Split(WORLD.rank % 2)
    between = halves.Create_intercomm(0, WORLD, 1 - WORLD.rank % 2)
    with raises_value_error("group: expected an MPI intracommunicator, got an intercommunicator"):
        hla_dist.hla2(x, x, x, group=between)
    between.Free()
    with raises_value_error("x: expected one of", "to add over MPI, got torch.bfloat16"):
        collectives.all_reduce_sum(x.bfloat16(), collectives.resolve_group(halves))
    group, again = collectives.resolve_group(halves), collectives.resolve_group(halves)
    twin = halves.Dup()
    other = collectives.resolve_group(twin)
    assert group is again and group is not other and group.group_name != other.group_name
    hla_dist.hla2(x, x, x, group=halves)
    twin.Free()
    halves.Free()
    for freed in (group, other):
        assert "its communicator was freed" in _outcome(lambda: hla_dist.hla2(x, x, x, group=freed))  # noqa: B023


def the_programs_own_messages() -> None:
    """Messages and collectives that the program has under way on its communicator never meet the library's."""
    mine, theirs = torch.full((4,), float(WORLD.rank)), torch.empty(4)
    arriving = WORLD.Irecv(theirs.numpy(), source=(WORLD.rank - 1) % 8, tag=MPI.ANY_TAG)
    x = torch.ones(1, 3, 2, 4)
    hla_dist.hla2(x, x, x, group=WORLD)
    WORLD.Send(mine.numpy(), dest=(WORLD.rank + 1) % 8)
    arriving.Wait()
    assert (theirs == (WORLD.rank - 1) % 8).all()


def nothing_is_pickled() -> None:
    """In the steady state; the first call agrees by objects."""
    x = torch.ones(1, 3, 2, 4, requires_grad=True)
    for steady in (False, True):
        before = mpi.pickle
        if steady:
            mpi.pickle = None  # type: ignore[assignment]
        try:
            hla_dist.hla2(x, x, x, group=WORLD)[0].sum().backward()
        finally:
            mpi.pickle = before


def staged() -> None:
    """The way of tensors on a GPU, through copies, with tensors in host memory in their place."""
    p = Problem("hla2", T=65, H=4, G=2, state=True)
    group, host = collectives.resolve_group(WORLD), mpi._host
    for exchange in ("all_gather", "scan"):
        problem = replace(p, exchange=exchange)
        want = run_shard(WORLD, problem, SPLITS[8])[0]["values"]
        mpi._host = lambda x, copy=True: x.clone() if copy else torch.zeros_like(x)
        try:
            got = run_shard(WORLD, problem, SPLITS[8])[0]["values"]
            total, first = torch.full((3,), 1.0 + WORLD.rank), torch.full((3,), 1.0 + WORLD.rank)
            collectives.all_reduce_sum(total, group)
            collectives.broadcast(first, group, source=5)
        finally:
            mpi._host = host
        assert (total == 36).all() and (first == 6).all()
        for key, x in want.items():
            assert_bitwise(key, got[key], x)


def different_collectives() -> None:
    """Under TORCH_DISTRIBUTED_DEBUG=DETAIL every rank hears of it; and of a forward that meets a backward always."""
    group = collectives.resolve_group(WORLD)
    calls = {
        "all-gather of 8 bytes on rank 2": lambda n: collectives.all_gather_flat(torch.ones(n), group),
        "all-reduce of 4 bytes on rank 2": lambda n: (
            collectives.broadcast(torch.ones(1), group) if n == 1 else collectives.all_reduce_sum(torch.ones(1), group)
        ),
    }
    for part, call in calls.items():
        text = _outcome(lambda call=call: call(2 if WORLD.rank == 2 else 1))
        assert text.startswith("RuntimeError: ") and "expected the same on every rank" in text and part in text, text
    x = torch.ones(1, 3, 2, 4, requires_grad=True)
    comm = WORLD.Dup()  # whose ranks will have counted different calls
    out = hla_dist.hla2(x, x, x, group=comm)[0].sum()
    dist.set_debug_level(dist.DebugLevel.OFF)
    text = _outcome(out.backward if WORLD.rank == 2 else lambda: hla_dist.hla2(x, x, x, group=comm))
    assert text.startswith("ValueError: group: expected every rank to make the same calls in the same order"), text
    dist.set_debug_level(dist.DebugLevel.DETAIL)


def compiled() -> None:
    """Without graph breaks, over a communicator as it is; two of them are not taken for one another."""
    pairs = _mine([[0, 1]])
    if pairs == MPI.COMM_NULL:
        return
    whole = compile_whole(lambda x, comm: hla_dist.hla2(x, x, x, group=comm)[0])
    x = torch.ones(1, 3, 2, 4)
    alone = pairs.Split(pairs.rank)
    for comm in (pairs, alone, pairs):
        assert_bitwise("out", whole(x, comm), hla_dist.hla2(x, x, x, group=comm)[0])
    differ = bool((whole(x, pairs) != whole(x, alone)).any())
    assert differ == (pairs.rank == 1)  # nothing enters rank 0
    alone.Free()
    pairs.Free()


def one_rank_stays_away() -> None:
    """The others raise after the timeout, naming operation, group and rank; and again at once when asked to go on."""
    comm = WORLD.Dup()
    mpi.set_timeout(comm, 0.5)
    x = torch.ones(1, 3, 2, 4)
    hla_dist.hla2(x, x, x, group=comm)
    if WORLD.rank != 3:
        for words in ("all-gather over group 'mpi:", "ranks are no longer in step"):
            started = time.monotonic()
            text = _outcome(lambda: hla_dist.hla2(x, x, x, group=comm))
            assert text.startswith("RuntimeError: forward exchange number "), text
            for part in ("hla2", f"on rank {WORLD.rank} of 8", "timed out", words):
                assert part in text, text
            assert time.monotonic() - started < 10
    with raises_value_error("seconds: expected a positive, finite number, got 0"):
        mpi.set_timeout(comm, 0)
    WORLD.Barrier()


def main(directory: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    mpi.set_timeout(WORLD, 30)
    said: dict[str, str] = {}
    for name in names:
        text = ""
        try:
            globals()[name]()
            assert not dist.is_initialized()
        except Exception:
            text = traceback.format_exc()
        said[name] = text
        (directory / f"{WORLD.rank}.json").write_text(json.dumps(said))
        if text:  # the others may wait in a check that this rank has left
            time.sleep(2)  # for more than one rank's word
            WORLD.Abort(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
