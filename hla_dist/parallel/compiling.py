"""What torch.compile is told of a function, without importing the compiler: that is half of the time torch takes."""

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable[..., object])


def assume_constant_result(fn: Function) -> Function:
    """``torch.compiler.assume_constant_result``, which imports torch._dynamo first and then sets this mark."""
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn
