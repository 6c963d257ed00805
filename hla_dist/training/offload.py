"""What forward saves for backward kept in host memory, by torch's own hooks: room for longer shards on a GPU."""

from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

LEAST = 1 << 16  # bytes; a smaller tensor is not worth a copy there and back


class SavedOnHost(saved_tensors_hooks):
    """A context for a forward pass: ``save_on_cpu`` to pinned memory, for all but parameters and small tensors.

    Parameters stay where they are anyway, and torch's context would copy them for each use. Under activation
    checkpointing, what is saved are the inputs of the parts that backward computes again. Numbers do not change.
    Copies go beside the computation, but a tensor that two operators save is copied twice.
    """

    def __init__(self) -> None:
        copies = save_on_cpu(pin_memory=True)
        self.nbytes = 0  # copied so far

        def pack(x: Tensor) -> Any:
            if x.nbytes < LEAST or is_parameter(x):
                return x
            self.nbytes += x.nbytes
            return copies.pack_hook(x)

        def unpack(packed: Any) -> Tensor:
            return packed if isinstance(packed, Tensor) else copies.unpack_hook(packed)

        super().__init__(pack, unpack)


def is_parameter(x: Tensor) -> bool:
    """Whether ``x`` is a parameter or a view of one, such as the transpose that a product saves."""
    return isinstance(x, nn.Parameter) or isinstance(x._base, nn.Parameter)
