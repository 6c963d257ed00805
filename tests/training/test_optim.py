"""The optimiser's groups and the learning rate's course."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hla_dist.training.optim import build_adamw, lr_factor


def test_matrices_decay_and_vectors_do_not() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4))
    optimizer = build_adamw(model, 1e-3, 0.1)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {id(model[0].weight): 0.1, id(model[0].bias): 0.0, id(model[1].weight): 0.0}


def test_learning_rate_rises_then_follows_a_cosine_to_its_floor() -> None:
    assert [lr_factor(step, 4, 0.0, 0.1) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert lr_factor(4, 4, 0.0, 0.1) == 1.0
    assert lr_factor(50, 4, 0.5, 0.1) == pytest.approx(0.55)
    assert lr_factor(99, 4, 1.0, 0.1) == pytest.approx(0.1)
    assert lr_factor(99, 4, 1.7, 0.1) == pytest.approx(0.1)  # over time: no second rise
    factors = torch.tensor([lr_factor(9, 4, i / 20, 0.0) for i in range(21)])
    assert bool((factors.diff() < 0).all())
