"""What the benchmarks have in common: their command lines, and matplotlib without a screen."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from hla_dist.training.metrics import pyplot as pyplot
from hla_dist.training.metrics import save_figure as save_figure

KEEP_MEMORY = (True, "the allocator keeps freed memory, for all alike; --no-keep-memory: glibc's own ways")


def begin(about: str, quick: str, small: dict[str, Any], **flags: tuple[Any, ...]) -> argparse.Namespace:
    """A benchmark's options from the command line, with --check, --quick and --out, which all have.

    With them are ``theme``, the program's name, and ``about``, what a report says of the run. An option ``keep_memory``
    restarts the program, ``threads`` are torch's.

    Args:
        about: The program's docstring.
        quick: What --quick does, in words.
        small: The options that --quick sets.
        flags: Of each option the default, the help and, if there are, the choices. A default that is a list takes
            several values, True or False a ``--no-`` as well; numbers are at least 1, or above 0.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (default, text, *choices) in flags.items():
        kind, how = type(default), {}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif kind is list:
            how = {"nargs": "+", "type": type(default[0])}
        else:
            how = {"type": kind, "choices": choices or None}
        text = f"{text} (default: {' '.join(map(str, default)) if kind is list else default})"
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, help=text, **how)
    parser.add_argument("--check", action="store_true", help="exit code 1 if a target is missed")
    parser.add_argument("--quick", action="store_true", help=f"a smoke run: {quick}")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where the report goes (default: benchmarks/results, or out/benchmarks)"
    )
    args = parser.parse_args()
    if args.quick:
        vars(args).update(small)
    for name in flags:
        value = getattr(args, name)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, (int, float)) and number <= 0 and not isinstance(number, bool):
                parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {number}")
    args.out = args.out or (report.QUICK_RESULTS if args.quick else report.RESULTS)
    if "keep_memory" in flags:
        report.keep_memory(args.keep_memory)
    if "threads" in flags:
        torch.set_num_threads(args.threads)
    script = Path(os.path.relpath(sys.argv[0], report.ROOT))  # no path of the machine
    args.theme, args.about = script.stem, report.context(str(script), torch.get_num_threads())
    return args
