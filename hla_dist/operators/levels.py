"""A causal pass with levels: a token's weights say how much it reads from near, and how much from far.

    level(t, i) = min(bit_length(t xor i), L - 1)
    out_t = sum_{i<=t} w[t, level(t, i)] Gamma(t, i) (a_t . b_i) c_i          with all w = 1 it is LA(a, b, c)

Level l >= 1 joins the right half of every aligned block of 2^l tokens to the state of its left half: one product per
level, O(T log T) in all. The state is one sum per level from 1 on, ``buckets``: of the tokens that are at level l seen
from the next token, the ``tokens``-th. Two tokens before and after a boundary are at the level of that boundary, so a
bucket is read, and moves, as a whole.

Shapes, per head: a, b [B, H, T, K], c [B, H, T, V], weights [B, H, T, L], logs of gates [B, H, T], buckets
[B, H, L - 1, K, V], tokens [B], all in the dtype of sums. Source: log-linear attention, arXiv 2506.04761.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hla_dist.operators.gates import SMALLEST

CHUNK = 64  # tokens whose scores are computed as a square


class Levelled(NamedTuple):
    """What a pass reads, per token: operands, weights and logs of gates."""

    a: Tensor
    b: Tensor
    c: Tensor
    weights: Tensor
    logs: Tensor


def bit_length(x: Tensor) -> Tensor:
    """Python's ``int.bit_length`` of integers >= 0."""
    return torch.frexp(x.double()).exponent.long()


def products(logs: Tensor) -> Tensor:
    """Products of gates by the sums of their logs; what is nothing beside 1 is 0."""
    return F.threshold(logs.exp(), SMALLEST[logs.dtype], 0.0)


def to_end(logs: Tensor) -> Tensor:
    """Gamma(end, i) [..., T]: no difference of long sums."""
    return products(F.pad(logs[..., 1:].flip(-1).cumsum(-1).flip(-1), (0, 1)))


def scan(x: Levelled, buckets: Tensor | None, tokens: Tensor | None, aligned: bool) -> Tensor:
    """Outputs [B, H, T, V]. ``aligned``: no boundary of blocks longer than T lies inside."""
    if buckets is None or tokens is None or not x.a.shape[2]:
        return _alone(x)
    return (_alone(x) if aligned else _shifted(x, tokens)) + _before(x, buckets, tokens)


def _alone(x: Levelled) -> Tensor:
    """Outputs of the tokens beside each other, the first one the 0th."""
    tokens, top = x.a.shape[2], x.weights.shape[-1] - 1
    if tokens < 2:
        return (x.a * x.b).sum(-1, keepdim=True) * x.weights[..., :1] * x.c
    size = 1 << (tokens - 1).bit_length()
    chunk = min(CHUNK, size)
    x = Levelled(*(F.pad(y, (0, 0) * (y.dim() - 3) + (0, size - tokens)) for y in x))
    a, b, c, weights, logs = (y.unflatten(2, (-1, chunk)) for y in x)  # [B, H, chunks, chunk, ...]
    place = torch.arange(chunk, device=a.device)
    at = bit_length(place[:, None] ^ place).clamp(max=top)
    since = a.new_ones(chunk, chunk).tril()  # j <= t
    after = since.tril(-1)  # j > i
    chosen = F.one_hot(at, top + 1).mT * since[:, None]  # [t, L, i]
    within = products((logs[..., None, :] * since) @ after)
    weight = torch.einsum("bhntl,tli->bhnti", weights, chosen)
    out = ((a @ b.mT) * within * weight @ c).flatten(2, 3)
    states = (b * within[..., -1, :, None]).mT @ c  # [B, H, blocks, K, V]
    whole = logs.sum(-1)
    for level in range(chunk.bit_length(), size.bit_length()):
        a, weight, logs = (y.unflatten(2, (-1, 2, 1 << (level - 1)))[:, :, :, 1] for y in (x.a, x.weights, x.logs))
        read = weight[..., min(level, top)] * products(logs.cumsum(-1))
        joined = (a * read[..., None]) @ states[:, :, 0::2]
        out = out + F.pad(joined[:, :, :, None], (0, 0, 0, 0, 1, 0)).flatten(2, 4)
        states = states[:, :, 0::2] * products(whole[:, :, 1::2, None, None]) + states[:, :, 1::2]
        whole = whole[:, :, 0::2] + whole[:, :, 1::2]
    return out[:, :, :tokens]


