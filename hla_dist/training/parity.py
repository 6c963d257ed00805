"""Does a sharded step equal the step of one process? Loss and every parameter gradient, compared.

All ranks compute the gradients of one batch as training does; rank 0 then computes the same batch alone, with an
unsharded copy of the model, and compares.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hla_dist.models import LanguageModel
from hla_dist.parallel.collectives import all_gather_objects, all_reduce_sum, group_size
from hla_dist.training.data import Windows
from hla_dist.training.loop import gradient_norm, micro_batch_loss, wide
from hla_dist.training.mesh import Layout

LIMIT = 1e-5


@dataclass(frozen=True)
class Parity:
    """Relative differences between a batch on all ranks and the same batch on one process."""

    ranks: int
    loss: float
    loss_alone: float
    grad_norm: float
    grad_norm_alone: float
    gradients: dict[str, float]  # by parameter: |sharded - alone| / |alone|
    limit: float = LIMIT

    @property
    def loss_difference(self) -> float:
        return abs(self.loss - self.loss_alone) / abs(self.loss_alone)

    @property
    def norm_difference(self) -> float:
        return abs(self.grad_norm - self.grad_norm_alone) / self.grad_norm_alone

    @property
    def worst(self) -> tuple[str, float]:
        """The parameter whose gradients differ most."""
        return max(self.gradients.items(), key=lambda item: item[1])

    @property
    def ok(self) -> bool:
        """Whether everything is within the limit; NaN is not."""
        differences = [self.loss_difference, self.norm_difference, *self.gradients.values()]
        return all(difference <= self.limit for difference in differences)

    def line(self) -> str:
        """The parity line."""
        name, worst = self.worst
        return (
            f"parity of {self.ranks} rank(s) with 1 process: loss {self.loss:.6f} and {self.loss_alone:.6f} "
            f"(relative difference {self.loss_difference:.1e}), gradient norm {self.grad_norm:.6f} and "
            f"{self.grad_norm_alone:.6f} ({self.norm_difference:.1e}), largest of {len(self.gradients)} parameter "
            f"gradients {worst:.1e} ({name}), limit {self.limit:.0e}: {'ok' if self.ok else 'FAILED'}"
        )

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok}


def check_parity(model: nn.Module, alone: LanguageModel | None, windows: Windows, first: int, layout: Layout) -> Parity:
    """Compares samples ``first ...``, one a replica, on all ranks with ``alone`` on rank 0; in the model's own dtype.

    ``alone`` is an unsharded copy of the model, needed on rank 0 only. Every rank returns the same report. Gradients
    of ``model`` are cleared. Communication: a training step's, and one gather of objects.
    """
    tokens = [windows.batch(first + replica, 1).to(layout.device) for replica in range(layout.replicas)]
    model.zero_grad(set_to_none=True)
    share = micro_batch_loss(model, tokens[layout.replica], layout, layout.replicas * windows.seq_len)
    share.backward()
    loss = share.detach().double()
    all_reduce_sum(loss, layout.world)
    norm = float(gradient_norm(model.parameters()))
    report = None
    if layout.rank == 0:
        assert alone is not None
        report = _compare(model, alone, tokens, float(loss), norm, group_size(layout.world))
    model.zero_grad(set_to_none=True)
    reports = all_gather_objects(report, layout.world)
    return reports[0]


def _compare(
    model: nn.Module, alone: LanguageModel, tokens: list[Tensor], loss: float, norm: float, ranks: int
) -> Parity:
    alone.zero_grad(set_to_none=True)
    loss_alone = 0.0
    for sample in tokens:
        logits = alone(sample[:, :-1])
        part = F.cross_entropy(wide(logits).flatten(0, 1), sample[:, 1:].flatten()) / len(tokens)
        part.backward()
        loss_alone += float(part.detach())
    gradients = {
        name: relative_difference(sharded.grad, single.grad)
        for (name, sharded), single in zip(model.named_parameters(), alone.parameters(), strict=True)
    }
    return Parity(ranks, loss, loss_alone, norm, float(gradient_norm(alone.parameters())), gradients)


def relative_difference(got: Tensor | None, want: Tensor | None) -> float:
    """|got - want| / |want| in float64; two missing or zero tensors do not differ."""
    if got is None or want is None:
        missing = want if got is None else got
        return 0.0 if missing is None or not bool(missing.any()) else float("inf")
    difference = torch.linalg.vector_norm(got.double() - want.double())
    size = torch.linalg.vector_norm(want.double())
    return 0.0 if float(difference) == 0.0 else float(difference / size) if float(size) > 0 else float("inf")
