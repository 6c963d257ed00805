"""Continues a text with a trained model, its state of constant size; see --help.

python launch/generate.py --checkpoint out/train --prompt "def main"
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

with contextlib.suppress(ImportError):  # an installed package needs no path
    import hla_dist  # noqa: F401
sys.path.append(str(Path(__file__).resolve().parent.parent))

from hla_dist.training.failure import UserError, describe
from hla_dist.training.generate import generate
from hla_dist.training.share import load_trained
from hla_dist.training.text import Codec


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="launch/generate.py",
        description="Continue a text with a trained model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="PATH",
        help="a checkpoint, the --out of a run, or a .safetensors file of launch/export.py",
    )
    parser.add_argument("--prompt", default="\n", metavar="TEXT", help="the text to continue")
    parser.add_argument("--tokens", type=int, default=500, metavar="N", help="tokens to generate")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="X", help="0: always the likeliest token")
    parser.add_argument("--top-k", type=int, default=40, metavar="N", help="draw from the likeliest N; 0: from all")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the draws")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu, cuda, cuda:1, ...")
    options = parser.parse_args()
    try:
        trained = load_trained(Path(options.checkpoint))
        for line in trained.warnings:
            print(f"generate.py: warning: {line}", file=sys.stderr)
        codec = Codec(trained.tokenizer, known=trained.known_text)
        tokens = generate(
            trained.model.to(options.device), codec.encode(options.prompt), options.tokens,
            temperature=options.temperature, top_k=options.top_k, seed=options.seed,
        )  # fmt: skip
    except (UserError, ValueError, OSError, RuntimeError) as exc:
        print(f"generate.py: error: {describe(exc)}", file=sys.stderr)
        return 1
    print(options.prompt + codec.decode(tokens))
    return 0


if __name__ == "__main__":
    sys.exit(main())