def _shifted(x: Levelled, tokens: Tensor) -> Tensor:
    """Outputs of the tokens beside each other, the first one the ``tokens``-th: moved to their place in blocks.

    A block of 2^m >= T tokens may end among them. The boundary's level is known from ``tokens`` alone.
    """
    count, top = x.a.shape[2], x.weights.shape[-1] - 1
    depth = (count - 1).bit_length()
    block = tokens >> depth
    start = (tokens - (block << depth))[:, None]
    slot = torch.arange(2 << depth, device=tokens.device) - start  # [B, slots]
    filled = (slot >= 0) & (slot < count)
    moved = [_taken(y, slot.clamp(0, count - 1)) for y in x]
    moved = [y.masked_fill(~filled.view(len(filled), 1, -1, *[1] * (y.dim() - 3)), 0) for y in moved]
    levels = torch.arange(depth + 1, device=tokens.device).expand(len(tokens), -1)
    levels = torch.cat([levels, (bit_length(block ^ (block + 1)) + depth)[:, None]], 1).clamp(max=top)
    a, b, c, weights, logs = moved
    weights = weights.gather(-1, levels[:, None, None].expand(*weights.shape[:3], -1))
    out = _alone(Levelled(a, b, c, weights, logs))
    return _taken(out, start + torch.arange(count, device=tokens.device))


def _taken(x: Tensor, index: Tensor) -> Tensor:
    """``x [B, H, T, ...]`` at every row's own ``index [B, S]``."""
    index = index.view(len(index), 1, -1, *[1] * (x.dim() - 3)).expand(-1, x.shape[1], -1, *x.shape[3:])
    return x.gather(2, index)


def _before(x: Levelled, buckets: Tensor, tokens: Tensor) -> Tensor:
    """What is read from the buckets."""
    top = x.weights.shape[-1] - 1
    since = products(x.logs.cumsum(-1))
    if x.a.shape[2] == 1:  # decoding: the sum first
        whole = torch.einsum("bhl,bhlkv->bhkv", x.weights[:, :, 0, 1:], buckets)
        return (x.a * since[..., None]) @ whole
    place = tokens[:, None] + torch.arange(x.a.shape[2], device=tokens.device)
    crossed = bit_length(place ^ tokens[:, None])  # [B, T]
    out = x.c.new_zeros(())
    for level in range(1, top + 1):
        index = crossed.clamp(level, top)[:, None, :, None].expand(-1, x.a.shape[1], -1, -1)
        read = x.weights.gather(-1, index) * since[..., None]
        out = out + (x.a * read) @ buckets[:, :, level - 1]
    return out


def advanced(x: Levelled, count: Tensor, buckets: Tensor, tokens: Tensor) -> Tensor:
    """The buckets after the first ``count`` [B] tokens; operands behind them are 0, logs of gates too."""
    length, top = x.a.shape[2], x.weights.shape[-1] - 1
    levels = torch.arange(1, top + 1, device=tokens.device)
    end = tokens + count
    goes = torch.maximum(levels, bit_length(end ^ tokens)[:, None]).clamp(max=top)  # [B, L - 1]
    moved = (goes[:, None] == levels[:, None]).to(buckets.dtype)  # [B, new, old]
    buckets = torch.einsum("bnl,bhlkv->bhnkv", moved, buckets * products(x.logs.sum(-1))[..., None, None, None])
    if not length:
        return buckets
    b = x.b * to_end(x.logs)[..., None]
    if length == 1:
        joined = (b.mT @ x.c)[:, :, None]  # [B, H, 1, K, V]
        enters = (bit_length(end ^ tokens).clamp(max=top)[:, None] == levels) & (count > 0)[:, None]
        return buckets + joined * enters.to(joined.dtype)[:, None, :, None, None]
    parts = []
    for level in range(1, top + 1):
        size = 1 << (level - 1)  # tokens of a bucket, in one run; of the last, any number
        if level == top or size >= length:
            place = torch.arange(length, device=tokens.device).expand(len(tokens), -1)
        else:
            place = (((end >> (level - 1)) - 1) * size - tokens)[:, None] + torch.arange(size, device=tokens.device)
        enters = bit_length(end[:, None] ^ (tokens[:, None] + place).clamp(min=0)).clamp(max=top) == level
        enters &= (place >= 0) & (place < count[:, None])
        place = place.clamp(0, length - 1)
        kept = _taken(b, place) * enters[:, None, :, None].to(b.dtype)
        parts.append(kept.mT @ _taken(x.c, place))
    return buckets + torch.stack(parts, 2)
