"""One optimiser step, and the evaluation: what every rank does, and what they agree on.

Letters: B samples per micro-batch, T tokens of a shard, N vocabulary.
"""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hla_dist import SequenceParallelHLA, shard_batch, validation
from hla_dist.data.packing import cu_seqlens_of, cuts_between, inside_documents
from hla_dist.data.windows import Mixture, Windows, cut
from hla_dist.parallel.collectives import all_reduce_sum
from hla_dist.processes.mesh import MeshPlace
from hla_dist.training.fully_sharded import alike, whole
from hla_dist.training.offload import SavedOnHost
from hla_dist.training.watch import Watch


@dataclass(frozen=True)
class Agreed:
    """What the ranks agree on before a step."""

    loss: float  # nats per token, over all ranks
    grad_norm: float
    finite: bool  # on every rank: else none of them steps
    stop: bool  # some rank was asked to stop
    clock: float  # rank 0's reading of the time budget, 0 .. 1
    blame: str = ""  # where numbers that are not finite came from


@dataclass(eq=False)
class Trainer:
    """Gradients of a step over a mesh, and the step.

    The loss is each shard's sum of cross-entropies over the number of labels in the whole step, and ``model`` sums
    gradients over all ranks (its ``gradient_group`` is the world): loss and gradients do not depend on how many ranks
    there are. Communication of a step: what the attention layers send, one all-reduce of the gradients, one of four
    numbers. With parameters that FSDP2 has sharded, in place of the all-reduce its gathers of parameters and its
    reduction of gradients, both for every micro-batch: gradients are never kept whole.
    """

    model: SequenceParallelHLA
    optimizer: torch.optim.Optimizer
    windows: Windows | Mixture
    mesh: MeshPlace
    batch_size: int
    accumulate: int
    clip: float
    bf16: bool
    offload: bool = False  # what forward saves waits in host memory
    data_seconds: float = 0.0  # spent on reading tokens so far
    samples: int = 0  # the position in the data: windows of this length before the next one, over all replicas
    tokens: int = 0  # trained on so far, at any length

    def __post_init__(self) -> None:
        self.watch = Watch(self.model.module)

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.accumulate * self.mesh.replicas * self.windows.seq_len

    def compute_gradients(self, stop: bool = False, clock: float = 0.0) -> Agreed:
        """Forward and backward of the next samples; afterwards ``.grad`` is the whole step's on every rank."""
        self.optimizer.zero_grad(set_to_none=True)
        self.watch.clear()
        # of the whole step, as every rank knows without a word
        labels = self.windows.labels(self.samples, self.batch_size * self.accumulate * self.mesh.replicas)
        shares = []
        for micro in range(self.accumulate):
            first = self.samples + (micro * self.mesh.replicas + self.mesh.replica) * self.batch_size
            began = time.monotonic()
            tokens = self.windows.batch(first, self.batch_size).to(self.mesh.device)
            self.data_seconds += time.monotonic() - began
            last = micro == self.accumulate - 1
            # NaN passes to the end of the step, where every rank learns of it
            with nullcontext() if last else self.model.no_sync(), validation(False, cpu=False):
                with SavedOnHost() if self.offload else nullcontext():  # not backward, which may compute again
                    cuts = self.windows.cuts(first)
                    share = micro_batch_loss(self.model, tokens, self.mesh, labels, self.bf16, cuts)
                share.backward()
            shares.append(share.detach())
        self.samples += self.batch_size * self.accumulate * self.mesh.replicas
        self.tokens += self.tokens_per_step
        norm = float(gradient_norm(self.model.parameters()))
        return self._agree(float(torch.stack(shares).sum()), norm, stop, clock)

    def _agree(self, loss: float, norm: float, stop: bool, clock: float) -> Agreed:
        # The norm is that of summed gradients, the same on every rank; that each finds it finite is part of the sum.
        unfit = not (math.isfinite(loss) and math.isfinite(norm))
        numbers = [loss, float(unfit), float(stop), clock if self.mesh.rank == 0 else 0.0]
        summed = torch.tensor(numbers, dtype=torch.float64, device=self.mesh.device)
        all_reduce_sum(summed, self.mesh.world)
        own_finite = math.isfinite(loss)
        loss, unfits, stops, clock = summed.tolist()
        blame = self.watch.blame(own_finite, self.mesh.world) if unfits else ""
        return Agreed(loss, norm, unfits == 0, stops > 0, clock, blame)

    def step(self, agreed: Agreed, lr: float) -> bool:
        """Clip to a global norm and step; leave everything as it is where loss or norm are not finite."""
        if not agreed.finite:
            return False
        scale = min(1.0, self.clip / (agreed.grad_norm + 1e-6)) if self.clip else 1.0
        if scale < 1.0:
            for part in alike(p.grad for p in self.model.parameters() if p.grad is not None):
                torch._foreach_mul_(part, scale)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        return True

    @torch.no_grad()
    def evaluate(
        self, tokens: Any, starts: list[int], documents: Any = None, stop: Callable[[], bool] = lambda: False
    ) -> float | None:
        """Mean loss in nats per label over the windows at ``starts``, shared out among the replicas.

        With ``documents``, the first tokens of documents in ``tokens``, these are read apart, as in training. None on
        every rank as soon as ``stop()`` is true on one: it is asked before every batch. Communication: the attention
        layers', an all-reduce of a number before every batch, and one of two numbers.
        """
        self.model.eval()
        total = torch.zeros(2, dtype=torch.float64)  # sum of losses, tokens
        own_starts = starts[self.mesh.replica :: self.mesh.replicas]
        # Replicas without a window in the last round take one that does not count: with FSDP2 a forward is everybody's.
        windows = own_starts + starts[: -(-len(starts) // self.mesh.replicas) - len(own_starts)]
        for begin in range(0, len(windows), self.batch_size):
            stops = torch.tensor(float(stop()), device=self.mesh.device)
            all_reduce_sum(stops, self.mesh.world)
            if stops > 0:
                self.model.train()
                return None
            cuts = [
                cut(tokens, start, self.windows.seq_len, self.windows.vocab_size)
                for start in windows[begin : begin + self.batch_size]
            ]
            inside = None
            if documents is not None:
                inside = cuts_between(documents, windows[begin], self.windows.seq_len)
            inputs, labels, cu_seqlens = model_inputs(torch.stack(cuts), self.mesh, inside)
            labels = labels.clone()
            labels[max(len(own_starts) - begin, 0) :] = -100
            with autocast(self.mesh.device, self.bf16):
                losses = self.model(inputs, None, cu_seqlens, labels=labels)
            total += torch.tensor([float(losses), float((labels != -100).sum())], dtype=torch.float64)
        total = total.to(self.mesh.device)
        all_reduce_sum(total, self.mesh.world)
        self.model.train()
        return float(total[0] / total[1])


def micro_batch_loss(
    model: nn.Module, tokens: Tensor, mesh: MeshPlace, labels: int, bf16: bool = False, cuts: Tensor | None = None
) -> Tensor:
    """This rank's share of a mean loss: of ``tokens`` [B, seq_len + 1], the same on every rank of a sequence group.

    ``labels`` is how many labels the mean is over: those of all shards, replicas and micro-batches. ``cuts``: where
    documents begin inside the one sequence of ``tokens`` (``packing.py``).
    """
    inputs, wanted, cu_seqlens = model_inputs(tokens, mesh, cuts)
    with autocast(mesh.device, bf16):
        return model(inputs, None, cu_seqlens, labels=wanted) / max(labels, 1)


def model_inputs(tokens: Tensor, mesh: MeshPlace, cuts: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """This rank's inputs and labels of ``tokens`` [B, T + 1], and with cuts the whole sequence's ``cu_seqlens``."""
    batch = shard_batch(tokens.to(mesh.device), mesh.sequence)
    if cuts is None:
        return batch.inputs, batch.labels, None
    cuts = cuts.to(mesh.device)
    labels = inside_documents(batch.labels, batch.positions, cuts)
    return batch.inputs, labels, cu_seqlens_of(cuts, tokens.shape[1] - 1)


def gradient_norm(parameters: Any) -> Tensor:
    """Global 2-norm of all gradients; the same bits on every rank where the gradients are, or their shards add up."""
    parts = alike(p.grad for p in parameters if p.grad is not None)
    norms = [whole(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(part)))) for part in parts]
    return torch.linalg.vector_norm(torch.stack(norms))


def autocast(device: torch.device, bf16: bool) -> Any:
    """bfloat16 matrix products where asked for; parameters, state and reductions stay float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if bf16 else nullcontext()
