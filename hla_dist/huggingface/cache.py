"""The cache of generate(): one state of constant size per layer, however much has been read.

Letters: B batch rows (beams included), H heads, K and V the sizes of keys and values.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from hla_dist.functional.pending import Pending, latest
from hla_dist.huggingface.configuration import HLAConfig

BEGINNING = 16  # token numbers that a cache keeps of each row's beginning


class HLACacheLayer(CacheLayerMixin):
    """One layer's state, a NamedTuple of [B, H, K, K or V] as of hla_dist.states; None before the first
    token.

    While it records, ``pending`` is what leads back to the last ``crop``.
    """

    supports_early_init = False
    is_croppable = True

    def __init__(self) -> None:
        super().__init__()
        self.state: Any = None
        self.pending: Pending | None = None
        self.record_past = False
        self.length = 0  # places read, padding included: what transformers counts

    def replace(self, state: Any, tokens: int) -> None:
        """The state, or what is pending, after ``tokens`` more places."""
        self.state, self.pending = latest(state), state if isinstance(state, Pending) else None
        self.length, self.is_initialized = self.length + tokens, True

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
        self.state = self.pending = None
        self.length, self.is_initialized = 0, False

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

    def activate_past_recording(self) -> None:
        """From now on keep what ``crop`` needs to take tokens back."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` places; what was read before can no more be taken back.

        Raises ValueError for a number above 0, and for more places than were recorded since the last crop.
        """
        recorded = 0 if self.pending is None else self.pending.tokens
        if not 0 <= -tokens_to_remove <= recorded:
            raise ValueError(
                f"crop: expected {-recorded} to 0, minus the places to take back of {recorded} read since the last "
                f"crop with activate_past_recording() on, got {tokens_to_remove}"
            )
        if self.pending is not None:
            self.state, self.pending = self.pending.after(recorded + tokens_to_remove), None
            self.length += tokens_to_remove

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> NoReturn:
        raise TypeError("an HLA cache holds states, not keys and values")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("an HLA cache holds states, not keys and values")

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.pending is not None:
            self.pending = self.pending.map(change)
            self.state = self.pending.state
        elif self.state is not None:
            self.state = type(self.state)(*map(change, self.state))


class HLACache(Cache):
    """``past_key_values`` of an HLA model: pass it to the next call to continue where the last one
    stopped.

    Its size does not depend on how many tokens were read. States are float32 (float64 in a float64
    model). After ``activate_past_recording()`` it also keeps, until the next ``crop``, what leads back
    over the tokens read since: ``crop(-n)`` takes the last n of them back.

    Attributes:
        tokens: ``[B]``, the number of tokens read in each row, padding left out; None before the first.
        beginning: The first few token numbers of each row, if they are known.
    """

    def __init__(self, config: HLAConfig) -> None:
        super().__init__(layers=[HLACacheLayer() for _ in range(config.num_layers)])
        self.tokens: Tensor | None = None
        self.beginning: Tensor | None = None
        self._filled: list[Tensor] = []  # [B, T] of each call since the last crop, while recording: where tokens are

    @property
    def states(self) -> list[Any] | None:
        """Return one state per layer, as LanguageModel takes them; None before the first token."""
        states = [layer.state if layer.pending is None else layer.pending for layer in self.layers]
        return None if states[0] is None else states

    @property
    def records(self) -> bool:
        """Whether the next tokens can be taken back."""
        return all(layer.record_past for layer in self.layers)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` places of every layer; the earlier ones are there to stay."""
        super().crop(tokens_to_remove)
        if tokens_to_remove:
            assert self.tokens is not None
            self.tokens = self.tokens - torch.cat(self._filled, 1)[:, tokens_to_remove:].sum(1)
            self.beginning = None if self.beginning is None else self.beginning[:, : self.get_seq_length()]
        self._filled = []

    def replace(
        self,
        states: list[Any],
        places: int,
        tokens: Tensor | None = None,
        ids: Tensor | None = None,
        filled: Tensor | None = None,
    ) -> None:
        """Take over the states after ``places`` more places, and each row's number of tokens so far.

        Args:
            states: One per layer; while this records, what is pending.
            places: How many more places were read.
            tokens: ``[B]``, without padding; None: every place was one.
            ids: ``[B, T]``, the token numbers read.
            filled: ``[B, T]``, where there are tokens and no padding; None: everywhere.
        """
        if not self.get_seq_length() and ids is not None:
            self.beginning = ids[:, :BEGINNING].clone()
        if tokens is None:
            before = torch.zeros(len(states[0][0]), dtype=torch.int64) if self.tokens is None else self.tokens
            tokens = before + places
        for layer, state in zip(self.layers, states, strict=True):
            layer.replace(state, places)
        self.tokens = tokens
        if not self.records:
            self._filled = []
        elif filled is None:
            self._filled.append(torch.ones(len(tokens), places, dtype=torch.bool, device=tokens.device))
        else:
            self._filled.append(filled)

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
        self._filled = []

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
        self._filled = [change(x) for x in self._filled]

    def nbytes(self) -> int:
        """Return the bytes of all states, and of what is kept to go back."""
        tensors = [x for layer in self.layers if layer.state is not None for x in layer.state]
        tensors += [x for layer in self.layers if layer.pending is not None for x in layer.pending.kept]
        return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, torch.Tensor))
