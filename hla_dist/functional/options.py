"""The keyword options of the operators, once."""

from typing import Any, TypedDict

import torch
from torch import Tensor


class SegmentOptions(TypedDict, total=False):
    """Options that shape a segment's summary; documented in ``Options``."""

    log_decay: Tensor | None
    decay_form: str
    scale: float | None
    ridge: float
    gain: float | Tensor
    skip: float | Tensor
    normalize: bool
    mask: str
    backend: str
    chunk_size: int | None


class Options(SegmentOptions, total=False):
    """Keyword options of the operators.

    Attributes:
        log_decay: Natural log of the gates, <= 0: ``[H]`` or ``[B, T, H]`` (``[G]``, ``[B, T,
            G]``); for linear_attention also one per channel of k, ``[B, T, H, K]`` (``[B, T, G,
            K]``); -1e4 or less, -inf included, cuts the past off, with a gradient of 0. Default:
            None.
        decay_form: ``"masked"``, the operator's equations; ``"paper"``, for hla2: the paper's
            recurrence with decay to the letter, S_t = g S + k k^T, C_t = g C + q v^T, G_t = g G +
            k k^T C_{t-1}, o = q^T ((S + ridge I) C - G); with gates it is another operator,
            without them the same one. Nothing differs with mask="prefix" (its recurrence has no
            G) and "full" (no decay). Default: "masked".
        scale: q is replaced by scale * q, in the ridge and the states too. None: K^-1/2, as in
            fla. Default: 1.0.
        ridge: lambda of the paper's S + lambda I; for hla2 and hla3. Default: 0.0.
        gain: alpha of the key term u = alpha S q + lambda q + mu k; for hla2 and hla3, causal and
            masked: a number, or ``[H]``, differentiable. Default: 1.0.
        skip: mu of the key term, likewise. gain = 0, skip = 1 make hla2 linear_attention, and hla3
            ahla. Default: 0.0.
        normalize: out = numerator / (denominator + eps), the denominator being the same cascade
            on ones; where q . k has both signs it can be close to zero, and eps does not help.
            Default: False.
        eps: Added to the denominator under ``normalize``. Default: 1e-6.
        mask: ``"causal"``; ``"prefix"``, for hla2 (the paper's eq. 3.1: o = LA(w, q, v), w =
            LA(q, k, k) + ridge q); ``"full"``: every token sees the whole sequence. Default:
            "causal".
        initial_state: The carry before the first token, as the operator returns it or as a plain
            tuple of its fields (order 1: also the bare tensor): float32 (float64 for float64
            inputs), ``[B, H, K, K]`` and ``[B, H, K, V]`` (V + 1 with normalize). Default: None.
        output_final_state: Also return the carry after the last token; T = 1 with an initial
            state is a decode step. Default: False.
        group: ProcessGroup, 1-D DeviceMesh or mpi4py communicator over which the sequence is
            sharded, rank r's tokens before rank r + 1's; T is local, may differ, may be 0.
            initial_state is read on rank 0; the final state, the whole sequence's, comes back on
            every rank. Default: None.
        exchange: How summaries travel over the group: ``"all_gather"``; ``"scan"`` (recursive
            doubling); ``"hierarchical"`` (inside machines, then across); auto: all_gather up to 8
            ranks or on one machine, else hierarchical on machines of equal ranks, else scan. All
            are exact; mask="full" has all_gather only. Default: "auto".
        wire_dtype: torch.bfloat16: summaries travel rounded to it, in half the bytes, with errors
            of its size (docs/numerics.md); None: as they are. Default: None.
        backend: ``"auto"``, Triton's kernels on a GPU, else torch; ``"torch"``; ``"triton"``, or
            ``"gluon"``, kernels for Hopper that no GPU has confirmed (docs/kernels.md): an error
            where they cannot run. Default: "auto".
        chunk_size: Tokens per chunk; None: 64, or the next power of two for shorter segments.
            Default: None.
        cu_seqlens: ``[N + 1]`` integers, documents packed into one sequence, B = 1: none sees
            another, some may be empty. States then have N rows. With a group it is the whole
            sequence's; row n of the initial state is read on the rank of document n's first
            token, row n of the final state is valid on the rank of its last (an empty document:
            where it would start), zero elsewhere. Default: None.
        cu_seqlens_cpu: The same on the host, where cu_seqlens is on a GPU: reading lengths makes
            the host wait. Default: None.
        shard_lengths: With a group and cu_seqlens: one host integer per rank; None: equal shards.
            Default: None.
    """

    eps: float
    initial_state: Any
    output_final_state: bool
    group: Any
    exchange: str
    wire_dtype: torch.dtype | None
    cu_seqlens: Tensor | None
    cu_seqlens_cpu: Tensor | None
    shard_lengths: list[int] | None


DEFAULTS: dict[str, Any] = dict.fromkeys(Options.__annotations__)  # None, unless said below
DEFAULTS |= {"decay_form": "masked", "mask": "causal", "exchange": "auto", "backend": "auto"}
DEFAULTS |= {"scale": 1.0, "ridge": 0.0, "gain": 1.0, "skip": 0.0, "eps": 1e-6}
DEFAULTS |= {"normalize": False, "output_final_state": False}
