"""A core of the suite with the oldest and newest Python and torch at hand: make test-matrix.

Every pair has an environment of its own in out/matrix, made once. The tests' own packages are those of constraints.txt;
what torch depends on is torch's. Prints a row of a table for each pair, and fails if any of them fails.

Test files or options of pytest as arguments take the place of the core: make test-matrix ARGS="tests/laws -x".

    PYTHONS="python3.11 /usr/bin/python3.14"    other interpreters than the oldest and the newest found
    TORCHES="2.12 2.13"                         other versions than the oldest that pyproject.toml allows and the newest
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MATRIX = ROOT / "out" / "matrix"
OLDEST_PYTHON = 10
# what another Python or torch may change: autograd, custom ops, compilers, collectives, and arithmetic beside them
CORE = (
    "tests/laws", "tests/reference", "tests/operators/test_autograd.py", "tests/operators/test_bad_input.py",
    "tests/operators/test_streaming.py", "tests/operators/test_torch_native.py", "tests/nn/test_attention.py",
    "tests/nn/test_compile.py", "tests/nn/test_shard.py", "tests/parallel/test_collectives.py",
    "tests/parallel/test_covering.py", "tests/parallel/test_fake_world.py",
)  # fmt: skip
PACKAGES = ("einops", "expecttest", "hypothesis", "numpy", "pytest", "pytest-xdist", "simpy")
VERSIONS = "import sys, torch; print('%d.%d.%d' % sys.version_info[:3], torch.__version__)"


def interpreters() -> list[str]:
    """The oldest and the newest Python that work, from PATH or from pyenv."""
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = []
    for minor in range(OLDEST_PYTHON, OLDEST_PYTHON + 20):
        name = f"python3.{minor}"
        candidates = [shutil.which(name), *sorted(map(str, versions.glob(f"3.{minor}.*/bin/{name}")))]
        # a shim of pyenv is on PATH for versions that are not active, and then does not start
        works = [
            path for path in candidates if path and not subprocess.call([path, "-c", ""], stderr=subprocess.DEVNULL)
        ]
        found += works[:1]
    return [found[0], found[-1]] if len(found) > 1 else found


def torches() -> list[str]:
    """The oldest torch that pyproject.toml allows, and ``""`` for the newest that pip takes."""
    (oldest,) = re.findall(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    return [oldest, ""]


def install(python: str, torch: str, environment: Path) -> str:
    """Make the environment; what pip said last where it could not be made, else nothing."""
    constraints = MATRIX / "constraints.txt"
    pins = (ROOT / "constraints.txt").read_text().splitlines(keepends=True)
    constraints.write_text("".join(pin for pin in pins if pin.partition("==")[0] in PACKAGES))
    wanted = [f"torch=={torch}.*" if torch else "torch", *PACKAGES]
    stamp = environment / "installed"
    if stamp.exists() and stamp.read_text().split() == wanted:
        return ""
    pip = [str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet", "--constraint", str(constraints)]
    for command in ([python, "-m", "venv", "--clear", str(environment)], [*pip, *wanted]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return (done.stderr.strip().splitlines() or ["no message"])[-1]
    stamp.write_text(" ".join(wanted))
    return ""


def row(python: str, torch: str) -> tuple[bool, str]:
    """Whether the core passes with this pair, and its line of the table."""
    environment = MATRIX / f"{Path(python).name}-torch{torch or '-newest'}"
    problem = install(python, torch, environment)
    if problem:
        return False, f"| {Path(python).name} | {torch or 'newest'} | not installed: {problem} | |"
    program = str(environment / "bin" / "python")
    versions = subprocess.run([program, "-c", VERSIONS], capture_output=True, text=True, check=True).stdout.split()
    options = ["-q", "-m", "not slow", "--numprocesses", os.environ.get("WORKERS", "2"), "--dist", "loadfile"]
    began = time.monotonic()
    done = subprocess.run(
        [program, "-m", "pytest", *options, *(sys.argv[1:] or CORE)], cwd=ROOT, capture_output=True, text=True
    )
    (MATRIX / f"{environment.name}.txt").write_text(done.stdout + done.stderr)
    closing = done.stdout.strip().splitlines()[-1].strip("= ").partition(" in ")[0]
    return not done.returncode, f"| {' | '.join(versions)} | {closing} | {time.monotonic() - began:.0f} |"


def main() -> int:
    MATRIX.mkdir(parents=True, exist_ok=True)
    print("| Python | torch | result | seconds |\n|---|---|---|---|", flush=True)
    passed = []
    for python in os.environ.get("PYTHONS", "").split() or interpreters():
        for torch in os.environ.get("TORCHES", "").split() or torches():
            good, line = row(python, torch)
            passed.append(good)
            print(line, flush=True)
    return 0 if passed and all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
