"""Oracles: the operators written for the eye, not for the clock. They import torch and nothing of the fast paths.

``serial`` steps the streaming recurrences token by token; ``quadratic`` builds the masked T x T matrices. The two share
how arguments are read (``arguments.py``) and nothing else, so that each checks the other. Both are plain torch:
autograd through them is the oracle for gradients. ``paper_third_order`` is no oracle but the paper's own third-order
streaming kernel, for comparison.
"""

from .quadratic import quadratic
from .serial import serial
from .third_order import paper_third_order

__all__ = ["paper_third_order", "quadratic", "serial"]
