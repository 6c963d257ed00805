"""What torch can do to a function and the operators cannot follow is refused by name, before anything is computed.

Derivatives are closed forms behind one ``autograd.Function``: first order, right to left. ``torch.func`` transforms and
forward-mode differentiation would need other rules, and end otherwise in an error that speaks of ``setup_context``.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hla_dist.functional.validate import refuse

_INSTEAD = {
    "vmap": "a call outside of it, with the mapped dimension in the batch dimension B of the inputs",
    "grad": "a call outside of it (torch.autograd.grad and backward() give every first derivative)",
    "jvp": "a call outside of it (there are derivatives in reverse mode only: torch.autograd.grad, backward())",
}


def refuse_transforms(name: str, *inputs: Any) -> None:
    """Raise ValueError inside a ``torch.func`` transform, and for tensors that carry forward-mode tangents."""
    if torch.compiler.is_compiling():
        return
    if torch._C._are_functorch_transforms_active():
        kind = torch._C._functorch.peek_interpreter_stack().key().name.lower()
        refuse(f"torch.func.{kind}", _INSTEAD.get(kind, "a call outside of it"), f"{name} inside")
    flat = [x for given in inputs for x in (given if isinstance(given, tuple) else (given,))]  # a state is a tuple
    for x in flat:
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            refuse("torch.autograd.forward_ad", _INSTEAD["jvp"], f"a dual tensor for {name}")


def no_second_derivative(ctx: Any, *gradients: Any) -> NoReturn:
    """The backward of every custom op: reached only by differentiating a gradient, or an op called by itself."""
    raise NotImplementedError(
        "hla_dist: second derivatives are not implemented (a gradient made with create_graph=True was differentiated), "
        "and stages have no derivatives of their own; mask='full' on one device, and hla_dist.reference, have both"
    )
