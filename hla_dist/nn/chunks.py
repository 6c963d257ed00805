"""Work that treats every token alone, a chunk of tokens at a time: only a chunk's intermediate results ever exist."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

CHUNK_TOKENS = 1024  # measured on a CPU: as fast as 4096, and the allocator keeps a tenth less


def map_tokens(fn: Callable[..., Any], *sequences: Tensor, modules: Sequence[nn.Module], tokens: int) -> Any:
    """``fn(*sequences)`` for an ``fn`` that treats every token alone: its result, or results, [B, T, ..].

    ``sequences`` [B, T, ..]; ``modules`` hold every parameter that ``fn`` reads, which are no more than those it needs;
    ``tokens``, of all B together, make a chunk. Backward computes each chunk again: nothing is kept but the sequences.
    Results and gradients are written where they belong as they are made, since small tensors that outlive a chunk's
    large ones would keep the allocator from using that memory again (measured: it doubled the peak). Under
    torch.compile the pieces are concatenated instead. ``tokens`` 0, or all in one chunk: one plain call, nothing
    computed twice. ``fn`` must not communicate.
    """
    batch, length = sequences[0].shape[:2]
    if not tokens or batch * length <= tokens:
        return fn(*sequences)
    step = max(1, tokens // batch)
    if torch.compiler.is_compiling():
        results = [
            checkpoint(fn, *part, use_reentrant=False, preserve_rng_state=False)
            for part in zip(*(x.split(step, dim=1) for x in sequences), strict=True)
        ]
        if isinstance(results[0], Tensor):
            return torch.cat(results, dim=1)
        return tuple(torch.cat(column, dim=1) for column in zip(*results, strict=True))
    call = _AsModule(fn, modules)
    parameters = dict(call.named_parameters())
    results = _Chunks.apply(call, tuple(parameters), step, len(sequences), *sequences, *parameters.values())
    return results[0] if call.single else results


class _AsModule(nn.Module):
    """``fn`` as a module that holds those whose parameters it reads, so that others can take their place."""

    def __init__(self, fn: Callable[..., Any], modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.fn = (fn,)  # in a tuple: a module among the modules would be held twice
        self.modules_read = nn.ModuleList(modules)
        self.single = False

    def forward(self, *sequences: Tensor) -> tuple[Tensor, ...]:
        result = self.fn[0](*sequences)
        self.single = isinstance(result, Tensor)
        return (result,) if self.single else tuple(result)


class _Chunks(torch.autograd.Function):
    """Forward without a graph; backward builds one chunk's at a time, on aliases of the parameters.

    On aliases, because hooks on the parameters themselves (that reduce gradients, say) must see a backward's gradient
    once, not once per chunk.
    """

    @staticmethod
    def forward(ctx, call, names, step, count, *tensors):
        sequences = tensors[:count]
        length = sequences[0].shape[1]
        results: list[Tensor] = []
        for start in range(0, length, step):
            part = call(*(x[:, start : start + step] for x in sequences))
            if not results:
                results = [y.new_empty(y.shape[0], length, *y.shape[2:]) for y in part]
            for whole, piece in zip(results, part, strict=True):
                whole[:, start : start + step] = piece
        device = sequences[0].device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.call, ctx.names, ctx.step, ctx.count = call, names, step, count
        ctx.save_for_backward(*tensors)
        return tuple(results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        saved = ctx.saved_tensors  # once: checkpointing gives them out once
        sequences, parameters = saved[: ctx.count], saved[ctx.count :]
        wanted = ctx.needs_input_grad[4:]
        aliases = [p.detach().requires_grad_(w) for p, w in zip(parameters, wanted[ctx.count :], strict=True)]
        of_parameters: list[Tensor | None] = [None] * len(aliases)
        of_sequences = [torch.empty_like(x) if w else None for x, w in zip(sequences, wanted)]
        device, dtype, enabled = ctx.autocast
        for start in range(0, sequences[0].shape[1], ctx.step):
            chunk = slice(start, start + ctx.step)
            parts = [x[:, chunk].detach().requires_grad_(w) for x, w in zip(sequences, wanted)]
            with torch.enable_grad(), torch.autocast(device, dtype=dtype, enabled=enabled):
                results = functional_call(ctx.call, dict(zip(ctx.names, aliases, strict=True)), tuple(parts))
            used = [i for i, y in enumerate(results) if y.requires_grad]
            leaves = [x for x in (*parts, *aliases) if x.requires_grad]
            computed = iter(
                torch.autograd.grad(
                    [results[i] for i in used], leaves, [gradients[i][:, chunk] for i in used], materialize_grads=True
                )
            )
            for target in of_sequences:
                if target is not None:
                    target[:, chunk] = next(computed)
            for i, alias in enumerate(aliases):
                if alias.requires_grad:
                    gradient, total = next(computed), of_parameters[i]
                    of_parameters[i] = gradient if total is None else total.add_(gradient)
        return None, None, None, None, *of_sequences, *of_parameters
