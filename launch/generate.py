"""Continues a text with a trained model, its state of constant size; see --help.

    python launch/generate.py --checkpoint out/train --prompt "def main"
    torchrun --standalone --nproc_per_node 8 launch/generate.py --checkpoint out/train --prompt-file BOOK \
        --save-state book.safetensors                                          a long prompt, read by all ranks together
    python launch/generate.py --checkpoint out/train --state book.safetensors --prompt "Who" "Where"

Tokens are printed as they come. Several ranks read the prompt; then rank 0 goes on alone, with the state of the whole
text. Exit codes: 0; 1 an error, said in one line; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

with contextlib.suppress(ImportError):  # an installed package needs no path
    import hla_dist  # noqa: F401
sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist

from hla_dist import SequenceParallelHLA
from hla_dist.checkpoints.export import load_trained
from hla_dist.data.text import Codec, TextStream
from hla_dist.generation.generate import Carry, Sampling, follow, read
from hla_dist.generation.prompt_state import load_state, save_state
from hla_dist.processes import mpirun
from hla_dist.processes.failure import UserError, describe, together
from hla_dist.processes.mesh import connect
from hla_dist.processes.rendezvous import NotMet, place
from hla_dist.training.config import option, parse_options

ABOUT = "Continue a text with a trained model."


@dataclass
class GenerateConfig:
    """What to continue, and how."""

    checkpoint: str = option(
        "", "model", "a checkpoint, the --out of a run, or a .safetensors file of launch/export.py", metavar="PATH",
        required=True,
    )  # fmt: skip
    device: str = option("cpu", "model", "cpu, cuda, cuda:1, ...; with several ranks cuda is a GPU for each")
    threads: int = option(0, "model", "CPU threads a rank; 0: the machine's cores over its ranks")
    timeout: float = option(600.0, "model", "seconds after which a collective that cannot finish is an error")

    prompt: list[str] = option(
        [], "prompt", "the text to continue; several are continued each, as one batch; none: a line end, unless there "
        "is a --prompt-file or --state", nargs="+", metavar="TEXT"
    )  # fmt: skip
    prompt_file: str | None = option(
        None, "prompt", "a text that comes before every --prompt, read once", metavar="FILE"
    )
    state: str | None = option(
        None, "prompt", "go on from a text that --save-state kept, before --prompt-file and --prompt", metavar="FILE"
    )
    save_state: str | None = option(
        None, "prompt", "keep the state after the prompt, for this model only (safetensors)", metavar="FILE"
    )
    piece: int = option(8192, "prompt", "tokens of a prompt that a rank reads at a time")

    tokens: int = option(500, "new text", "tokens to generate")
    temperature: float = option(0.8, "new text", "0: always the likeliest token")
    greedy: bool = option(False, "new text", "the same as --temperature 0")
    top_k: int = option(40, "new text", "draw from the likeliest N; 0: from all")
    top_p: float = option(1.0, "new text", "draw from the likeliest tokens that together have this probability")
    seed: int = option(0, "new text", "seed of the draws; prompt i draws with seed + i")
    stats: bool = option(False, "new text", "say tokens per second and the size of the state, on standard error")

    def __post_init__(self) -> None:
        for name in ("tokens", "threads", "seed"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name}: expected at least 0, got {getattr(self, name)}")
        if self.piece < 1 or not self.timeout > 0:
            raise UserError(f"--piece, --timeout: expected numbers above 0, got {self.piece}, {self.timeout}")
        if self.save_state is not None and len(self.prompt) > 1:
            raise UserError(f"--save-state: expected one prompt whose state to keep, got {len(self.prompt)}")
        try:
            self.sampling = Sampling(0.0 if self.greedy else self.temperature, self.top_k, self.top_p)
        except ValueError as exc:
            raise UserError(f"--{str(exc).replace('_', '-')}") from exc


def main() -> int:
    rank, world_size = 0, 1
    try:
        store = mpirun.join(os.environ)
        rank, world_size, _, local = place(os.environ)
        with contextlib.nullcontext() if rank == 0 else contextlib.redirect_stdout(io.StringIO()):  # --help once
            config = parse_options(GenerateConfig, "launch/generate.py", ABOUT)
        device = choose_device(config.device, local)
        torch.set_num_threads(config.threads or max(1, (os.cpu_count() or 1) // local))
        if world_size > 1:
            connect(rank, world_size, device, config.timeout, from_env="RANK" in os.environ, store=store)
        run(config, device, rank, world_size)
        mpirun.meet()
    except (UserError, ValueError, OSError, RuntimeError) as exc:
        if isinstance(exc, BrokenPipeError):  # who reads has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        alike = isinstance(exc, (UserError, ValueError)) and not isinstance(exc, NotMet)
        mistake(rank, world_size, describe(exc), alike)
        return 1
    except KeyboardInterrupt:
        print(flush=True)
        return 130
    return 0


def run(config: GenerateConfig, device: torch.device, rank: int, world_size: int) -> None:
    """Reads the prompts on all ranks, then writes on rank 0."""
    group: Any = dist.group.WORLD if world_size > 1 else None
    began = time.perf_counter()
    model, codec = everywhere(group, lambda: open_model(config, device, rank))
    reader = model if group is None else SequenceParallelHLA(model, group, reduce_gradients=False)
    carry = None if config.state is None else everywhere(group, lambda: load_state(Path(str(config.state)), model))
    start, loaded = 0 if carry is None else carry.position, time.perf_counter()
    texts = config.prompt or ([] if carry is not None or config.prompt_file is not None else ["\n"])
    total = 0
    if config.prompt_file is not None:
        tokens = everywhere(group, lambda: codec.encode(Path(str(config.prompt_file)).read_text(errors="replace")))
        carry = read(reader, tokens, carry, config.piece)
        total = len(tokens)
    before = carry
    prompts = everywhere(group, lambda: [codec.encode(text) for text in texts])
    carries = [read(reader, prompt, before, config.piece) for prompt in prompts]
    if not carries:
        assert carry is not None
        carries = [carry]
    total += sum(map(len, prompts))
    if config.save_state is not None:
        target = Path(config.save_state)
        everywhere(group, lambda: save_state(carries[0], model, target) if rank == 0 else None)
    if group is not None:
        assert isinstance(reader, SequenceParallelHLA)
        reader.unwrap()
        dist.barrier()
        dist.destroy_process_group()
    if rank != 0:
        return
    loading, reading = loaded - began, time.perf_counter() - loaded
    began = time.perf_counter()
    write(config, model, codec, texts, carries)
    if config.stats:
        writing = time.perf_counter() - began
        new = config.tokens * len(carries)
        size = sum(field.numel() * field.element_size() for layer in carries[0].state for field in layer)
        print(
            f"generate.py: model read in {loading:.1f} s; prompt: {total:,} tokens after {start:,} in {reading:.2f} s "
            f"({total / reading:,.0f} a second, {world_size} rank(s)); new: {new:,} in {writing:.2f} s "
            f"({new / writing:,.0f} a second); state: {size / 1024:,.0f} KiB a text",
            file=sys.stderr,
        )


def open_model(config: GenerateConfig, device: torch.device, rank: int) -> tuple[Any, Codec]:
    trained = load_trained(Path(config.checkpoint))
    for line in trained.warnings if rank == 0 else []:
        print(f"generate.py: warning: {line}", file=sys.stderr)
    return trained.model.to(device).eval(), Codec(trained.tokenizer, known=trained.known_text)


def write(config: GenerateConfig, model: Any, codec: Codec, texts: list[str], carries: list[Carry]) -> None:
    """One text as it comes; of several, each when all are done."""
    rows = follow(model, carries, config.tokens, config.sampling, config.seed)
    streams = [TextStream(codec) for _ in carries]
    if len(carries) == 1:
        sys.stdout.write("".join(texts))
        sys.stdout.flush()
        for (token,) in rows:
            sys.stdout.write(streams[0].add(token))
            sys.stdout.flush()
        print(streams[0].end(), flush=True)
        return
    written = list(texts)
    for tokens in rows:
        for index, token in enumerate(tokens):
            written[index] += streams[index].add(token)
    for index, text in enumerate(written):
        print(f"--- {index + 1} of {len(written)}\n{text}{streams[index].end()}", flush=True)


def choose_device(name: str, local: int) -> torch.device:
    """This rank's device; UserError if there is none such."""
    try:
        device = torch.device(name)
    except RuntimeError as exc:
        raise UserError(f"--device: expected cpu, cuda, cuda:1, ..., got {name}") from exc
    if device.type == "cuda":
        gpus = torch.cuda.device_count()
        if gpus < max(local, (device.index or 0) + 1):
            raise UserError(f"--device: expected a GPU for each of {local} rank(s) here, got {name} and {gpus} GPU(s)")
        if local > 1:
            device = torch.device("cuda", place(os.environ).local_rank)
        torch.cuda.set_device(device)
    return device


def everywhere(group: Any, work: Any) -> Any:
    """``work()``; with a group, what fails on one rank fails on all."""
    return work() if group is None else together(group, work)


def mistake(rank: int, ranks: int, message: str, alike: bool) -> None:
    """One line; of a mistake that all ranks share, rank 0's. The others give it a moment: one exit ends them all."""
    if rank == 0 or not alike:
        who = "" if alike or ranks == 1 else f" (rank {rank})"
        print(f"generate.py: error{who}: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(5)
    sys.stdout.flush()
    if ranks > 1:
        mpirun.end(1)
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
