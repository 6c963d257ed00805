"""Packed documents, for the oracles: one call per document."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def each(
    oracle: Callable[..., Any], name: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, options: dict[str, Any]
) -> Any:
    """``oracle`` on tokens ``cu_seqlens[n] .. cu_seqlens[n + 1] - 1`` for every n, with row n of the states.

    Raises ValueError unless B = 1 and ``cu_seqlens [N + 1]`` rises from 0 to T.
    """
    bounds = cu_seqlens.tolist()
    if q.shape[0] != 1 or bounds[0] != 0 or bounds[-1] != q.shape[1] or bounds != sorted(bounds):
        raise ValueError(f"cu_seqlens: expected B = 1 and to rise from 0 to T = {q.shape[1]}, got {bounds}")
    gates, initial = options.get("log_decay"), options.get("initial_state")
    outs, states = [], []
    for n, (start, stop) in enumerate(zip(bounds, bounds[1:])):
        own = dict(options)
        if gates is not None and gates.ndim >= 3:
            own["log_decay"] = gates[:, start:stop]
        if initial is not None:
            own["initial_state"] = type(initial)(*(x[n : n + 1] for x in initial))
        out, state = oracle(name, q[:, start:stop], k[:, start:stop], v[:, start:stop], **own)
        outs.append(out)
        states.append(state)
    final = type(states[0])(*map(torch.cat, zip(*states))) if options.get("output_final_state") else None
    return torch.cat(outs, dim=1), final
