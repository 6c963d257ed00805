"""Faults on purpose: the seam through which tests break a run. No run without faults ever comes here.

A fault is ``KIND:rank=R,step=N`` with, where needed, ``at=NAME`` (a layer or parameter) and ``restart=K`` (only in the
K-th life of the job, 0 the first, which is the default); several are separated by blanks. ``step`` counts from 1.

    kill             SIGKILL to itself before the step          kill-backward    in the middle of its backward
    kill-writing     while step N's checkpoint is written       kill-finishing   all written, not yet renamed
    term             SIGTERM to itself before the step          hang             sleeps before the step, forever
    nan-output       NaN in the output of layer ``at``          nan-gradient     NaN in the gradient of parameter ``at``
    flip             changes a bit of the first number of parameter ``at`` before the step: the mantissa's first, since
                     the step's rounding may take the last one back
"""

import os
import re
import signal
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hla_dist.processes.failure import UserError

KINDS = "kill kill-backward kill-writing kill-finishing term hang nan-output nan-gradient flip".split()


@dataclass(frozen=True)
class Fault:
    """One fault; ``at`` names a layer or parameter, ``restart`` is the life of the job."""

    kind: str
    rank: int
    step: int
    at: str = ""
    restart: int = 0


class Faults:
    """Those faults of a list that are this rank's, in this life of the job."""

    def __init__(self, text: str = "", rank: int = 0, restart: int = 0) -> None:
        everything = [parse_fault(part) for part in text.split()]
        self.own = [fault for fault in everything if (fault.rank, fault.restart) == (rank, restart)]
        self._hooks: list[Any] = []

    def before(self, step: int, model: nn.Module) -> None:
        """Just before ``step`` is computed; hooks of the step before are taken off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for fault in (fault for fault in self.own if fault.step == step):
            self._strike(fault, model)

    def saving(self, moment: str, step: int) -> None:
        """Called by the thread that writes a checkpoint."""
        if any((fault.kind, fault.step) == (f"kill-{moment}", step) for fault in self.own):
            kill()

    def _strike(self, fault: Fault, model: nn.Module) -> None:
        if fault.kind == "kill":
            kill()
        elif fault.kind == "kill-backward":
            middle = list(model.parameters())[len(list(model.parameters())) // 2]
            self._hooks.append(middle.register_hook(lambda _: kill()))
        elif fault.kind == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        elif fault.kind == "hang":
            while True:
                time.sleep(1)
        elif fault.kind == "nan-output":
            layer = model.get_submodule(fault.at)
            self._hooks.append(layer.register_forward_hook(lambda *arguments: _poisoned(arguments[2]), prepend=True))
        elif fault.kind == "nan-gradient":
            self._hooks.append(model.get_parameter(fault.at).register_hook(lambda gradient: gradient * float("nan")))
        elif fault.kind == "flip":
            bits = model.get_parameter(fault.at).detach().view(-1).view(torch.int32)
            bits[0] ^= 1 << 22


def kill() -> None:
    """As the kernel does when memory runs out: no handler, no clean-up."""
    os.kill(os.getpid(), signal.SIGKILL)


def parse_fault(text: str) -> Fault:
    """One fault; UserError if it is none."""
    kind, _, rest = text.partition(":")
    values = dict(
        part.split("=", 1) for part in rest.split(",") if re.fullmatch(r"(rank|step|restart)=\d+|at=.+", part)
    )
    if kind not in KINDS or not {"rank", "step"} <= values.keys() or len(values) != len(rest.split(",")):
        raise UserError(
            f"HLA_FAULTS: expected KIND:rank=R,step=N[,at=NAME][,restart=K] with KIND one of {', '.join(KINDS)}, "
            f"got {text!r}"
        )
    numbers = {name: int(values[name]) for name in ("rank", "step", "restart") if name in values}
    return Fault(kind, at=values.get("at", ""), **numbers)


def _poisoned(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output * float("nan")
    return (output[0] * float("nan"), *output[1:])
