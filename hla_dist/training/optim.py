"""AdamW with two groups, and the learning rate's course: linear warm-up, then a cosine."""

import math

import torch
from torch import nn

from hla_dist.training.fully_sharded import alike


def build_adamw(
    model: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.95)
) -> torch.optim.AdamW:
    """AdamW; matrices decay, vectors (norms, gates, biases) do not, nor do parameters marked ``_no_weight_decay``."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in model.parameters():
        keep = parameter.dim() < 2 or getattr(parameter, "_no_weight_decay", False)
        (vectors if keep else matrices).append(parameter)
    groups = [{"params": part, "weight_decay": weight_decay} for part in alike(matrices)]
    groups += [{"params": part, "weight_decay": 0.0} for part in alike(vectors)]
    # fused: one pass over each parameter; on a CPU with small parameters three times as fast as the default
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-8, fused=True)


def lr_factor(step: int, warmup: int, progress: float, floor: float) -> float:
    """Learning rate over its peak, for the step about to be taken (0 the first).

        step < warmup:   (step + 1) / warmup
        after:           floor + (1 - floor) (1 + cos(pi progress)) / 2

    ``progress`` in [0, 1] is the share of training that is over: by steps or, under a time budget, by time.
    """
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
