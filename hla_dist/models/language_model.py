"""A decoder language model whose token mixer is Higher-order Linear Attention, in some layers perhaps softmax.

Letters: B batch, T local tokens, D hidden_size, M SwiGLU width, N vocabulary.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hla_dist import checkpoint_context
from hla_dist.models.config import NEITHER, ModelConfig
from hla_dist.models.experts import MixtureOfExperts, balance_loss
from hla_dist.models.loss import summed_cross_entropy
from hla_dist.nn import HLAAttention, MemoryAttention, SoftmaxAttention
from hla_dist.nn.chunks import CHUNK_TOKENS, map_tokens
from hla_dist.nn.initialization import normal_linear, normal_on_reset

EMBEDDING_STD = 0.02
CHECKPOINTING = ("none", "layer", "sublayer")


class SwiGLU(nn.Module):
    """``y = (silu(x W_gate) * x W_up) W_down``, x [..., D], no bias."""

    def __init__(self, hidden_size: int, mlp_size: int, residual_scale: float = 1.0) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * mlp_size, bias=False)
        self.down = nn.Linear(mlp_size, hidden_size, bias=False)
        normal_on_reset(self.gate_up, hidden_size**-0.5)
        normal_on_reset(self.down, residual_scale * mlp_size**-0.5)

    def reset_parameters(self) -> None:
        """Draw normal weights of deviation 1/sqrt(inputs), those of ``down`` times ``residual_scale``."""
        self.gate_up.reset_parameters()
        self.down.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)  # [..., M] each
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """``h = x + attention(norm(x)); y = h + SwiGLU(norm(h))``, x [B, T, D]; SwiGLU perhaps a mixture of experts."""

    def __init__(self, config: ModelConfig, mixer: str) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        sizes: dict[str, Any] = dict(num_kv_heads=config.num_kv_heads, head_dim=config.head_dim)
        common = {"residual_scale": residual_scale(config), "norm_eps": config.norm_eps}
        self.attention: HLAAttention | SoftmaxAttention
        if mixer in ("softmax", "memory"):
            kind, own = (SoftmaxAttention, config.softmax) if mixer == "softmax" else (MemoryAttention, config.memory)
            self.attention = kind(config.hidden_size, config.num_heads, **sizes, **{**common, **own})
        else:
            options = {**common, **NEITHER, **config.attention}
            self.attention = HLAAttention(config.hidden_size, config.num_heads, op=mixer, **sizes, **options)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        widths, scale = (config.hidden_size, config.resolved_mlp_size), residual_scale(config)
        self.mlp: SwiGLU | MixtureOfExperts
        if config.experts:
            self.mlp = MixtureOfExperts(*widths, config.experts, config.resolved_active, scale)
        else:
            self.mlp = SwiGLU(*widths, scale)
        self.checkpointing = "none"  # LanguageModel.activation_checkpointing

    def forward(
        self,
        x: Tensor,
        state: Any,
        cu_seqlens: Tensor | None,
        positions: Tensor | None,
        return_state: bool | str,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Any, Tensor | None]:
        """Return y, the state if asked for, and with experts their loads ``[B, 2, E]``, summed over tokens."""
        arguments = (x, state, cu_seqlens, positions, return_state, attention_mask)
        if self.checkpointing == "layer":
            return recomputed(self._whole, *arguments)
        if self.checkpointing == "sublayer":
            x, state = recomputed(self._mix, *arguments)
            x, loads = self._transform(x, attention_mask, CHUNK_TOKENS)
            return x, state, loads
        return self._whole(*arguments)

    def _whole(self, *arguments: Any) -> tuple[Tensor, Any, Tensor | None]:
        x, state = self._mix(*arguments)
        x, loads = self._transform(x, arguments[-1])
        return x, state, loads

    def _mix(self, x: Tensor, *arguments: Any) -> tuple[Tensor, Any]:
        state, cu_seqlens, positions, return_state, attention_mask = arguments
        tokens = CHUNK_TOKENS if self.checkpointing == "sublayer" else 0
        normed = map_tokens(self.attention_norm, x, modules=[self.attention_norm], tokens=tokens)
        returned = {"output_final_state": bool(return_state), "pending": return_state == "pending"}
        mixed, state = self.attention(
            normed, state, cu_seqlens, positions=positions, attention_mask=attention_mask, **returned
        )
        return x + mixed, state

    def _transform(self, x: Tensor, mask: Tensor | None, chunk: int = 0) -> tuple[Tensor, Tensor | None]:
        if isinstance(self.mlp, MixtureOfExperts) and self.mlp.group is not None:  # chunks must not communicate
            result = recomputed(self._tokens_alone, x) if chunk else self._tokens_alone(x)
        else:
            result = map_tokens(self._tokens_alone, x, modules=[self.mlp_norm, self.mlp], tokens=chunk)
        if isinstance(result, Tensor):
            return result, None
        x, loads = result
        return x, (loads if mask is None else loads * mask[..., None, None].to(loads.dtype)).sum(1)

    def _tokens_alone(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        result = self.mlp(self.mlp_norm(x))
        return x + result if isinstance(result, Tensor) else (x + result[0], result[1])


def recomputed(fn: Any, *arguments: Any) -> Any:
    """``fn(*arguments)``; backward computes it again from the arguments, and sends nothing."""
    if not torch.is_grad_enabled():
        return fn(*arguments)
    return checkpoint(fn, *arguments, use_reentrant=False, context_fn=checkpoint_context)


def residual_scale(config: ModelConfig) -> float:
    """1/sqrt(writers): the residual stream's initial variance does not grow with depth (GPT-2)."""
    return 1.0 / math.sqrt(2 * config.num_layers)


