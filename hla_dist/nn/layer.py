"""What attention layers have in common: heads of checked sizes, and the ranks that share their sequence."""

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

from torch import Tensor

from hla_dist.functional.validate import require
from hla_dist.nn.head_norm import RenamesOnLoad
from hla_dist.nn.padding import present

Layer = TypeVar("Layer", bound="AttentionLayer")


class AttentionLayer(RenamesOnLoad):
    """Base of ``HLAAttention`` and ``SoftmaxAttention``. Further ``sizes`` are checked alike, by name.

    ``group`` and ``shard_lengths`` are None until ``SequenceParallelHLA`` sets them; they are not pickled, and shared
    by copies. ``chunk_tokens``: projections of so many tokens at a time, 0 all at once.
    """

    _shown: tuple[str, ...]  # attributes by which one tells layers apart

    def __init__(
        self, hidden_size: int, num_heads: int, num_kv_heads: int | None, head_dim: int | None, **sizes: int | None
    ) -> None:
        super().__init__()
        needed = {"hidden_size": hidden_size, "num_heads": num_heads}
        for name, size in {**needed, "num_kv_heads": num_kv_heads, "head_dim": head_dim, **sizes}.items():
            whole = isinstance(size, int) and size >= 1
            require(whole or (size is None and name not in needed), name, "a positive integer", repr(size))
        unless = "to be given unless num_heads divides hidden_size"
        divides = head_dim is not None or hidden_size % num_heads == 0
        require(divides, "head_dim", unless, f"hidden_size={hidden_size}, num_heads={num_heads}")
        self.hidden_size, self.num_heads = hidden_size, num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.head_dim = hidden_size // num_heads if head_dim is None else head_dim
        divisor = f"a divisor of num_heads={num_heads}"
        require(num_heads % self.num_kv_heads == 0, "num_kv_heads", divisor, self.num_kv_heads)
        self.group: Any = None
        self.shard_lengths: Sequence[int] | None = None
        self.chunk_tokens = 0

    def _filled(self, x: Tensor, positions: Tensor | None, attention_mask: Tensor | None) -> Tensor | None:
        """Where x [B, T, D] has tokens and no padding, bool [B, T]; None without a mask.

        Raises ValueError for a wrong x, for a wrong mask, and for positions that are neither [T] nor [B, T].
        """
        if x.dim() != 3 or x.shape[-1] != self.hidden_size or not x.is_floating_point():
            expected = f"a floating-point tensor [B, T, {self.hidden_size}]"
            raise ValueError(f"x: expected {expected}, got {x.dtype} {list(x.shape)}")
        # by their number first: comparing [B, T] with [T] asks a compiler whether B is T
        if positions is not None and positions.shape != (x.shape[:2] if positions.dim() == 2 else x.shape[1:2]):
            raise ValueError(f"positions: expected [T] or [B, T] for x {list(x.shape)}, got {list(positions.shape)}")
        return None if attention_mask is None else present(attention_mask, x.shape[:2])

    def reset_parameters(self) -> None:
        """Initialise every parameter anew, after ``to_empty`` on a meta device for example."""
        for child in self.children():
            if hasattr(child, "reset_parameters"):
                child.reset_parameters()  # type: ignore[operator]
        self._reset_gates()

    def _reset_gates(self) -> None:
        """Initialise the layer's own parameters, if it has any."""

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self._shown)

    def __getstate__(self) -> dict[str, Any]:
        # A group is a connection of this run, not part of the layer: what is pickled comes back without it.
        return {**self.__dict__, "group": None, "shard_lengths": None}

    def __deepcopy__(self: Layer, memo: dict[int, Any]) -> Layer:
        # A copy within the run (an average of weights, say) keeps working over the same group.
        if self.group is not None:
            memo[id(self.group)] = self.group
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin
