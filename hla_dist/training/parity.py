"""Does a sharded step equal the step of one process? Loss and every parameter gradient, compared.

All ranks compute the gradients of one batch as training does; rank 0 then computes the same batch alone, with an
unsharded copy of the model, and compares. In float64, where a difference is a mistake and not rounding, this decides;
float32 is compared too and shown beside what float32 rounding alone does to one process's gradients: a token whose
query or output is close to zero before its normalisation amplifies the last bit by orders of magnitude.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hla_dist import SequenceParallelHLA
from hla_dist.data.packing import cu_seqlens_of
from hla_dist.data.windows import Mixture, Windows
from hla_dist.models import LanguageModel
from hla_dist.operators.precision import sum_dtype
from hla_dist.parallel.collectives import all_gather_objects, all_reduce_sum, group_size
from hla_dist.processes.mesh import MeshPlace
from hla_dist.training.fully_sharded import twin_in, whole
from hla_dist.training.loop import gradient_norm, micro_batch_loss

LIMIT = 1e-5


@dataclass(frozen=True)
class Measured:
    """Loss, and gradients by parameter name, of one batch."""

    loss: float
    norm: float
    by_name: dict[str, Tensor]


@dataclass(frozen=True)
class Comparison:
    """Relative differences of two :class:`Measured` of the same batch."""

    loss: tuple[float, float]
    grad_norm: tuple[float, float]
    gradients: dict[str, float]  # by parameter: |one - other| / |other|

    @property
    def loss_difference(self) -> float:
        return abs(self.loss[0] - self.loss[1]) / abs(self.loss[1])

    @property
    def norm_difference(self) -> float:
        return abs(self.grad_norm[0] - self.grad_norm[1]) / self.grad_norm[1]

    @property
    def worst(self) -> tuple[str, float]:
        """The parameter whose gradients differ most."""
        return max(self.gradients.items(), key=lambda item: item[1])

    def __str__(self) -> str:
        name, worst = self.worst
        return (
            f"loss {self.loss[0]:.6f} and {self.loss[1]:.6f} (relative difference {self.loss_difference:.1e}), "
            f"gradient norm {self.grad_norm[0]:.6f} and {self.grad_norm[1]:.6f} ({self.norm_difference:.1e}), largest "
            f"of {len(self.gradients)} parameter gradients {worst:.1e} ({name})"
        )


@dataclass(frozen=True)
class Parity:
    """One batch on all ranks against one process, in float64 and float32."""

    ranks: int
    float64: Comparison
    float32: Comparison
    rounding: Comparison  # one process in float32 against one process in float64
    limit: float = LIMIT

    @property
    def ok(self) -> bool:
        """Whether everything is within the limit in float64; NaN is not."""
        differences = [self.float64.loss_difference, self.float64.norm_difference, *self.float64.gradients.values()]
        return all(difference <= self.limit for difference in differences)

    def lines(self) -> list[str]:
        """The parity line, and one on float32."""
        rounding = self.rounding
        return [
            f"parity of {self.ranks} rank(s) with 1 process in float64: {self.float64}, limit {self.limit:.0e}: "
            + ("ok" if self.ok else "FAILED"),
            f"    in float32: {self.float32}; for comparison, float32 rounding on one process: loss "
            f"{rounding.loss_difference:.1e}, gradient norm {rounding.norm_difference:.1e}, parameter gradients up to "
            f"{rounding.worst[1]:.1e}",
        ]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        values: dict[str, Any] = asdict(self) | {"ok": self.ok}
        for name in ("float64", "float32", "rounding"):
            part: Comparison = getattr(self, name)
            values[name] |= {"loss_difference": part.loss_difference, "norm_difference": part.norm_difference}
        return values


def check_parity(
    model: nn.Module, alone: LanguageModel | None, windows: Windows | Mixture, first: int, mesh: MeshPlace
) -> Parity:
    """Compare samples ``first ...``, one per replica, on all ranks with ``alone`` on rank 0.

    ``alone`` is an unsharded copy of the model, needed on rank 0 only. Every rank returns the same report; the model's
    gradients are cleared, its parameters keep their bits. Communication: two training steps', and one gather of
    objects.
    """
    numbers = [first + replica for replica in range(mesh.replicas)]
    tokens = [windows.batch(number, 1).to(mesh.device) for number in numbers]
    cuts = [windows.cuts(number) for number in numbers]
    labels = windows.labels(first, mesh.replicas)
    sharded, single = [], []
    for dtype in (torch.float64, torch.float32):
        with computing_in(dtype, model, mesh) as model_in_dtype:
            own = (tokens[mesh.replica], cuts[mesh.replica])
            sharded.append(_gradients_of_all(model_in_dtype, *own, labels, mesh))
        if alone is not None:
            with computing_in(dtype, alone):
                single.append(_gradients_of_one(alone, tokens, cuts, labels))
    report = None
    if alone is not None:
        float64, float32 = (compare(one, other) for one, other in zip(sharded, single, strict=True))
        report = Parity(group_size(mesh.world), float64, float32, rounding=compare(single[1], single[0]))
    return all_gather_objects(report, mesh.world)[0]


@contextmanager
def computing_in(dtype: torch.dtype, model: nn.Module, mesh: MeshPlace | None = None) -> Iterator[nn.Module]:
    """The model with parameters in ``dtype`` inside; afterwards as they were, without gradients.

    Where they are sharded, a sharded copy.
    """
    before = next(model.parameters()).dtype
    model.zero_grad(set_to_none=True)
    sharded = mesh is not None and (mesh.parameters or mesh.experts) is not None
    if mesh is not None and sharded and isinstance(model, SequenceParallelHLA):
        yield twin_in(dtype, model, mesh)
        return
    model.to(dtype)
    try:
        yield model
    finally:
        model.zero_grad(set_to_none=True)
        model.to(before)


def compare(one: Measured, other: Measured) -> Comparison:
    """Relative differences, those of ``other`` as the truth."""
    gradients = {name: relative_difference(one.by_name[name], other.by_name[name]) for name in other.by_name}
    return Comparison((one.loss, other.loss), (one.norm, other.norm), gradients)


def relative_difference(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| in float64; two zero tensors do not differ."""
    difference = torch.linalg.vector_norm(got.double() - want.double())
    size = torch.linalg.vector_norm(want.double())
    return 0.0 if float(difference) == 0.0 else float(difference / size) if float(size) > 0 else float("inf")


