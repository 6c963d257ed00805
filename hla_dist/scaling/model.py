"""The model's rows: a whole training step (forward, backward, optimiser) over a group, and its loss against float64.

The loss in float64 needs no second run of that size: rank after rank streams its shard through a float64 copy of the
model in short pieces, from the true states of the rank before it, without gradients. (That gradients are exact for
every number of ranks and every policy is for the tests, in float64; launch/train.py compares them on request.)
"""

import copy

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from hla_dist import SequenceParallelHLA, shard_batch
from hla_dist.data.windows import Windows
from hla_dist.models import LanguageModel, ModelConfig
from hla_dist.parallel.collectives import group_rank, group_size
from hla_dist.processes.mesh import MeshPlace
from hla_dist.scaling.config import ScalingConfig
from hla_dist.scaling.measure import Clock, Sample, from_rank, measure
from hla_dist.training.loop import Trainer
from hla_dist.training.optim import build_adamw

PIECE = 4096  # tokens at a time in float64


class ModelCase:
    """One rank's part of training on random tokens, as launch/train.py does it."""

    def __init__(self, config: ScalingConfig, group: dist.ProcessGroup, tokens: int, device: torch.device) -> None:
        self.group, self.device, self.rank = group, device, group_rank(group)
        mesh = MeshPlace(group, group, self.rank, 0, 1, device)
        torch.manual_seed(config.seed)
        attention = {"exchange": config.exchange}
        model = LanguageModel(
            ModelConfig(
                config.vocab_size, config.hidden_size, config.layers, config.heads, op=config.op, attention=attention
            )
        ).to(device)
        model.activation_checkpointing = config.checkpoint_activations
        self.start = copy.deepcopy(model)
        self.first: float | None = None
        wrapped = SequenceParallelHLA(model, group)
        kind = np.uint8 if config.vocab_size <= 256 else np.uint32
        text = np.random.default_rng(config.seed).integers(config.vocab_size, size=tokens + 1, dtype=kind)
        self.windows = Windows(text, tokens, config.vocab_size, config.seed)
        optimizer = build_adamw(wrapped, 1e-3, 0.1)
        self.trainer = Trainer(
            wrapped, optimizer, self.windows, mesh, batch_size=1, accumulate=1, clip=1.0, bf16=False
        )  # fmt: skip
        self.parameters = sum(p.numel() for p in model.parameters())

    def call(self, clock: Clock) -> float:
        """A step; the loss before it."""
        hook = self.trainer.model.register_forward_hook(lambda *_: clock.forward_ended())
        try:
            agreed = self.trainer.compute_gradients()
        finally:
            hook.remove()
        self.trainer.step(agreed, 1e-3)
        return agreed.loss

    def run(self) -> tuple[float, Sample]:
        """The loss of the first step, and this rank's figures of this one."""
        loss, sample = measure(self.call, self.group, self.device)
        self.first = loss if self.first is None else self.first
        return self.first, sample

    @torch.no_grad()
    def errors(self, loss: float) -> dict[str, float]:
        """The relative error of the first step's loss."""
        model = self.start.double().eval()
        batch = shard_batch(self.windows.batch(0, 1).to(self.device), self.group)
        total = torch.zeros(1, dtype=torch.float64, device=self.device)
        _, states = model(batch.inputs[:, :1], return_state=True)  # their types and shapes
        tensors, form = tree_flatten(states)
        arriving: list[Tensor] | None = None
        for turn in range(group_size(self.group)):
            if turn == self.rank:
                states = None if arriving is None else tree_unflatten(arriving, form)
                for inputs, labels in zip(batch.inputs.split(PIECE, 1), batch.labels.split(PIECE, 1), strict=True):
                    losses, states = model(inputs, states, labels=labels, return_state=True)
                    total += losses
                tensors = tree_flatten(states)[0]
            passed = from_rank(turn, [total, *tensors], self.group)
            if turn + 1 == self.rank or turn + 1 == group_size(self.group):
                total, *arriving = passed
        want = float(total) / self.windows.seq_len
        return {"loss": abs(loss - want) / want}
