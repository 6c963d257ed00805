"""One multiprocessor of a Hopper GPU, simulated instruction by instruction: how long its resident programs take.

What is modelled: in-order issue, one instruction per cycle for each of four schedulers; the stalls and scoreboards that
the assembler wrote into the code; pipes with their rates; shared memory as one server of 128 bytes per cycle for
loads, stores, asynchronous copies and the operands of matrix instructions; matrix instructions in order a scheduler,
N / 2 cycles each for 64 x N x 16; barriers; groups of asynchronous copies; a latency and a rate for what lies beyond;
for specialised warps the channels (arrays of mbarriers) by which they wait for one another.

What is not: bank conflicts (``conflicts`` scales them all), instruction caches, register banks, the clock's dependence
on load, DRAM pages. Forward branches are taken as not taken.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from benchmarks.gpu.model.sass import Instruction, bytes_of, gmma_shape


@dataclass
class Rates:
    """Rates of one multiprocessor, in cycles; leads from public microbenchmarks, to be fitted on the hardware."""

    smem_rate: float = 128.0  # bytes per cycle
    global_rate: float = 28.0  # bytes per cycle and multiprocessor beyond L1 (L2: about 6.5 TB/s over 132)
    global_latency: int = 750
    smem_latency: int = 30
    alu: int = 2  # cycles a warp instruction occupies its pipe
    imad: int = 2
    fma: int = 1
    half: int = 2
    xu: int = 8
    uniform: int = 2
    lsu: int = 2
    gmma_overhead: float = 0.0  # cycles lost before each matrix instruction
    gmma_latency: int = 34  # after the last of a group: results may be read
    hmma: int = 16  # m16n8k16 of mma.sync: half of wgmma's rate
    barrier: int = 20
    wake: int = 8  # after a wait for matrix products or copies
    channel: int = 40  # from an arrival at an mbarrier to the waiting warp
    conflicts: float = 1.0  # multiplies what LDS, STS and their like take


@dataclass
class Group:
    """Matrix instructions that are waited for together: how many have not ended, and when the last did."""

    left: int = 0
    closed: bool = False
    done: float = 0.0
    waiting: Warp | None = None


@dataclass
class Warp:
    """State of a warp in flight."""

    program: int
    role: int
    index: int
    trace: Iterator[Instruction]
    next: Instruction | None = None
    ready: float = 0.0
    boards: dict[int, float] = field(default_factory=dict)
    board_pipes: dict[int, str] = field(default_factory=dict)
    gmma_open: Group | None = None
    gmma_groups: deque = field(default_factory=deque)
    gmma_queue: deque = field(default_factory=deque)  # (cycles, shared-memory cycles, group) not yet begun
    copies_open: float = 0.0
    copy_groups: deque = field(default_factory=deque)
    waited: Counter = field(default_factory=Counter)  # by channel


@dataclass
class Channel:
    """An array of mbarriers: the n-th wait passes once ``(n + 1 - lead) * arrivals`` arrivals were made."""

    arrivals: int = 1
    lead: int = 0
    copies: int = 0  # above 0: filled by that many TMA loads, not by arrivals
    steps: int = 1 << 30  # waits for more than so many are predicated off
    times: list[float] = field(default_factory=list)


@dataclass
class Result:
    """What a simulation found."""

    cycles: float
    busy: Counter
    issued: int
    waits: Counter


def trace(code: list[Instruction], trips: dict[int, int]) -> Iterator[Instruction]:
    """Instructions as executed: a loop that ends at index ``i`` runs ``trips[i]`` times; forward branches fall through,
    unconditional ones are taken."""
    at = {x.address: i for i, x in enumerate(code)}
    left = dict(trips)
    i = 0
    while i < len(code):
        x = code[i]
        yield x
        if x.name == "EXIT" and not x.predicate:
            return
        if x.target is not None:
            if x.target <= x.address:
                if left.get(i, 1) > 1:
                    left[i] -= 1
                    i = at[x.target]
                    continue
                left[i] = trips.get(i, 1)
                if not x.predicate and x.target == x.address:
                    return
            elif not x.predicate:
                i = at[x.target]
                continue
        i += 1


def repeat(body: list[Instruction], times: int) -> Iterator[Instruction]:
    """A loop's body, executed so often."""
    for _ in range(times):
        yield from body


