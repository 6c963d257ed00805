"""The simulator: its closed forms, what its engine promises, and its bytes against the library's."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed as dist

import hla_dist
from benchmarks.simulator import schedules, simulate
from benchmarks.simulator.network import Link, Network, Receive, Send, Work, run
from benchmarks.simulator.schedules import EXCHANGES, Wire, closed_form, program, wire_of
from benchmarks.simulator.simulate import Layer, efficiency, step
from hla_dist.operators import OPERATORS
from hla_dist.parallel import topology
from hla_dist.parallel.collectives import counter
from hla_dist.parallel.wire import WireLayout
from tests.harness import raises_value_error, run_ranks

SLOW, FAST = Link(8e-6, 2e-11), Link(3e-6, 3e-12)
ROUNDING = pytest.approx


def network(ranks: int, node: int = 1, **more) -> Network:
    return Network(ranks, node, FAST, SLOW, **more)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 64, 4096])
@pytest.mark.parametrize("combine", [0.0, 10e-6])
def test_closed_forms(ranks: int, combine: float):
    """Exact for powers of two, with carries as large as summaries (messages that reach the end are shorter)."""
    wire = Wire(16, 131072, 131072, combine)
    for exchange in EXCHANGES:
        got = simulate.simulate(exchange, wire, network(ranks)).seconds
        assert got == ROUNDING(closed_form(exchange, network(ranks), wire), rel=1e-12), exchange


@pytest.mark.parametrize("ranks, node", [(8, 8), (16, 8), (64, 4), (128, 2), (4096, 8)])
@pytest.mark.parametrize("combine", [0.0, 10e-6])
def test_closed_form_of_nodes(ranks: int, node: int, combine: float):
    wire, net = Wire(16, 131072, 131072, combine), network(ranks, node)
    assert simulate.simulate("hierarchical", wire, net).seconds == ROUNDING(closed_form("hierarchical", net, wire))
    # the published form of the table, where combining is free: AG_g(s) + log2(P/g)(a2 + s b2/g) + AG_g(s'/g)
    s, rounds = wire.summary(), (ranks // node).bit_length() - 1
    table = (node - 1) * (FAST.alpha + s * FAST.beta) + rounds * (SLOW.alpha + s * SLOW.beta / node)
    table += (node - 1) * (FAST.alpha + s / node * FAST.beta) if ranks > node else 0.0
    if combine == 0.0:
        assert closed_form("hierarchical", net, wire) == ROUNDING(table)


@pytest.mark.parametrize("ranks", [3, 5, 6, 7, 12, 100])
def test_other_numbers_of_ranks(ranks: int):
    """Doubling: the rounds are a bound, and all are needed; the others' forms hold for every number."""
    wire = Wire(2 * ranks, 131072, 131072, 10e-6)
    scan = simulate.simulate("scan", wire, network(ranks)).seconds
    rounds = (ranks - 1).bit_length()
    assert rounds * SLOW.seconds(wire.summary()) <= scan <= closed_form("scan", network(ranks), wire) + 1e-12
    for exchange in ("all_gather", "ring"):
        got = simulate.simulate(exchange, wire, network(ranks)).seconds
        assert got == ROUNDING(closed_form(exchange, network(ranks), wire))


@pytest.mark.parametrize("ranks, node", [(16, 4), (24, 8), (12, 1)])
def test_one_node_stands_for_all_in_a_ring(ranks: int, node: int):
    """The shortcut of all_gather, against all ranks (which equal starts, given as such, ask for)."""
    wire, net = Wire(4, 5000, 3000, header=64), network(ranks, node)
    short = simulate.simulate("all_gather", wire, net)
    full = simulate.simulate("all_gather", wire, net, starts=[0.0] * ranks)
    assert short.seconds == ROUNDING(full.seconds) and short[2:] == full[2:]


