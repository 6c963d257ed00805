"""Where a number that is not finite came from: the rank, and the layer or parameter.

Gradients are summed over ranks and carries travel between them, so after a step every rank has the NaN of one. Each
rank therefore notes, as it computes and before anything is summed, whether a layer's output, the gradient at it, or a
parameter's own gradient was finite. Nothing is read from these notes while all is well: on a GPU nobody waits for them.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hla_dist.nn.gradient_reduction import is_dtensor
from hla_dist.parallel.collectives import all_gather_objects


class Watch:
    """Notes of one model's layers on this rank, for one step at a time.

    Layers are the model's children, and those of the elements of its lists: ``embedding``, ``blocks.0.attention``.
    Cost: one sum of each layer's output, of its gradient and of each parameter's gradient. Of parameters that FSDP
    shards the layer is named, not the parameter.
    """

    def __init__(self, model: nn.Module) -> None:
        self._notes: list[tuple[str, Tensor]] = []
        for name, layer in layers(model):
            layer.register_forward_hook(partial(self._after, name))
        for name, parameter in model.named_parameters():
            if not is_dtensor(parameter):
                parameter.register_post_accumulate_grad_hook(partial(self._accumulated, name))

    def clear(self) -> None:
        """Before a step."""
        self._notes.clear()

    def blame(self, loss_finite: bool, group: Any) -> str:
        """Say for all ranks, in the same words on each, where numbers first were not finite. One gather of objects.

        Ranks run the same program, so the earliest note over all ranks is the origin. Where several have it together
        they share an exchange, whose carries travel to the right in forward and to the left in backward.
        """
        bad = torch.stack([bad for _, bad in self._notes]).tolist() if self._notes else []
        first = next((i for i, flag in enumerate(bad) if flag), None)
        first_note = None if first is None else (first, self._notes[first][0])
        if first_note is None and not loss_finite:
            first_note = (len(self._notes), "the loss")
        answers = all_gather_objects(first_note, group)
        noted = {rank: answer for rank, answer in enumerate(answers) if answer is not None}
        if not noted:
            return "on no rank alone: the sum of the ranks' gradients, or its norm, overflows"
        earliest = min(index for index, _ in noted.values())
        where = next(text for index, text in noted.values() if index == earliest)
        together = [rank for rank, (index, _) in noted.items() if index == earliest]
        origin = together[0] if where.startswith("the output") else together[-1]
        others = [str(rank) for rank in noted if rank != origin]
        return f"first on rank {origin} in {where}" + (f", then on rank(s) {', '.join(others)}" if others else "")

    def _after(self, name: str, layer: nn.Module, arguments: Any, output: Any) -> None:
        x = output[0] if isinstance(output, tuple) else output
        if isinstance(x, Tensor) and x.requires_grad:
            self._note(f"the output of {name}", x)
            x.register_hook(lambda gradient: self._note(f"the gradient at the output of {name}", gradient))

    def _accumulated(self, name: str, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._note(f"the gradient of {name}", parameter.grad)

    def _note(self, text: str, x: Tensor) -> None:
        x = x.detach()
        # one pass and no tensor of x's size; half precision would overflow in the sum
        total = x.sum(dtype=torch.float32) if x.element_size() < 4 else x.sum()
        self._notes.append((text, ~torch.isfinite(total)))


def layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Named parts of a model at the depth at which one would speak of them."""
    parts = []
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList):
            for number, element in child.named_children():
                inside = [(f"{name}.{number}.{part}", module) for part, module in element.named_children()]
                parts += inside or [(f"{name}.{number}", element)]
        else:
            parts.append((name, child))
    return parts
