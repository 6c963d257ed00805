"""Modules of torch that initialise themselves from a normal distribution of a given deviation.

They stay exactly ``nn.Linear`` and ``nn.Embedding``, which quantisation and adapters look for by type; what differs is
the instance's ``reset_parameters``, so that whoever resets every submodule gets the model's own distribution.
"""

from functools import partial
from typing import Any

import torch
from torch import nn


def normal_on_reset(module: nn.Module, std: float) -> None:
    """Make ``module.reset_parameters()`` draw its weight with deviation ``std``; nothing is drawn now."""
    # holds the dict of parameters, not the module: copies and pickles keep the two together, and there is no cycle
    module.__dict__["reset_parameters"] = partial(_normal, module._parameters, std)


def normal_linear(in_features: int, out_features: int, std: float, bias: bool = False, **factory: Any) -> nn.Linear:
    """Return a linear map whose weight is drawn with deviation ``std``, now and on reset; a bias begins as zeros."""
    weight = nn.Parameter(torch.empty(out_features, in_features, **factory))
    linear = nn.Linear(in_features, out_features, bias=False, device="meta")  # draws nothing
    linear.weight = weight
    if bias:
        linear.bias = nn.Parameter(torch.empty(out_features, **factory))
    normal_on_reset(linear, std)
    linear.reset_parameters()
    return linear


def _normal(parameters: dict[str, Any], std: float) -> None:
    nn.init.normal_(parameters["weight"], std=std)
    if parameters.get("bias") is not None:
        nn.init.zeros_(parameters["bias"])