class Multiprocessor:
    """Programs in flight; ``run`` lets them finish."""

    def __init__(self, rates: Rates):
        self.m = rates
        self.issue = [0.0] * 4
        self.pipes: dict[tuple[str, int], float] = {}
        self.shared = self.beyond = self.last = 0.0
        self.busy: Counter = Counter()
        self.waits: Counter = Counter()
        self.issued = self.order = 0
        self.heap: list[tuple[float, int, Warp | int]] = []
        self.arrived: dict[tuple, list[Warp]] = {}
        self.alive: Counter = Counter()
        self.channels: dict[tuple[int, str], Channel] = {}
        self.blocked: dict[tuple[int, str], list[Warp]] = {}
        self.multiplying: list[deque[Warp]] = [deque() for _ in range(4)]  # warps with matrix instructions, in turns
        self.free_at = [0.0] * 4  # of each scheduler's tensor core
        self.tile_bytes = self.store_bytes = 0  # of one TMA load, and of one TMA store
        self.asked = [False] * 4
        rated = ("alu", "imad", "fma", "half", "xu", "uniform", "lsu", "hmma")
        self.cost = {pipe: getattr(rates, pipe) for pipe in rated} | {"const": 2, "branch": 2, "sync": 1, "tensor": 1}

    def add(self, program: int, role: int, traces: list[Iterator[Instruction]], when: float, first: int = 0) -> None:
        """Warps of one role of a program; warp ``first`` of the program sits at scheduler ``first % 4``."""
        self.alive[program, role] += len(traces)
        for i, t in enumerate(traces):
            w = Warp(program, role, first + i, t, ready=when)
            w.next = next(t)
            self.push(when, w)

    def push(self, when: float, w: Warp | int) -> None:
        heapq.heappush(self.heap, (when, self.order, w))
        self.order += 1

    def run(self, finished=None) -> Result:
        """Until no warp is left; ``finished(program, when)`` may add more."""
        while self.heap:
            when, _, w = heapq.heappop(self.heap)
            if isinstance(w, int):
                self.multiply(w, when)
                continue
            ready = self.products(w, when)
            if ready is None:
                continue
            if ready > when:
                self.waits["matrix products"] += ready - when
                self.push(ready, w)
                continue
            t, reason = self.earliest(w, when)
            if t > when + 1e-9:
                self.waits[reason] += t - when
                if self.heap and self.heap[0][0] < t:
                    self.push(t, w)
                    continue
            x = w.next
            channel = self.channel_of(w, x)
            if channel is not None and "PHASECHK" in x.name:
                need = w.waited[channel[1]] + 1
                c = self.channels[channel]
                n = min(need - c.lead, c.steps) * (c.copies or c.arrivals)
                if n > len(c.times):
                    w.ready = t
                    self.blocked.setdefault(channel, []).append(w)
                    continue
                if n > 0 and c.times[n - 1] + self.m.channel > t:
                    self.waits[f"channel {channel[1]}"] += c.times[n - 1] + self.m.channel - t
                    self.push(c.times[n - 1] + self.m.channel, w)
                    continue
                w.waited[channel[1]] += 1
            self.execute(w, x, t)
            if channel is not None and "ARRIVE" in x.name and w.index % 4 == 0 and not self.channels[channel].copies:
                self.signal(channel, t)
            if x.name.startswith(("BAR.SYNC", "BAR.RED")):
                where = (w.program, w.role, x.name)
                self.arrived.setdefault(where, []).append(w)
                w.next = next(w.trace, None)
                if len(self.arrived[where]) == self.alive[w.program, w.role]:
                    for other in self.arrived.pop(where):
                        self.waits["barrier"] += t + self.m.barrier - other.ready
                        other.ready = t + self.m.barrier
                        self.go_on(other, finished)
                continue
            w.next = next(w.trace, None)
            self.go_on(w, finished)
        return Result(self.last, self.busy, self.issued, self.waits)

    def go_on(self, w: Warp, finished) -> None:
        if w.next is not None:
            self.push(w.ready, w)
            return
        self.alive[w.program, w.role] -= 1
        if finished and not any(n for (p, _), n in self.alive.items() if p == w.program):
            finished(w.program, w.ready)

    def channel_of(self, w: Warp, x: Instruction) -> tuple[int, str] | None:
        if not x.name.startswith("SYNCS"):
            return None
        where = (w.program, x.channel)
        return where if where in self.channels else None

    def signal(self, channel: tuple[int, str], t: float) -> None:
        self.channels[channel].times.append(t)
        self.channels[channel].times.sort()
        for w in self.blocked.pop(channel, []):
            self.waits[f"channel {channel[1]}"] += max(0.0, t - w.ready)
            self.push(max(t, w.ready), w)

    def products(self, w: Warp, when: float) -> float | None:
        """When the matrix products are there that the next instruction waits for; None: not begun, it will be woken."""
        if not w.next.name.startswith("WARPGROUP.DEPBAR"):
            return when
        keep = int(re.search(r",\s*(0x[0-9a-f]+)", w.next.text)[1], 16)
        t = when
        while len(w.gmma_groups) > keep:
            group = w.gmma_groups[0]
            if group.left:
                group.waiting, w.ready = w, when
                return None
            t = max(t, group.done + self.m.gmma_latency)
            w.gmma_groups.popleft()
        return t

    def multiply(self, s: int, now: float) -> None:
        """Begin the next matrix instruction of a scheduler, its warps in turns."""
        turns = self.multiplying[s]
        w = turns.popleft()
        cycles, take, group = w.gmma_queue.popleft()
        self.use_shared(take, now)
        self.busy["mma"] += cycles
        end = self.free_at[s] = max(now + cycles, self.shared)
        group.left -= 1
        group.done = max(group.done, end)
        if group.closed and not group.left and group.waiting:
            late = max(0.0, end + self.m.gmma_latency + self.m.wake - group.waiting.ready)
            self.waits["matrix products"] += late
            self.push(group.waiting.ready + late, group.waiting)
            group.waiting = None
        if w.gmma_queue:
            turns.append(w)
        self.asked[s] = bool(turns)
        if turns:
            self.push(end, s)

    def earliest(self, w: Warp, when: float) -> tuple[float, str]:
        """When the warp's next instruction may issue, and what it waits for."""
        x, s, m = w.next, w.index % 4, self.m
        t, reason = max(when, self.issue[s]), "issue"
        for b in range(6):
            if x.wait >> b & 1 and w.boards.get(b, 0.0) > t:
                t, reason = w.boards[b] + 1, f"scoreboard of {w.board_pipes.get(b, '')}"
        if x.name.startswith("DEPBAR.LE"):
            keep = int(re.search(r"SB\d+,\s*(0x[0-9a-f]+)", x.text)[1], 16)
            while len(w.copy_groups) > keep:
                done = w.copy_groups.popleft()
                if done > t:
                    t, reason = done + m.wake, "copies"
        if x.pipe not in ("tensor", "sync", "branch") and self.pipes.get((x.pipe, s), 0.0) > t:
            t, reason = self.pipes[x.pipe, s], x.pipe
        return t, reason

    def execute(self, w: Warp, x: Instruction, t: float) -> None:
        m, s, name, pipe = self.m, w.index % 4, x.name, x.pipe
        self.issue[s] = t + 1
        self.issued += 1
        self.pipes[pipe, s] = t + self.cost[pipe]
        self.busy[pipe] += self.cost[pipe]
        done = t + 6
        if pipe == "tensor":
            _, n, k, a_shared = gmma_shape(x)
            take = ((512 * k / 16 if a_shared else 0) + n * k * 2 / 4) / m.smem_rate
            w.gmma_open = group = w.gmma_open or Group()
            group.left += 1
            w.gmma_queue.append((n / 2 * (k / 16) + m.gmma_overhead, take, group))
            if "gsb0" in x.text:
                group.closed, w.gmma_open = True, None
                w.gmma_groups.append(group)
            if w not in self.multiplying[s]:
                self.multiplying[s].append(w)
            if not self.asked[s]:
                self.asked[s] = True
                self.push(max(t + 1, self.free_at[s]), s)
        elif pipe == "lsu":
            done = self.memory(w, x, t)
        elif pipe in ("xu", "const", "hmma"):
            done = t + {"xu": 24, "const": 30, "hmma": 34}[pipe]
        if name.startswith("LDGDEPBAR"):
            w.copy_groups.append(w.copies_open)
        if x.set_write is not None:
            w.boards[x.set_write], w.board_pipes[x.set_write] = done, pipe
        if x.set_read is not None:
            w.boards[x.set_read] = max(w.boards.get(x.set_read, 0.0), min(done, t + 20))
            w.board_pipes[x.set_read] = pipe
        w.ready = t + max(1, x.stall)
        self.last = max(self.last, t)

    def memory(self, w: Warp, x: Instruction, t: float) -> float:
        """When a memory instruction's result is there."""
        m, name, size = self.m, x.name, bytes_of(x)
        if name.startswith(("UTMALDG", "UBLKCP")):
            done = self.fetched(self.tile_bytes, t)
            self.use_shared(self.tile_bytes / m.smem_rate, t)
            for (program, key), channel in self.channels.items():
                if program == w.program and channel.copies:
                    self.signal((program, key), done)
            return done
        if name.startswith("UTMASTG"):
            self.fetched(self.store_bytes, t)
            self.use_shared(self.store_bytes / m.smem_rate, t)
            return t + 20
        if name.startswith("SYNCS"):
            return t + 20
        if name.startswith(("LDGSTS", "LDG", "LD.", "STG", "RED", "ATOM")):
            done = self.fetched(size, t)
            if name.startswith("LDGSTS"):
                self.use_shared(size / m.smem_rate, t)
                w.copies_open = max(w.copies_open, done)
            return t + 20 if name.startswith(("STG", "RED")) else done
        self.use_shared(size / m.smem_rate * (1.0 if name.startswith("SHFL") else m.conflicts), t)
        return self.shared + m.smem_latency

    def fetched(self, size: float, t: float) -> float:
        """When so many bytes have come from beyond L1, or gone there, if they are asked for at ``t``."""
        took = size / self.m.global_rate
        self.beyond = max(self.beyond, t) + took
        self.busy["beyond"] += took
        return max(self.beyond, t + self.m.global_latency)

    def use_shared(self, cycles: float, t: float) -> None:
        """Keep shared memory busy for so many cycles, from ``t`` on or when it is free."""
        self.shared = max(self.shared, t) + cycles
        self.busy["shared"] += cycles