class LanguageModel(nn.Module):
    """Tokens to next-token logits: embedding, ``num_layers`` blocks, RMSNorm, the embedding transposed.

        logits = norm(blocks(E[tokens])) E^T                      tokens [B, T] -> logits [B, T, N]

    With ``tie_word_embeddings=False`` a matrix of its own, ``lm_head``, stands in E's place at the
    output.

    The model has no position embeddings. Order comes from the attention layers (causal, with decay), so
    nothing depends on where a shard begins. Wrap it in ``hla_dist.SequenceParallelHLA`` to run it
    on shards of a sequence; its communication is that of its attention layers.

    Args:
        config: The shape.

    Examples:
        >>> import torch
        >>> from hla_dist.models import LanguageModel, ModelConfig
        >>> model = LanguageModel(ModelConfig(vocab_size=100, hidden_size=32, num_layers=2))
        >>> model(torch.randint(100, (1, 50))).shape
        torch.Size([1, 50, 100])
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self._checkpointing = "none"
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        normal_on_reset(self.embedding, EMBEDDING_STD)
        self.blocks = nn.ModuleList(Block(config, mixer) for mixer in config.mixers)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.lm_head: nn.Linear | None = None
        if not config.tie_word_embeddings:
            self.lm_head = normal_linear(config.hidden_size, config.vocab_size, EMBEDDING_STD)
        self._reset(nn.Embedding, SwiGLU, MixtureOfExperts)  # the others have done so

    @property
    def activation_checkpointing(self) -> str:
        """What backward computes again instead of forward keeping it; loss and gradients do not change.

        - "none" (or False), the default: nothing.
        - "layer" (or True): each block, from its input.
        - "sublayer", for the longest shards: each attention and each SwiGLU layer, from its input. All that
          treats tokens alone runs in chunks of CHUNK_TOKENS, in evaluation too; projections are then
          computed three times.

        No policy sends a summary twice. A softmax layer gets its keys and values again, since those of all
        ranks would be more than its input; for the same reason rows travel to experts on other ranks again.
        """
        return self._checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, policy: str | bool) -> None:
        if isinstance(policy, bool):
            policy = "layer" if policy else "none"
        if policy not in CHECKPOINTING:
            raise ValueError(f"activation_checkpointing: expected one of {', '.join(CHECKPOINTING)}, got {policy!r}")
        self._checkpointing = policy
        for block in self.blocks:
            assert isinstance(block, Block)
            block.checkpointing = policy
            block.attention.chunk_tokens = CHUNK_TOKENS if policy == "sublayer" else 0

    def reset_parameters(self) -> None:
        """Initialise every parameter anew, for example after ``to_empty`` on a model built on the meta device.

        What writes to the residual stream is scaled by ``residual_scale``. The embedding's deviation is
        0.02, as usual where it is the output too.
        """
        self._reset(nn.Embedding, SwiGLU, MixtureOfExperts, HLAAttention, SoftmaxAttention, nn.RMSNorm)
        if self.lm_head is not None:
            self.lm_head.reset_parameters()

    def _reset(self, *kinds: type[nn.Module]) -> None:
        for module in self.modules():
            if isinstance(module, kinds):
                module.reset_parameters()  # type: ignore[operator]  # every kind has one

    def forward(
        self,
        tokens: Tensor,
        state: list[Any] | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        return_state: bool | str = False,
        labels: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, list[Any]]:
        """Return logits ``[B, T, N]``, and with ``return_state`` one state per layer, the next call's
        ``state``.

        Streaming a text in pieces of any length, each with the state that the last one returned, gives the
        logits of the whole text. T = 1 is the decode step.

        Args:
            tokens: Integers ``[B, T]``.
            state: What an earlier call returned.
            cu_seqlens: As for ``hla_dist.HLAAttention``.
            positions: The tokens' global positions. They matter with rotary attention only, which needs
                them with a state.
            return_state: Return the states too. With ``"pending"`` a ``hla_dist.Pending`` per layer comes
                in their place, which can go back over these tokens.
            labels: ``[B, T]``. The result is then the sum of the cross-entropies of these labels, -100 left
                out, instead of logits, which exist for a chunk of tokens at a time. In training mode a
                mixture of experts adds ``balance`` times its balance loss, which is 1 per token where
                experts are equally busy.

        Raises:
            ValueError: Tokens are not integers ``[B, T]``, or the state has another depth.
        """
        if tokens.dim() != 2 or tokens.is_floating_point():
            raise ValueError(f"tokens: expected integers [B, T], got {tokens.dtype} {tuple(tokens.shape)}")
        x, states, loads = self.features(
            self.embedding(tokens), state, cu_seqlens, positions=positions, return_state=return_state
        )
        if labels is None:
            result = self._logits(x)
        else:
            read = (self.norm, self.lm_head or self.embedding)
            result = summed_cross_entropy(self._logits, x, labels, self.config.vocab_size, read)
            if loads is not None and self.training:
                result = result + self.balance_loss(loads)
        return (result, states) if return_state else result

    def features(
        self,
        x: Tensor,
        state: list[Any] | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_state: bool | str = False,
    ) -> tuple[Tensor, list[Any], Tensor | None]:
        """Return what the blocks make of embeddings x ``[B, T, D]``, before the last norm, states and loads.

        States are None unless asked for. The experts' loads ``[L, B, 2, E]`` are None where there are
        none. ``attention_mask`` ``[B, T]`` is 0 where there is no token: such a place leaves every state
        as it is, and counts in no load.
        """
        if return_state not in (False, True, "pending"):
            raise ValueError(f"return_state: expected True, False or 'pending', got {return_state!r}")
        if state is not None and len(state) != len(self.blocks):
            raise ValueError(f"state: expected one state for each of {len(self.blocks)} layers, got {len(state)}")
        states: list[Any] = []
        loads: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            before = None if state is None else state[index]
            x, after, load = block(x, before, cu_seqlens, positions, return_state, attention_mask)
            states.append(after)
            loads += [] if load is None else [load]
        return x, states, torch.stack(loads) if loads else None

    def balance_loss(self, loads: Tensor) -> Tensor:
        """Return ``balance`` times the balance loss of ``features``' loads, this rank's share of it.

        It is summed over tokens. Communication: one all-gather of the experts' counts.
        """
        first: Any = self.blocks[0]  # every layer has its group
        return self.config.balance * balance_loss(loads, first.attention.group)

    def _logits(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return F.linear(x, self.embedding.weight) if self.lm_head is None else self.lm_head(x)
