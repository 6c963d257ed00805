"""The simulator: closed forms, what its network promises, and its bytes against those the library counts."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import hla_dist
from benchmarks.simulator import programs, projections
from benchmarks.simulator.links import crowded, fit_link
from benchmarks.simulator.network import Busy, Link, Network, Receive, Send, run
from benchmarks.simulator.programs import HEADER_BYTES, directions, frame_bytes, program, simulate
from hla_dist.parallel import scan, topology
from hla_dist.parallel.collectives import counter
from tests.harness import raises_value_error, run_ranks

SLOW, FAST = Link(8e-6, 2e-11), Link(3e-6, 3e-12)
ROUNDING = pytest.approx
EXCHANGES = topology.EXCHANGES[1:]
FORWARD, BACKWARD = directions("hla2", 6, 8, 5)


def network(ranks: int, node: int = 1, **more) -> Network:
    return Network(ranks, node, FAST, SLOW, **more)


def sizes(way: scan.Direction) -> tuple[int, int]:
    """Bytes of a summary, and of a carry."""
    return way.layout.nbytes(way.full), way.layout.nbytes(way.short)


def headers(ranks: int, node: int = 1) -> float:
    """Seconds until every rank has all of them."""
    empty = [list(programs._gather_headers(rank, ranks)) for rank in range(ranks)]
    return max(run(network(ranks, node), empty).finish)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 12, 64])
def test_all_gather_is_its_closed_form(ranks: int):
    for way in (FORWARD, BACKWARD):
        got = simulate("all_gather", way, network(ranks), combine=1e-5)
        assert got.seconds == ROUNDING((ranks - 1) * (SLOW.seconds(frame_bytes(way)) + 1e-5))
        assert got[2:] == ((ranks - 1) * frame_bytes(way), ranks - 1)


@pytest.mark.parametrize("combine", [0.0, 1e-5])
@pytest.mark.parametrize("rounds", [1, 2, 3, 6])
def test_scan_is_its_closed_form(rounds: int, combine: float):
    """Powers of two; between them as many rounds as the next power, and all of them needed."""
    ranks = 2**rounds
    for way in (FORWARD, BACKWARD):
        full, short = sizes(way)
        want = headers(ranks) + (rounds - 1) * (SLOW.seconds(full) + 2 * combine) + SLOW.seconds(short)
        got = simulate("scan", way, network(ranks), combine).seconds
        assert got == ROUNDING(want) if combine == 0.0 else got <= want * (1 + 1e-9)  # some hides behind messages
        if rounds > 2:
            less = simulate("scan", way, network(ranks - 1), combine).seconds
            assert (rounds - 1) * SLOW.seconds(full) < less <= want + combine


@pytest.mark.parametrize("ranks, node", [(8, 8), (16, 8), (64, 4), (6, 2)])
def test_hierarchical_is_its_closed_form(ranks: int, node: int):
    """Where combining is free and the nodes divide the heads and are a power of two (else it is a bound)."""
    way, _ = directions("hla2", 8, 8, 5)
    full, short = sizes(way)
    rounds = (ranks // node - 1).bit_length()
    want = headers(ranks, node) + (node - 1) * FAST.seconds(full)
    if rounds:
        want += (rounds - 1) * SLOW.seconds(full / node) + SLOW.seconds(short / node)
        want += (node - 1) * FAST.seconds(short / node)
    got = simulate("hierarchical", way, network(ranks, node)).seconds
    slack = headers(ranks, node) if (ranks // node).bit_count() == 1 else SLOW.seconds(full / node)
    assert want - headers(ranks, node) <= got * (1 + 1e-9) and got <= want + slack


@pytest.mark.parametrize("ranks, node", [(16, 4), (24, 8), (12, 1)])
def test_one_node_stands_for_all_in_a_ring(ranks: int, node: int):
    """The shortcut of all_gather, against all ranks (which equal starts, given as such, ask for)."""
    short = simulate("all_gather", FORWARD, network(ranks, node))
    full = simulate("all_gather", FORWARD, network(ranks, node), starts=[0.0] * ranks)
    assert short.seconds == ROUNDING(full.seconds) and short[2:] == full[2:]


@pytest.mark.parametrize("ranks, node", [(8, 1), (6, 2), (5, 5)])
def test_a_late_rank_delays_every_later_one(ranks: int, node: int):
    """A carry holds all ranks before it."""
    for exchange in EXCHANGES:
        steps = [program(exchange, rank, FORWARD, network(ranks, node), 1e-6) for rank in range(ranks)]
        for late in range(ranks):
            finish = run(network(ranks, node), steps, [float(rank == late) for rank in range(ranks)]).finish
            assert min(finish[late:]) >= 1.0, (exchange, late)


@pytest.mark.parametrize("name", ["linear_attention", "hla2", "ahla", "hla3"])
def test_what_is_recorded_is_what_numbers_would_send(name: str):
    """The recorder's shapes without arithmetic, against the exchange on numbers, position by position."""

    class Numbers(programs._Recorder):
        def post(self, sends, receives):
            for _, x in receives:
                x.zero_()
            return super().post(sends, receives)

    heads, size = 3, 6
    for way in directions(name, heads, 4, 3):
        own = way.unpack(torch.zeros(way.layout.nbytes(way.full), dtype=torch.uint8), short=False)
        for exchange, resolved in (("scan", "scan"), ("hierarchical", "hierarchical:2")):
            for position in range(size):
                line = Numbers(position, size)
                carry = scan.receive_carry(line, way, own, resolved)
                assert (carry is None) == (position == 0)
                recorded = program(exchange, position, way, network(size, 2))
                sent = [step for step in recorded if not isinstance(step, Busy)]
                assert sent[len(sent) - len(line.steps) :] == line.steps