@pytest.mark.parametrize("ranks, node", [(8, 1), (6, 2), (8, 4), (5, 5)])
def test_a_late_rank_delays_every_later_one(ranks: int, node: int):
    """A carry holds all ranks before it; and ring and doubling make nobody wait for what comes after."""
    net, late = network(ranks, node), 1.0
    for exchange in EXCHANGES:
        wire = Wire(7, 5000, 3000, 1e-6)
        for slow in range(ranks):
            starts = [late * (r == slow) for r in range(ranks)]
            end = run(net, [program(exchange, r, net, wire) for r in range(ranks)], starts).finish
            assert all(t >= late for t in end[slow:]), (exchange, slow)
            if exchange in ("ring", "scan"):
                assert all(t < late for t in end[:slow]), (exchange, slow)


@pytest.mark.parametrize("name", ["linear_attention", "hla2", "ahla", "hla3"])
def test_bytes_are_the_library_s(name: str):
    op, heads, key, value = OPERATORS[name], 3, 8, 5
    layout = WireLayout(op, 1, heads, key, value, torch.float32, torch.float32)
    forward, gathered, by_messages = wire_of(name, heads, key, value)

    def size(*names: str) -> int:
        return layout.nbytes(names)

    assert forward.summary() == size("rho", *op.fields) and forward.carry() == size(*op.states)
    assert gathered.summary() == size(*op.reverses)
    assert by_messages.summary() == size("rho", *op.backward_fields, *op.reverses)
    assert by_messages.carry() == size(*op.reverses)


def send_hla2(heads: int, node: int) -> dict[str, list[tuple[int, int]]]:
    """On a rank: messages and bytes, forward and backward, by exchange."""
    group = dist.group.WORLD
    topology.set_ranks_per_node(group, node)
    q, k, v = (torch.randn(1, 3, heads, d, requires_grad=True) for d in (8, 8, 5))
    sent = {}
    for exchange in topology.EXCHANGES[2:]:
        for _ in range(2):  # the first time agrees
            counter.reset()
            out, _ = hla_dist.hla2(q, k, v, group=group, exchange=exchange)
            sent[exchange] = [(counter.messages, counter.bytes)]
            counter.reset()
            torch.autograd.grad(out.sum(), (q, k, v))
            sent[exchange].append((counter.messages, counter.bytes))
    return sent


def test_messages_are_the_library_s():
    """Rank for rank and way for way, for uneven heads and a number of machines that is no power of two."""
    heads, ranks, node = 3, 6, 2
    net = Network(ranks, node, Link(0, 0), Link(0, 0))
    forward, _, backward = wire_of("hla2", heads, 8, 5)
    for rank, sent in enumerate(run_ranks(send_hla2, ranks, heads, node, detail=False)):
        for exchange, ways in sent.items():
            for got, wire, position in zip(ways, (forward, backward), (rank, ranks - 1 - rank)):
                trace = run(net, [program(exchange, r, net, wire) for r in range(ranks)])
                assert got == (trace.messages[position], simulate.HEADER + trace.bytes[position]), (exchange, rank)


def test_overlap_and_late_starts():
    wire, net = Wire(16, 131072, 65536), network(8, 4)
    alone = simulate.simulate("scan", wire, net)
    half = simulate.simulate("scan", wire, net, overlap=alone.seconds / 2)
    assert alone.exposed == alone.seconds and half.exposed == ROUNDING(alone.seconds / 2)
    assert simulate.simulate("scan", wire, net, overlap=1.0).exposed == 0.0
    layer = Layer(alone.seconds, 1.0, overlap=1.0)
    assert efficiency(step("scan", (wire, wire, wire), net, layer), layer) == 1.0
    bare = Layer(1e-3, 2e-3)
    outcomes = step("scan", (wire, wire, wire), net, bare)
    assert efficiency(outcomes, bare) == ROUNDING(3e-3 / (3e-3 + 2 * alone.seconds))


def test_large_worlds_rank_as_the_closed_forms_say():
    wire = wire_of("hla2", 16, 128, 128, combine=10e-6)[0]
    net = network(512, 8)
    got = {exchange: simulate.simulate(exchange, wire, net) for exchange in EXCHANGES}
    assert got["hierarchical"].seconds < got["scan"].seconds < got["ring"].seconds < got["all_gather"].seconds
    assert got["all_gather"].bytes == 511 * wire.summary() and got["ring"].bytes == wire.carry()