def _gradients_of_all(model: nn.Module, sample: Tensor, cuts: Tensor | None, labels: int, mesh: MeshPlace) -> Measured:
    share = micro_batch_loss(model, sample, mesh, labels, cuts=cuts)
    share.backward()
    loss = share.detach().double()
    all_reduce_sum(loss, mesh.world)
    return _collected(model, float(loss))


def _gradients_of_one(alone: LanguageModel, tokens: list[Tensor], cuts: list[Tensor | None], labels: int) -> Measured:
    """Documents are read one by one here, so packing is compared too."""
    loss = 0.0
    for sample, inside in zip(tokens, cuts, strict=True):
        part = torch.zeros((), dtype=next(alone.parameters()).dtype, device=sample.device)
        for document in sample[0].tensor_split(inside) if inside is not None else sample:
            if len(document) > 1:
                logits = alone(document[None, :-1])[0]
                logits = logits.to(sum_dtype(logits.dtype))
                part = part + F.cross_entropy(logits, document[1:], reduction="sum") / max(labels, 1)
        if alone.config.experts:  # their balance is that of the whole sequence; labels that do not count leave it alone
            inputs = sample[:, :-1]
            cuts_of = None if inside is None else cu_seqlens_of(inside.to(inputs.device), inputs.shape[1])
            part = part + alone(inputs, None, cuts_of, labels=torch.full_like(inputs, -100)) / max(labels, 1)
        part.backward()
        loss += float(part.detach())
    return _collected(alone, loss)


def _collected(model: nn.Module, loss: float) -> Measured:
    norm = float(gradient_norm(model.parameters()))
    zero = {name: whole(torch.zeros_like(p) if p.grad is None else p.grad) for name, p in model.named_parameters()}
    return Measured(loss, norm, {name: grad.clone() for name, grad in zero.items()})
