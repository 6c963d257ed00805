"""Causal softmax attention of the local queries over the keys they see, on whatever rank these are.

    out[t] = sum_j p[t, j] v[j],   p[t, :] = softmax over j in first[t] .. last[t] of scale (q[t] . k[j])

Letters: B batch, T local queries, S keys at hand, H query heads, G key/value heads, K head size. torch's
``scaled_dot_product_attention`` does the arithmetic, except where the weights' mass is wanted too. Where it needs a
mask, blocks of queries take turns and backward computes them again, so that a mask of T x S never exists.
"""

import zlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from hla_dist.functional import exchange_ops
from hla_dist.functional.validate import require
from hla_dist.operators.precision import sum_dtype
from hla_dist.parallel import collectives
from hla_dist.softmax.exchange import FetchKeys, HeadsForTokens
from hla_dist.softmax.key_spans import KeySpans
from hla_dist.states import KVState

BLOCK_QUERIES = 512
MASS_QUERIES = 128  # with the mass: scores exist as numbers, not only their mask
MASK_NUMBERS = 1 << 24  # bounds the mask of a block: fewer queries where they see more keys


class SoftmaxCall(NamedTuple):
    """What all ranks have agreed on: who holds and who sees which keys, and where this process stands."""

    spans: KeySpans
    pg: collectives.Group | None
    rank: int


def agree(
    tokens: int,
    group: Any,
    *,
    cu: Tensor | None,
    state: KVState | None,
    window: int | None,
    final: bool,
    description: str,
    device: torch.device,
) -> SoftmaxCall:
    """Every rank's number of tokens and of cached keys, and whether they want the same thing.

    ``cu`` on the host. Communication with a group: one all-gather of 2 + N integers in the agreement's frame, N
    documents. Raises ValueError, the same on every rank, where calls differ.
    """
    rows = 1 if cu is None else len(cu) - 1
    before = torch.zeros(rows, dtype=torch.int64) if state is None else state.tokens[:rows].cpu()
    pg, rank, ranks = collectives.members(group)
    if pg is None or ranks == 1:
        pg, lengths = None, [tokens]
    else:
        code = 0 if cu is None else zlib.crc32(cu.numpy().tobytes())
        numbers = torch.cat([torch.tensor([tokens, code]), before]).to(device)
        text = f"{description} rows={rows}"
        # at once: messages of these lengths follow
        gathered = exchange_ops.exchange_gather([numbers], pg.group_name, "forward", text, at_once=True)
        table = gathered[0].cpu()
        different = (table[:, 1] != table[0, 1]).nonzero().flatten().tolist()
        if different:
            raise ValueError(
                f"cu_seqlens: expected the same on every rank, got others on rank {different[0]} than on 0"
            )
        lengths, before = table[:, 0].tolist(), table[:, 2:]
    packed = cu is not None
    bounds = torch.tensor([0, sum(lengths)]) if cu is None else cu
    spans = KeySpans(bounds, lengths, torch.zeros(rows, dtype=torch.int64), window, packed, final)
    if pg is not None:  # a document's state is read where it begins; who that is does not depend on the states
        before = before[spans.owners, torch.arange(rows)]
    return SoftmaxCall(KeySpans(bounds, lengths, before, window, packed, final), pg, rank)


def see(
    call: SoftmaxCall,
    q: Tensor,
    own: Tensor,
    cached: Tensor | None,
    window: int | None,
    delay: int | None,
    scale: float,
) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor] | None]:
    """What local q ``[B, T, H, K]`` make of the rows they see, ``own [B, T, G, w]`` of everyone and ``cached``.

    A row begins with a key and a value. Returns the outputs ``[B, T, H, K]`` over a window, what enters a memory, and
    what :func:`keep` gives. With ``delay`` there is a memory, which rows enter so many tokens late: those that enter
    ``[B, T, G, w]``, and where there are any ``[B, T]``. Outputs then come with their mass, ``[B, T, H, K + 1]``, and
    there are none without a window.
    Communication: that of :class:`FetchKeys`.
    """
    rows, low = fetch(call, own, cached)
    first, last = (x - low for x in call.spans.visible(call.rank))
    near = entering = None
    if window is not None or delay is None:
        k, v = rows[..., : q.shape[3]], rows[..., q.shape[3] : 2 * q.shape[3]]
        nearest = first if window is None else torch.maximum(first, last - window + 1)
        near = attend_locally(q, k, v, nearest, last, scale, mass=delay is not None)
    if delay is not None:
        enters = last - delay
        present = (enters >= first).to(q.device).expand(q.shape[:2])
        entering = rows.index_select(1, enters.clamp(min=0).to(q.device)), present
    return near, entering, keep(call, rows, low)


