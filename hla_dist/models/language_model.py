"""A decoder language model whose token mixer is Higher-order Linear Attention.

Letters: B batch, T local tokens, D hidden_size, M SwiGLU width, N vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hla_dist import checkpoint_context
from hla_dist.models.config import ModelConfig
from hla_dist.nn import HLAAttention


class SwiGLU(nn.Module):
    """``y = (silu(x W_gate) * x W_up) W_down``, x [..., D], no bias."""

    def __init__(self, hidden_size: int, mlp_size: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * mlp_size, bias=False)
        self.down = nn.Linear(mlp_size, hidden_size, bias=False)

    def reset_parameters(self, scale: float = 1.0) -> None:
        """Normal weights of deviation 1/sqrt(inputs), those of ``down`` times ``scale``."""
        nn.init.normal_(self.gate_up.weight, std=self.gate_up.in_features**-0.5)
        nn.init.normal_(self.down.weight, std=scale * self.down.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)  # [..., M] each
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """``h = x + attention(norm(x)); y = h + SwiGLU(norm(h))``, x [B, T, D]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = HLAAttention(
            config.hidden_size,
            config.num_heads,
            op=config.op,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            **{"residual_scale": residual_scale(config), "norm_eps": config.norm_eps, **config.attention},
        )
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.resolved_mlp_size)

    def forward(
        self, x: Tensor, state: Any, cu_seqlens: Tensor | None, positions: Tensor | None, return_state: bool
    ) -> tuple[Tensor, Any]:
        mixed, state = self.attention(
            self.attention_norm(x), state, cu_seqlens, positions=positions, output_final_state=return_state
        )
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), state


def residual_scale(config: ModelConfig) -> float:
    """1/sqrt(writers): with it the residual stream's variance at initialisation does not grow with depth (GPT-2)."""
    return 1.0 / math.sqrt(2 * config.num_layers)


class LanguageModel(nn.Module):
    """Tokens to next-token logits: embedding, ``num_layers`` blocks, RMSNorm, the embedding transposed.

        logits = norm(blocks(E[tokens])) E^T                      tokens [B, T] -> logits [B, T, N]

    It has no position embeddings of its own: order comes from the attention layers (causal, with decay), so nothing
    here depends on where a shard begins. Wrap it in :class:`hla_dist.SequenceParallelHLA` to run it on
    shards of a sequence; its communication is that of its attention layers.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the embedding and SwiGLU layers anew; attention layers and norms have done so themselves.

        What writes to the residual stream is scaled by :func:`residual_scale`; the embedding's deviation is 0.02, as
        usual where it is the output too.
        """
        nn.init.normal_(self.embedding.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, SwiGLU):
                module.reset_parameters(residual_scale(self.config))

    def forward(
        self,
        tokens: Tensor,
        state: list[Any] | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, list[Any]]:
        """Logits [B, T, N]; with ``return_state`` also one state a layer, the ``state`` of the next call.

        Streaming a text in pieces of any length, each with the state the last one returned, gives the logits of
        the whole text; T = 1 is the decode step. ``positions``, the tokens' global ones, matter with rotary
        attention only, and there must be given with a state. Raises ValueError for tokens that are not integers
        [B, T], or a state of another depth.
        """
        if tokens.dim() != 2 or tokens.is_floating_point():
            raise ValueError(f"tokens: expected integers [B, T], got {tokens.dtype} {tuple(tokens.shape)}")
        if state is not None and len(state) != len(self.blocks):
            raise ValueError(f"state: expected one state for each of {len(self.blocks)} layers, got {len(state)}")
        x = self.embedding(tokens)
        states: list[Any] = []
        for index, block in enumerate(self.blocks):
            arguments = (x, None if state is None else state[index], cu_seqlens, positions, return_state)
            if self.activation_checkpointing and torch.is_grad_enabled():
                x, after = checkpoint(block, *arguments, use_reentrant=False, context_fn=checkpoint_context)
            else:
                x, after = block(*arguments)
            states.append(after)
        logits = F.linear(self.norm(x), self.embedding.weight)
        return (logits, states) if return_state else logits