def script(*steps):
    yield from steps


def test_the_engine_shares_what_is_shared():
    """Two messages at once: by their own links together, through one nic or one lane in turns."""
    send = [Send(2, 1000)], [Send(3, 1000)], [Receive(0, 1000)], [Receive(1, 1000)]
    across = SLOW.seconds(1000)
    for more, want in (({}, across), ({"nics": 1}, 2 * across)):
        assert run(network(4, 2, **more), [script(*s) for s in send]).seconds == ROUNDING(want)
    inside = FAST.seconds(1000)
    for more, want in (({}, inside), ({"lanes": 1}, 2 * inside)):
        assert run(network(4, 4, **more), [script(*s) for s in send]).seconds == ROUNDING(want)
    # one way out, one way in: a rank's messages go one by one, from one and to one
    assert run(network(2), [script(*[Send(1, 1000)] * 3), script(*[Receive(0, 1000)] * 3)]).seconds == ROUNDING(
        3 * across
    )
    both = [script(Send(2, 1000)), script(Send(2, 1000)), script(Receive(0, 1000), Work(1.0), Receive(1, 1000))]
    assert run(network(3), both).seconds == ROUNDING(across + 1.0)


def test_the_engine_notices_wrong_programs():
    with pytest.raises(RuntimeError, match="rank 1 of 2 waits for rank 0, which sends nothing more"):
        run(network(2), [script(), script(Receive(0, 8))])
    with pytest.raises(AssertionError, match="rank 1 expected 9 bytes of rank 0, got 8"):
        run(network(2), [script(Send(1, 8)), script(Receive(0, 9))])


def test_agreement_reaches_everybody():
    """ceil(log2 P) rounds of headers in front, for every number of ranks."""
    for ranks in (1, 2, 3, 7, 8, 13):
        for slow in range(ranks):
            programs = [schedules._agree(r, ranks, 64) for r in range(ranks)]
            trace = run(network(ranks), programs, [1.0 * (r == slow) for r in range(ranks)])
            assert min(trace.finish) >= 1.0
            assert set(trace.messages) == {(ranks - 1).bit_length()} and set(trace.bytes) == {64 * (ranks - 1)}


def test_wrong_arguments():
    with raises_value_error("exchange: expected one of", "'tree'"):
        simulate.simulate("tree", Wire(1, 8, 8), network(2))
    with raises_value_error("operator: expected one of", "'hla9'"):
        wire_of("hla9", 1, 8, 8)
    with raises_value_error("a multiple of node", "12 ranks in nodes of 8"):
        network(12, 8)
    with raises_value_error("nics: expected 1 to 4", "got 5"):
        network(8, 4, nics=5)
    with raises_value_error("lanes: expected at least 1, got 0"):
        network(8, 4, lanes=0)
    with raises_value_error("starts: expected 4 values"):
        simulate.simulate("scan", Wire(1, 8, 8), network(4), starts=[0.0])
    with raises_value_error("at least one head"):
        Wire(0, 8, 8)


def test_the_command(capsys: pytest.CaptureFixture[str]):
    assert simulate.main(["--ranks", "4", "16", "--compute", "200us,1ms", "--overlap", "0.5"]) == 0
    text = capsys.readouterr().out
    assert "a projection, not a measurement" in text and text.count("hierarchical") == 2
    assert simulate.main(["--ranks", "16", "--json", "--inside", "1us,100GB"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["exchange"] for row in rows] == list(EXCHANGES)
    for wrong, part in (
        ("--ranks=12", "a multiple of node"),
        ("--overlap=2", "--overlap: expected 0 to 1"),
        ("--across=8us", "expected a latency and gigabytes a second such as 8us,50GB, got '8us'"),
        ("--compute=1,2", "expected a time such as 8us or 0.2ms, got '1'"),
    ):
        with pytest.raises(SystemExit):
            simulate.main([wrong])
        assert part in capsys.readouterr().err
