"""Writes a trained model into one safetensors file to pass on; see --help.

python launch/export.py --checkpoint out/train --to model.safetensors
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.append(str(Path(__file__).resolve().parent.parent))  # last: an installed package comes first

from tyro.conf import arg

from hla_dist.checkpoints.export import export, load_trained
from hla_dist.processes.failure import expect
from hla_dist.processes.program import Program


@dataclass
class ExportConfig:
    """What is written, and where."""

    checkpoint: Annotated[str, arg(metavar="DIR")]  # a checkpoint, or the --out of a run
    to: Annotated[str, arg(metavar="FILE")]  # the file to write, ending in .safetensors

    def __post_init__(self) -> None:
        expect(self.to.endswith(".safetensors"), "--to", "a name ending in .safetensors", self.to)


def main() -> int:
    return Program("export.py", "Write a trained model into one safetensors file.").run(write)


def write(program: Program) -> int:
    config = program.options(ExportConfig)
    trained = load_trained(Path(config.checkpoint))
    export(trained, Path(config.to))
    for line in trained.warnings:
        program.say(f"warning: {line}")
    print(f"{config.to}: the model of step {trained.step}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
