"""The cache of generate(): one state of constant size per layer, however much has been read.

Letters: B batch rows (beams included), H heads, K and V the sizes of keys and values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from hla_dist.huggingface.configuration import HLAConfig

BEGINNING = 16  # token numbers that a cache keeps of each row's beginning


class HLACacheLayer(CacheLayerMixin):
    """One layer's state, a NamedTuple of [B, H, K, K or V] as of hla_dist.states; None before the first
    token.
    """

    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.state: Any = None
        self.length = 0  # places read, padding included: what transformers counts

    def replace(self, state: Any, tokens: int) -> None:
        """The state after ``tokens`` more places."""
        self.state, self.length, self.is_initialized = state, self.length + tokens, True

    @property
    def batch_size(self) -> int:
        return -1 if self.state is None else self.state[0].shape[0]

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1  # there is none

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def reset(self) -> None:
        self.state, self.length, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        self._map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """The operator says if a state lies on another device than its queries."""

    def crop(self, tokens_to_remove: int) -> NoReturn:
        raise ValueError("crop: expected a cache of keys and values, got HLA states, which forget no token")

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> NoReturn:
        raise TypeError("an HLA cache holds states, not keys and values")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("an HLA cache holds states, not keys and values")

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None:
            self.state = type(self.state)(*map(change, self.state))


class HLACache(Cache):
    """``past_key_values`` of an HLA model: pass it to the next call to continue where the last one
    stopped.

    Its size does not depend on how many tokens were read. States are float32 (float64 in a float64
    model).

    Attributes:
        tokens: ``[B]``, the number of tokens read in each row, padding left out; None before the first.
        beginning: The first few token numbers of each row, if they are known.
    """

    def __init__(self, config: HLAConfig) -> None:
        super().__init__(layers=[HLACacheLayer() for _ in range(config.num_layers)])
        self.tokens: Tensor | None = None
        self.beginning: Tensor | None = None

    @property
    def states(self) -> list[Any] | None:
        """Return one state per layer, as LanguageModel takes them; None before the first token."""
        states = [layer.state for layer in self.layers]
        return None if states[0] is None else states

    def replace(self, states: list[Any], places: int, tokens: Tensor | None = None, ids: Tensor | None = None) -> None:
        """Take over the states after ``places`` more places, and each row's number of tokens so far.

        Args:
            states: One per layer.
            places: How many more places were read.
            tokens: ``[B]``, without padding; None: every place was one.
            ids: ``[B, T]``, the token numbers read.
        """
        if not self.get_seq_length() and ids is not None:
            self.beginning = ids[:, :BEGINNING].clone()
        if tokens is None:
            before = torch.zeros(len(states[0][0]), dtype=torch.int64) if self.tokens is None else self.tokens
            tokens = before + places
        for layer, state in zip(self.layers, states, strict=True):
            layer.replace(state, places)
        self.tokens = tokens

    def is_continued_by(self, ids: Tensor) -> bool:
        """Whether ``ids`` ``[B, T]`` follow the text that was read: they begin in another way."""
        if self.beginning is None or len(self.beginning) != len(ids):
            return False
        shown = min(self.beginning.shape[1], ids.shape[1])
        return not torch.equal(self.beginning[:, :shown].to(ids.device), ids[:, :shown])

    def mask(self) -> Tensor:
        """Return an attention mask ``[B, P]`` of the places read so far, with as many ones as tokens."""
        assert self.tokens is not None
        past = self.get_seq_length()
        return (torch.arange(past, device=self.tokens.device) >= past - self.tokens[:, None]).long()

    def reset(self) -> None:
        super().reset()
        self.tokens = self.beginning = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._change_rows(lambda x: x[beam_idx.to(x.device)])

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._change_rows(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._change_rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def _change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self.tokens, self.beginning = (x if x is None else change(x) for x in (self.tokens, self.beginning))

    def nbytes(self) -> int:
        """Return the bytes of all states."""
        tensors = [x for layer in self.layers if layer.state is not None for x in layer.state]
        return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, torch.Tensor))
