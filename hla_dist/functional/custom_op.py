"""Register functions with torch's dispatcher, so that compilers, exports and checkpointing policies see them."""

from collections.abc import Callable
from typing import Any

import torch

from hla_dist.functional.validate import no_second_derivative


def custom_op(schema: str) -> Callable[[Callable[..., Any]], Any]:
    """Make the function below the op ``hla_dist::<its name>`` of this schema, on every device.

    The function changes no argument, and no result shares memory with one (``torch.library.opcheck`` holds it to that).
    ``torch.library.custom_op`` is not used: its first call imports torch._dynamo, which takes seconds, and each call of
    it costs more.
    """

    def register(function: Callable[..., Any]) -> Any:
        name = f"hla_dist::{function.__name__}"
        torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(name, "default", function)
        torch.library.register_autograd(name, no_second_derivative)
        return getattr(torch.ops.hla_dist, function.__name__).default

    return register


def fake_of(op: Any) -> Callable[[Callable[..., Any]], Any]:
    """Register the function below as what gives shapes and dtypes of the op's results."""
    return torch.library.register_fake(op.name())