def fetch(call: SoftmaxCall, own: Tensor, cached: Tensor | None) -> tuple[Tensor, int]:
    """What the local queries see of everyone's tokens ``own [B, T, G, w]``, wherever it is held.

    ``cached [N, S, G, w]``: the same of tokens in earlier calls. Returns rows ``[B, S, G, w]``, and which of the row of
    all keys is the first. Communication: that of :class:`FetchKeys`.
    """
    spans, pg, rank = call
    rows = _with_cached(spans, rank, own, cached)
    if pg is None:
        return rows, spans.held(rank)[0]
    flat = FetchKeys.apply(rearrange(rows, "b e g w -> b e (g w)"), spans, pg)
    return rearrange(flat, "b e (g w) -> b e g w", g=own.shape[2]), spans.seen(rank)[0]


def by_heads(call: SoftmaxCall, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Outputs ``[B, T, H, K]`` by ``"ulysses"``: in between all tokens of this rank's heads, [B, sum of T, H / P, K].

    Communication: that of :class:`HeadsForTokens`, twice.
    """
    spans, pg, _ = call
    assert pg is not None
    ranks = collectives.group_size(pg)
    lengths, size = list(spans.lengths), q.shape[3]
    parts = [rearrange(x, "b t (p h) k -> b t p (h k)", p=ranks) for x in (q, k, v)]
    all_tokens = HeadsForTokens.apply(torch.cat(parts, -1), lengths, pg, False)
    split = all_tokens.split([x.shape[3] for x in parts], -1)
    q, k, v = (rearrange(x, "b t (h k) -> b t h k", k=size) for x in split)
    whole = KeySpans(spans.cu, [sum(lengths)], spans.before, spans.window, spans.packed, False)
    out = attend_locally(q, k, v, *whole.visible(0), scale)
    all_heads = HeadsForTokens.apply(rearrange(out, "b t h k -> b t (h k)"), lengths, pg, True)
    return rearrange(all_heads, "b t p (h k) -> b t (p h) k", k=size)


def _with_cached(spans: KeySpans, rank: int, keys: Tensor, cached: Tensor | None) -> Tensor:
    """``[B, E, G, w]``: keys ``[B, T, G, w]`` and, in their places, the cached ones of documents that begin here."""
    documents = ((spans.owners == rank) & (spans.cached > 0)).nonzero().flatten()
    if cached is None or not len(documents):
        return keys
    cached = cached.to(keys.dtype)
    if not spans.packed:
        return torch.cat([cached[:, : int(spans.cached[0])], keys], 1)
    tokens, slots = keys.shape[1], cached.shape[1]
    begin, end = spans.held(rank)
    index = torch.empty(end - begin, dtype=torch.int64)
    index[spans.visible(rank)[1] - begin] = torch.arange(tokens)
    for n in documents.tolist():
        count, at = int(spans.cached[n]), int(spans.starts[n]) - begin
        index[at : at + count] = tokens + n * slots + torch.arange(count)
    return torch.cat([keys[0], cached.flatten(0, 1)]).index_select(0, index.to(keys.device))[None]


def keep(call: SoftmaxCall, rows: Tensor, low: int) -> tuple[Tensor, Tensor] | None:
    """What a state keeps of the rows that :func:`fetch` gave, ``[N, S, G, w]``, and the tokens read, ``[N]``.

    None unless a state is wanted.
    """
    spans, _, rank = call
    if not spans.final:
        return None
    after = spans.before + spans.cu[1:] - spans.cu[:-1]
    if not spans.packed:
        end, kept = spans.holdings[-1] - low, int(spans.kept[0])
        last = rows[:, end - kept : end]
        if kept < rows.shape[1]:  # a view would hold all rows; without a window there are no others
            last = last.clone()
        return last, after.repeat(len(rows))
    slot = torch.arange(int(spans.kept.max()) if len(spans.kept) else 0)
    present = (slot < spans.kept[:, None]) & (spans.ends_on == rank)[:, None]
    index = torch.where(present, (spans.starts[1:] - spans.kept)[:, None] + slot - low, rows.shape[1])
    padded = torch.cat([rows[0], rows.new_zeros(1, *rows.shape[2:])])
    return padded.index_select(0, index.flatten().to(rows.device)).unflatten(0, tuple(index.shape)), after


def check_slots(tokens: Tensor, slots: int, window: int | None) -> None:
    """ValueError unless a state of rows that read ``tokens [N]`` has as many keys and values as they may still see."""
    need = int(tokens.max()) if len(tokens) else 0
    need = need if window is None else min(need, window - 1)
    require(slots >= need, "state.k", f"at least {need} keys per row", slots)


def attend_locally(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor, scale: float, mass: bool = False
) -> Tensor:
    """``[B, T, H, K]`` where query t sees the keys ``first[t] .. last[t]``: on the host, never decreasing.

    ``mass``: ``[B, T, H, K + 1]`` in float32 or wider, the last number the log of the sum of the weights' exponentials.
    """
    tokens, keys = q.shape[1], k.shape[1]
    if tokens == 0:  # still part of the graph: other ranks' gradients come back through here
        out = q + (k[:, :0].sum() + v[:, :0].sum())
        return F.pad(out, (0, 1)).to(sum_dtype(q.dtype)) if mass else out
    if tokens == keys and int(first[-1]) == 0 and int(last[0]) == 0 and not mass:
        return _sdpa(q, k, v, None, True, scale)
    blocks = _blocks(first, last, mass)
    if len(blocks) == 1:
        return _block(q, k, v, first, last, scale, mass)
    return _Blocks.apply(q, k, v, first, last, blocks, scale, mass)


def _blocks(first: Tensor, last: Tensor, mass: bool) -> list[tuple[int, int]]:
    """Runs of queries, from and to (exclusive), whose mask is small; ``first``, ``last`` [T]."""
    blocks, begin, tokens = [], 0, len(first)
    while begin < tokens:
        end = min(begin + (MASS_QUERIES if mass else BLOCK_QUERIES), tokens)
        while end - begin > 1 and (end - begin) * int(last[end - 1] - first[begin] + 1) > MASK_NUMBERS:
            end = begin + (end - begin) // 2
        blocks.append((begin, end))
        begin = end
    return blocks


def _block(q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor, scale: float, mass: bool) -> Tensor:
    """``attend_locally`` of one block of queries; of the keys, only those that any of them sees are read."""
    low, high = int(first[0]), int(last[-1]) + 1
    at = torch.arange(low, high)
    mask = (at >= first[:, None]) & (at <= last[:, None])
    k, v = k[:, low:high], v[:, low:high]
    if mass:
        return _with_mass(q, k, v, mask.to(q.device), scale)
    visible = None if bool(mask.all()) else mask.to(q.device)
    return _sdpa(q, k, v, visible, False, scale)


def _with_mass(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Outputs and log of the mass ``[B, T, H, K + 1]``, float32 or wider; mask ``[T, S]``.

    torch's own attention does not tell the mass in public.
    """
    wide, groups = sum_dtype(q.dtype), k.shape[2]
    q = rearrange(q.to(wide), "b t (g r) k -> b g r t k", g=groups)
    k, v = (rearrange(x.to(wide), "b s g k -> b g 1 s k") for x in (k, v))
    with torch.autocast(q.device.type, enabled=False):  # or the scores would be rounded
        scores = (scale * (q @ k.mT)).masked_fill(~mask, -torch.inf)
        log_mass = scores.logsumexp(-1, keepdim=True)
        out = torch.cat([(scores - log_mass).exp() @ v, log_mass], -1)
    return rearrange(out, "b g r t k -> b t (g r) k")


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """torch's own attention: q ``[B, T, H, K]``, k and v ``[B, S, G, K]``, mask ``[T, S]`` -> ``[B, T, H, K]``."""
    q, k, v = (rearrange(x, "b t h k -> b h t k") for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=grouped)
    return rearrange(out, "b h t k -> b t h k")


class _Blocks(torch.autograd.Function):
    """Blocks of queries one after another; backward computes each again, and adds up dk and dv in float32 or wider."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor, blocks: list[tuple[int, int]],
        scale: float, mass: bool,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(q, k, v)
        ctx.call = (first, last, blocks, scale, mass)
        return torch.cat([_block(q[:, a:b], k, v, first[a:b], last[a:b], scale, mass) for a, b in blocks], 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        first, last, blocks, scale, mass = ctx.call
        dk, dv = (torch.zeros(x.shape, dtype=sum_dtype(x.dtype), device=x.device) for x in (k, v))
        dq = []
        for a, b in blocks:
            low, high = int(first[a]), int(last[b - 1]) + 1
            with torch.enable_grad():
                qs, ks, vs = (x.detach().requires_grad_() for x in (q[:, a:b], k[:, low:high], v[:, low:high]))
                out = _block(qs, ks, vs, first[a:b] - low, last[a:b] - low, scale, mass)
            block_dq, block_dk, block_dv = torch.autograd.grad(out, (qs, ks, vs), dout[:, a:b])
            dq.append(block_dq)
            dk[:, low:high] += block_dk
            dv[:, low:high] += block_dv
        return torch.cat(dq, 1), dk.to(k.dtype), dv.to(v.dtype), *[None] * 5