def simulate(
    code: list[Instruction], trips: dict[int, int], warps: int, resident: int, programs: int, rates: Rates
) -> Result:
    """``programs`` programs, ``resident`` at a time, on one multiprocessor."""
    sm = Multiprocessor(rates)
    started = 0

    def start(when: float) -> None:
        nonlocal started
        sm.add(started, 0, [trace(code, trips) for _ in range(warps)], when, started * warps if warps < 4 else 0)
        started += 1

    def finished(program: int, when: float) -> None:
        if started < programs:
            start(when + 60)

    for p in range(min(resident, programs)):
        start(37.0 * p)
    return sm.run(finished)


def simulate_roles(
    roles: list[tuple[list[Instruction], int]],
    channels: dict[str, tuple[int, int, int]],
    steps: int,
    resident: int,
    rates: Rates,
    tile_bytes: int,
    store_bytes: int,
) -> Result:
    """Specialised warps: each role is a loop's body and its warps; channels by shared-memory offset as
    ``(arrivals, lead, copies)``, see ``Channel``. Bytes are those of one TMA load and one TMA store instruction."""
    sm = Multiprocessor(rates)
    sm.tile_bytes, sm.store_bytes = tile_bytes, store_bytes
    for p in range(resident):
        for key, (arrivals, lead, copies) in channels.items():
            sm.channels[p, key] = Channel(arrivals, lead, copies, steps)
        for r, (body, warps) in enumerate(roles):
            sm.add(p, r, [repeat(body, steps) for _ in range(warps)], 37.0 * p)
    return sm.run()