def send_hla2(heads: int, node: int) -> dict[str, list[tuple[int, int]]]:
    """On a rank: messages and bytes, forward and backward, by exchange."""
    group = dist.group.WORLD
    topology.set_ranks_per_node(group, node)
    q, k, v = (torch.randn(1, 3, heads, d, requires_grad=True) for d in (8, 8, 5))
    sent = {}
    for exchange in reversed(EXCHANGES):  # all_gather last: its frames are the longest, and stay as long on a group
        for _ in range(2):  # the first time agrees
            counter.reset()
            out, _ = hla_dist.hla2(q, k, v, group=group, exchange=exchange)
            sent[exchange] = [(counter.messages, counter.bytes)]
            counter.reset()
            torch.autograd.grad(out.sum(), (q, k, v))
            sent[exchange].append((counter.messages, counter.bytes))
    return sent


def test_messages_and_bytes_are_the_library_s():
    """Rank for rank and way for way, for uneven heads and a number of machines that is no power of two."""
    heads, ranks, node = 3, 6, 2
    ways = directions("hla2", heads, 8, 5)
    for rank, sent in enumerate(run_ranks(send_hla2, ranks, heads, node, detail=False)):
        assert sent.pop("all_gather") == [(0, frame_bytes(way)) for way in ways]
        for exchange, counted in sent.items():
            for got, way, position in zip(counted, ways, (rank, ranks - 1 - rank)):
                gathered = list(programs._gather_headers(position, ranks))
                steps = program(exchange, position, way, network(ranks, node))[len(gathered) :]
                posted = [step.bytes for step in steps if isinstance(step, Send)]
                assert got == (len(posted), HEADER_BYTES + sum(posted)), (exchange, rank)


def test_overlap_hides_an_exchange():
    alone = simulate("scan", FORWARD, network(8, 4))
    half = simulate("scan", FORWARD, network(8, 4), overlap=alone.seconds / 2)
    assert alone.exposed == alone.seconds and half.exposed == ROUNDING(alone.seconds / 2)
    assert simulate("scan", FORWARD, network(8, 4), overlap=1.0).exposed == 0.0


def test_large_worlds_rank_as_the_closed_forms_say():
    way, _ = directions("hla2", 16, 128, 128)
    seconds = {exchange: simulate(exchange, way, network(128, 8), 10e-6).seconds for exchange in EXCHANGES}
    assert seconds["hierarchical"] < seconds["scan"] < seconds["all_gather"]


