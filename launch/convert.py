"""Converts a pretrained softmax model into one of this library; see --help.

    python launch/convert.py --from SmolLM2-135M-Instruct --recipe lolcats --data TEXT --out out/converted
    torchrun --standalone --nproc_per_node 4 launch/convert.py ...       layers, then each row, shared by the ranks
    python launch/generate.py --checkpoint out/converted/model --prompt "The capital of France is"

All ranks belong to the one sequence: there is no --sp. A conversion that was stopped goes on with the next layer.
Exit codes: 0; 1 an error, said in one line; 130 stopped by Ctrl-C.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))  # last: an installed package comes first

import torch.distributed as dist

from hla_dist.processes.failure import UserError
from hla_dist.processes.program import Program


def main() -> int:
    return Program("convert.py", "Convert a pretrained softmax model into one of this library.").run(convert)


def convert(program: Program) -> int:
    try:
        from hla_dist.convert.run import Conversion, ConvertConfig
    except ImportError as exc:
        raise UserError(str(exc)) from exc
    config = program.options(ConvertConfig)
    device = program.device(config.machine.device)
    program.share_cores(config.machine.threads)
    group: Any = None
    if program.ranks.world_size > 1:
        program.connect(device, config.machine.timeout)
        group = dist.group.WORLD
    Conversion(config, device, group, program.say).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
