"""An executor of the PTX that Triton writes for NVIDIA's sm_80 and sm_90: see README.md."""

from .memory import Fault
from .parse import Unsupported
from .run import Emulator, emulate, launch

__all__ = ["Emulator", "Fault", "Unsupported", "emulate", "launch"]
