"""How parameters begin: matrices from a normal distribution of a given deviation, gates from memories in tokens.

Modules of torch stay exactly ``nn.Linear`` and ``nn.Embedding``, which quantisation and adapters look for by type;
what differs is the instance's ``reset_parameters``, so that whoever resets every submodule gets the model's own
distribution.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hla_dist.functional.validate import require
from hla_dist.nn.gradient_reduction import is_dtensor


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


def check_memories(decay_range: Sequence[float]) -> None:
    """ValueError unless ``decay_biases`` can take it: two memories in tokens, the shorter first."""
    rising = len(decay_range) == 2 and 0 < decay_range[0] <= decay_range[1] < math.inf
    require(rising, "decay_range", "0 < shortest <= longest memory in tokens", decay_range)


def decay_biases(count: int, memories: Sequence[float], temperature: float = 1.0) -> Tensor:
    """``b_h`` [count] with ``log_sigmoid(b_h) / temperature = -1 / tau_h``: tau from the first memory to the last, in
    equal ratios.
    """
    shortest, longest = (math.log(tau) for tau in memories)
    steps = max(count - 1, 1)
    rates = [temperature * math.exp(-(shortest + (longest - shortest) * h / steps)) for h in range(count)]
    return torch.tensor([-math.log(math.expm1(rate)) for rate in rates])  # softplus(-b) = rate


@torch.no_grad()
def assign(parameter: Tensor, values: Tensor) -> None:
    """Overwrite ``parameter`` with ``values`` of its shape; a DTensor with its part of them.

    A DTensor was made on the meta device and sharded before it had numbers.
    """
    if is_dtensor(parameter):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(parameter, DTensor)
        values = distribute_tensor(values.to(parameter.device), parameter.device_mesh, parameter.placements)
    parameter.copy_(values)