def test_the_network_shares_what_is_shared():
    """Two messages at once: by their own links together, through one nic or one lane in turns."""
    steps = [Send(2, 1000)], [Send(3, 1000)], [Receive(0, 1000)], [Receive(1, 1000)]
    across, inside = SLOW.seconds(1000), FAST.seconds(1000)
    for net, want in (
        (network(4, 2), across),
        (network(4, 2, nics=1), 2 * across),
        (network(4, 4), inside),
        (network(4, 4, lanes=1), 2 * inside),
    ):
        assert max(run(net, steps).finish) == ROUNDING(want)
    # one way out, one way in: a rank's messages go one by one, from one and to one
    assert max(run(network(2), [[Send(1, 1000)] * 3, [Receive(0, 1000)] * 3]).finish) == ROUNDING(3 * across)
    both = [[Send(2, 1000)], [Send(2, 1000)], [Receive(0, 1000), Busy(1.0), Receive(1, 1000)]]
    assert max(run(network(3), both).finish) == ROUNDING(across + 1.0)


def test_the_network_notices_wrong_programs():
    with pytest.raises(RuntimeError, match="rank 1 of 2 waits for rank 0, which sends nothing more"):
        run(network(2), [[], [Receive(0, 8)]])
    with pytest.raises(AssertionError, match="rank 1 expected 9 bytes of rank 0, got 8"):
        run(network(2), [[Send(1, 8)], [Receive(0, 9)]])


def test_headers_reach_everybody():
    """ceil(log2 P) rounds of headers in front, for every number of ranks."""
    for ranks in (1, 2, 3, 7, 8):
        steps = [list(programs._gather_headers(rank, ranks)) for rank in range(ranks)]
        for late in range(ranks):
            trace = run(network(ranks), steps, [1.0 * (rank == late) for rank in range(ranks)])
            assert min(trace.finish) >= 1.0
            assert set(trace.messages) == {(ranks - 1).bit_length()} and set(trace.bytes) == {64 * (ranks - 1)}


def test_wrong_arguments():
    with raises_value_error("exchange: expected one of ('all_gather', 'scan', 'hierarchical'), got 'ring'"):
        simulate("ring", FORWARD, network(2))
    with raises_value_error("a multiple of node", "12 ranks in nodes of 8"):
        network(12, 8)
    with raises_value_error("nics: expected 1 to 4", "got 5"):
        network(8, 4, nics=5)
    with raises_value_error("lanes: expected at least 1, got 0"):
        network(8, 4, lanes=0)
    with raises_value_error("starts: expected 4 values"):
        simulate("scan", FORWARD, network(4), starts=[0.0])


def test_the_command(capsys: pytest.CaptureFixture[str]):
    assert projections.main(["--ranks", "4", "16", "--inside", "1us,100GB", "--overlap", "0.5"]) == 0
    text = capsys.readouterr().out
    assert "A projection, simulated, not measured" in text and text.count("| hierarchical |") == 2
    for wrong, part in (
        ("--ranks=12", "a multiple of node"),
        ("--overlap=2", "--overlap: expected 0 to 1"),
        ("--across=8us", "expected a latency and gigabytes per second such as 8us,50GB, got '8us'"),
        ("--compute=1,2", "expected a time such as 8us or 0.2ms, got '1'"),
    ):
        with pytest.raises(SystemExit):
            projections.main([wrong])
        assert part in capsys.readouterr().err


def test_a_link_is_found_in_its_times():
    alpha, beta = 30e-6, 2e-10
    assert fit_link([(2**i, alpha + beta * 2**i) for i in range(8, 24, 3)]) == ROUNDING((alpha, beta))
    falling = fit_link([(1000, 1e-6), (2000, 3e-6), (4000, 7e-6)])
    assert falling.alpha == 0.0 and falling.beta > 0.0
    noise = fit_link([(1000, 3e-6), (2000, 2e-6), (4000, 1e-6)])
    assert noise.alpha > 0.0 and noise.beta == 0.0


def test_a_crowded_link_is_slower_by_what_turns_do_not_explain():
    link = fit_link([(1000, 3e-6), (2000, 4e-6)])
    assert crowded(link, 3.0, 4, 2) == ROUNDING((1.5 * link.alpha, 1.5 * link.beta))
    assert crowded(link, 1.4, 2, 2) == ROUNDING((1.4 * link.alpha, 1.4 * link.beta))
    assert crowded(link, 1.0, 1, 2) == crowded(link, 1.9, 4, 2) == link  # never faster
