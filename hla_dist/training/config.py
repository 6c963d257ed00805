"""The options of a training run: one typed field each, from which the command line and its --help are made."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, NoReturn, TypeVar

from hla_dist.data.packing import PACKINGS
from hla_dist.models.config import SIZES, ModelConfig
from hla_dist.operators import NAMED
from hla_dist.parallel.topology import EXCHANGES
from hla_dist.processes.failure import UserError

Options = TypeVar("Options")
DEMO_STEPS = 400
DEMO_MINUTES = 4.2  # leaves time for evaluation, parity and plots within six minutes on slower machines
RUN_FILES = ("config.json", "metrics.jsonl", "tensorboard/", "checkpoints/", "loss.png", "summary.json")  # in --out


def option(default: Any, group: str, text: str, **keywords: Any) -> Any:
    """A field with its group and help text; further keywords go to argparse."""
    metadata = {"group": group, "help": text, "keywords": keywords}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TrainConfig:
    """Everything that decides a run. The defaults are the demonstration: minutes on two CPU cores."""

    data: list[str] = option(
        [], "data", "text files, .jsonl, .parquet, folders of them, hf:NAME[@SPLIT] of the package datasets, or one "
        ".npy/.bin memmap of tokens (launch/prepare.py); none: the standard library sources of the running Python",
        nargs="+", metavar="PATH"
    )  # fmt: skip
    text_field: str = option("text", "data", "field of JSONL and Parquet rows that holds the text", metavar="NAME")
    tokenizer: str | None = option(
        None, "data", "JSON of the package 'tokenizers', or bytes; none: bytes, or what a memmap was made with",
        metavar="FILE"
    )  # fmt: skip
    packing: str = option(
        "none", "data", "documents: a state for each document of a sequence, none sees another, and their first tokens "
        "are not predicted; none: the text runs on", choices=list(PACKINGS)
    )  # fmt: skip
    verify_data: bool = option(True, "data", "compare a prepared memmap's SHA-256 at the start; reads it once")
    vocab_size: int = option(0, "data", "vocabulary; 0: the data's (a memmap that is not prepared needs it)")
    token_dtype: str = option(
        "uint16", "data", "numbers of a .bin memmap that is not prepared", choices=["uint16", "uint32"]
    )
    held_out: float = option(0.05, "data", "share of the text that is held out, by files or, if they are few, the tail")
    seq_len: int = option(8192, "data", "tokens of a sequence, over all ranks that share it")

    size: str = option("tiny", "model", "named size, which the options below change", choices=list(SIZES))
    op: str = option("hla2", "model", "operator of the attention layers", choices=list(NAMED))
    pattern: str = option(
        "", "model", "a hybrid: operators and softmax by layer, over again to the last one, such as hla2*3,softmax; "
        "none: --op throughout"
    )  # fmt: skip
    window: int = option(0, "model", "tokens that a softmax layer sees, itself included; 0: all")
    hidden_size: int = option(0, "model", "width; 0: the named size's")
    layers: int = option(0, "model", "blocks; 0: the named size's")
    heads: int = option(0, "model", "query heads; 0: the named size's")
    kv_heads: int = option(0, "model", "key/value heads; 0: as many as query heads")
    head_dim: int = option(0, "model", "dimension of a head; 0: width / heads")
    tie_embeddings: bool = option(True, "model", "the output layer is the embedding; off: a matrix of its own")

    steps: int = option(DEMO_STEPS, "optimisation", "optimiser steps")
    max_minutes: float | None = option(
        None, "optimisation", "end training after this time, start-up included, even if steps are left (0: no limit); "
        f"the learning rate follows steps or time, whichever is further; none: {DEMO_MINUTES} if --steps is left at "
        "its default, else no limit"
    )  # fmt: skip
    batch_size: int = option(1, "optimisation", "sequences a micro-batch, per replica")
    accumulate: int = option(1, "optimisation", "micro-batches whose gradients make a step")
    lr: float = option(4e-3, "optimisation", "peak learning rate of AdamW")
    min_lr: float = option(0.05, "optimisation", "last learning rate as a share of the peak")
    warmup: int = option(10, "optimisation", "steps of linear warm-up")
    weight_decay: float = option(0.1, "optimisation", "weight decay of matrices")
    clip: float = option(1.0, "optimisation", "largest global gradient norm; 0: no clipping")
    bf16: bool = option(False, "optimisation", "matrix products in bfloat16 (autocast); parameters stay float32")
    checkpoint_activations: str = option(
        "none", "optimisation", "what backward computes again to save memory: layer, each block (the flag without a "
        "value); sublayer, attention and SwiGLU each, a few thousand tokens at a time: for the longest sequences",
        nargs="?", const="layer", choices=["none", "layer", "sublayer"]
    )  # fmt: skip
    offload_activations: bool = option(
        False, "optimisation", "what backward needs waits in host memory, pinned, instead of the GPU's"
    )
    offload_parameters: bool = option(
        False, "optimisation", "FSDP2 keeps parameters, gradients and moments in host memory, and AdamW runs there: a "
        "GPU then holds a layer's parameters at a time (needs --dp-shard)"
    )  # fmt: skip
    seed: int = option(0, "optimisation", "seed of initialisation and of the order of the data")
    deterministic: bool = option(
        False, "optimisation", "only operations that give the same bits every time; an error names one that does not"
    )
    max_skips: int = option(
        10, "optimisation", "steps in a row that may be skipped because a loss or gradient is not finite; one more "
        "ends the run"
    )  # fmt: skip

    sp: int = option(
        0, "ranks", "ranks a sequence is sharded over, the cp axis of the mesh; 0: all that the data axes leave"
    )
    dp_shard: int = option(
        0, "ranks", "FSDP2: data ranks that share parameters, sharded over dp-shard x sp ranks; 0: every rank has them "
        "whole"
    )  # fmt: skip
    dp_replicate: int = option(0, "ranks", "data ranks that repeat parameters; 0: what --dp-shard and --sp leave")
    tp: int = option(1, "ranks", "tensor-parallel ranks; there is no tensor parallelism: 1")
    exchange: str = option(
        "auto", "ranks", "how summaries travel between the ranks of a sequence", choices=list(EXCHANGES)
    )
    bf16_wire: bool = option(False, "ranks", "summaries travel rounded to bfloat16, in half the bytes")
    device: str = option("auto", "ranks", "auto: a GPU a rank where there are GPUs", choices=["auto", "cpu", "cuda"])
    threads: int = option(0, "ranks", "CPU threads a rank; 0: the machine's cores over its ranks")
    timeout: float = option(120.0, "ranks", "seconds after which a collective that cannot finish is an error")
    save_timeout: float = option(1800.0, "ranks", "the same for ranks that wait for each other to write a checkpoint")
    check_every: int = option(100, "ranks", "steps between checks that all ranks have the same parameters; 0: never")

    dry_run: bool = option(
        False, "output", "train nothing: print parameters, FLOPs, memory by kind and bytes on the wire of a step over "
        "--sp ranks, without needing them"
    )  # fmt: skip
    out: str | None = option(
        None, "output", f"directory of the run: {', '.join(RUN_FILES)}; none: nothing is written", metavar="DIR"
    )
    resume: str | None = option(
        None, "output", "go on from a checkpoint: a directory, or without a value the newest whole one of --out; auto: "
        "that one if there is any, else start. A run that torchrun restarts goes on by itself",
        nargs="?", const="", metavar="DIR"
    )  # fmt: skip
    wandb: str | None = option(
        None, "output", "log to this project of Weights & Biases too, by the package 'wandb' (needs --out)",
        metavar="PROJECT"
    )  # fmt: skip
    eval_every: int = option(200, "output", "steps between evaluations on held-out text, besides first and last")
    eval_tokens: int = option(131072, "output", "held-out tokens of an evaluation")
    save_every: int = option(0, "output", "steps between checkpoints; 0: only the last")
    keep: int = option(2, "output", "checkpoints to keep")
    async_save: bool = option(True, "output", "write checkpoints in the background, from a copy of all that is saved")
    parity: bool = option(True, "output", "at the end compare one batch on all ranks with one process")
    sample: int = option(400, "output", "tokens of generated text at the end")
    prompt: str = option("def ", "output", "what the generated text continues")

    def __post_init__(self) -> None:
        if self.max_minutes is None:
            self.max_minutes = DEMO_MINUTES if self.steps == DEMO_STEPS else 0.0
        least = {"seq_len": 1, "steps": 1, "batch_size": 1, "accumulate": 1, "keep": 1, "eval_every": 1, "timeout": 1,
                 "save_timeout": 1, "max_skips": 0, "check_every": 0,
                 "vocab_size": 0, "max_minutes": 0, "warmup": 0, "clip": 0, "lr": 0, "min_lr": 0, "weight_decay": 0,
                 "save_every": 0, "sample": 0, "eval_tokens": 1, "threads": 0, "sp": 0, "dp_shard": 0,
                 "dp_replicate": 0, "tp": 1, "window": 0, "hidden_size": 0, "layers": 0,
                 "heads": 0, "kv_heads": 0, "head_dim": 0, "seed": 0}  # fmt: skip
        for name, minimum in least.items():
            value = getattr(self, name)
            if not value >= minimum:  # NaN too
                raise UserError(f"{flag(name)}: expected at least {minimum}, got {value}")
        if not 0 < self.held_out < 1:
            raise UserError(f"--held-out: expected a share between 0 and 1, got {self.held_out}")
        if self.packing == "documents" and self.batch_size > 1:
            raise UserError(
                f"--batch-size: expected 1 with --packing documents (a sequence holds many documents; --accumulate "
                f"takes more of them), got {self.batch_size}"
            )
        if self.bf16_wire and self.parity:
            raise UserError(
                "--bf16-wire: expected --no-parity beside it (the ranks differ by its rounding), got --parity"
            )
        if self.offload_parameters and not self.dp_shard:
            raise UserError("--offload-parameters: expected --dp-shard beside it (FSDP2 offloads its shards), got none")
        if self.device == "cpu" and (self.offload_activations or self.offload_parameters):
            raise UserError(self.offload_on_cpu())
        if self.save_every and self.out is None:
            raise UserError(f"--save-every: expected --out to save checkpoints in, got {self.save_every} and no --out")
        if self.resume in ("", "auto") and self.out is None:
            raise UserError("--resume: expected a directory, or --out to find the newest checkpoint in, got neither")

        if self.wandb is not None and self.out is None:
            raise UserError("--wandb: expected --out too, which holds what is logged, got none")

    def offload_on_cpu(self) -> str:
        """Why there is no offloading without GPUs."""
        name = "--offload-activations" if self.offload_activations else "--offload-parameters"
        return f"{name}: expected a GPU whose memory to spare, got the device cpu, whose memory is the host's"

    def model_config(self, vocab_size: int) -> ModelConfig:
        """The model these options describe; UserError if there is none such."""
        names = {"hidden_size": "hidden_size", "layers": "num_layers", "heads": "num_heads", "kv_heads": "num_kv_heads",
                 "head_dim": "head_dim"}  # fmt: skip
        changes: dict[str, Any] = {theirs: getattr(self, ours) for ours, theirs in names.items() if getattr(self, ours)}
        changes |= {"softmax": {"window": self.window}} if self.window else {}
        changes |= {"tie_word_embeddings": self.tie_embeddings}
        try:
            return ModelConfig.named(self.size, vocab_size=vocab_size, op=self.op, pattern=self.pattern, **changes)
        except ValueError as exc:
            raise UserError(str(exc)) from exc

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def flag(name: str) -> str:
    """A field's option on the command line."""
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """Raises UserError in one line where argparse would print the usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help explains every flag)")


def parse(arguments: Sequence[str] | None = None) -> TrainConfig:
    """A configuration from command-line arguments; raises UserError in one line instead of printing the usage."""
    about = "Train an HLA language model on text, its sequences sharded over the ranks of torchrun."
    return parse_options(TrainConfig, "launch/train.py", about, arguments)


def parse_options(kind: type[Options], program: str, about: str, arguments: Sequence[str] | None = None) -> Options:
    """A dataclass of :func:`option` fields from command-line arguments, all its flags in --help."""
    parser = Parser(
        prog=program, description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    groups: dict[str, Any] = {}
    types: dict[str, Any] = {"int": int, "float": float, "str": str, "list[str]": str, "list[int]": int}
    for item in fields(kind):  # type: ignore[arg-type]
        name = item.metadata["group"]
        group = groups.setdefault(name, None) or parser.add_argument_group(name)
        groups[name] = group
        keywords = dict(item.metadata["keywords"])
        of = str(item.type).removesuffix(" | None")
        if item.type == "bool":
            keywords["action"] = argparse.BooleanOptionalAction
        else:
            keywords["type"] = types[of]
            if "choices" not in keywords:
                keywords.setdefault("metavar", {"int": "N", "float": "X", "list[int]": "N"}.get(of, "TEXT"))
        default = item.default if item.default_factory is MISSING else item.default_factory()
        group.add_argument(flag(item.name), dest=item.name, default=default, help=item.metadata["help"], **keywords)
    return kind(**vars(parser.parse_args(arguments)))
