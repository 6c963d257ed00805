"""Writes a trained model into one safetensors file to pass on; see --help.

python launch/export.py --checkpoint out/train --to model.safetensors
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

with contextlib.suppress(ImportError):  # an installed package needs no path
    import hla_dist  # noqa: F401
sys.path.append(str(Path(__file__).resolve().parent.parent))

from hla_dist.checkpoints.export import export, load_trained
from hla_dist.processes.failure import UserError, describe
from hla_dist.training.config import Parser


def main() -> int:
    parser = Parser(
        prog="launch/export.py", description="Write a trained model into one safetensors file.", allow_abbrev=False
    )
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a checkpoint, or the --out of a run")
    parser.add_argument("--to", required=True, metavar="FILE", help="the file to write, ending in .safetensors")
    try:
        options = parser.parse_args()
        if not options.to.endswith(".safetensors"):
            raise UserError(f"--to: expected a name ending in .safetensors, got {options.to}")
        trained = load_trained(Path(options.checkpoint))
        export(trained, Path(options.to))
    except (UserError, ValueError, OSError, RuntimeError) as exc:
        print(f"export.py: error: {describe(exc)}", file=sys.stderr)
        return 1
    for line in trained.warnings:
        print(f"export.py: warning: {line}", file=sys.stderr)
    print(f"{options.to}: the model of step {trained.step}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
