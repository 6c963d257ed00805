"""The options of a training run: five groups of typed fields, from which the command line and its --help are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any

from tyro.conf import DisallowNone, arg

from hla_dist.data.packing import PACKINGS
from hla_dist.models.config import BACKED, SIZES, ModelConfig
from hla_dist.operators import NAMED
from hla_dist.parallel.topology import EXCHANGES
from hla_dist.processes.failure import UserError, expect
from hla_dist.processes.options import (
    Amount,
    Checked,
    Count,
    Device,
    File,
    Local,
    Natural,
    Paths,
    Seconds,
    Threads,
    flag,
    one_of,
    optional_value,
    parse_options,
)

ABOUT = "Train an HLA language model on text, its sequences sharded over the ranks of torchrun."
DEMO_STEPS = 400
DEMO_MINUTES = 4.2  # leaves time for evaluation, parity and plots within six minutes on slower machines
RUN_FILES = ("config.json", "metrics.jsonl", "tensorboard/", "checkpoints/", "loss.png", "summary.json")  # in --out

# options that layers of operators take, and those of softmax and memory do not
_OF_OPERATORS = ("decay", "conv", "key_term", "key_term_start", "decay_range", "decay_temperature", "levels")
_WITHOUT = (0, "none", False)  # to ask for none of what a layer does not have is no mistake


@dataclass
class Data(Checked):
    """What is read, and how it is cut."""

    # text files, .jsonl, both perhaps .gz, .xz or .zst, .parquet, folders of them, hf:NAME[@SPLIT] of the package
    # datasets, or one .npy/.bin memmap of tokens (launch/prepare.py); none: the standard library sources of the running
    # Python
    data: Paths = field(default_factory=list)
    # a mixture: one number per --data path, its share of the samples; each path may then be a memmap
    data_weights: list[float] = field(default_factory=list)
    text_field: str = "text"  # field of JSONL and Parquet rows that holds the text
    # JSON of the package 'tokenizers', or bytes; none: bytes, or what a memmap was made with
    tokenizer: File = None
    end_token: str | None = None  # a token of the tokenizer that follows each document that does not end in it
    # documents: a state for each document of a sequence, none sees another, and their first tokens are not predicted;
    # none: the text runs on
    packing: Annotated[str, one_of(*PACKINGS)] = "none"
    # whether the whole SHA-256 of memmaps is taken at the start: every rank reads its own file; none: one rank does, of
    # a prepared one; off: the first and last MiB have to do
    verify_data: Annotated[bool | None, DisallowNone] = None
    # continue from a checkpoint although the data are no longer those it was trained on
    allow_changed_data: bool = False
    vocab_size: Natural = 0  # vocabulary; 0: the data's (a memmap that is not prepared needs it)
    # numbers of a .bin memmap that is not prepared; none: it has to be prepared
    token_dtype: Annotated[str, one_of("none", "uint8", "uint16", "uint32")] = "none"
    held_out: float = 0.05  # share of the text that is held out, by files or, if they are few, the tail
    seq_len: Count = 8192  # tokens of a sequence, over all ranks that share it


@dataclass
class ModelShape(Checked):
    """A named size, and what is changed of it; none of these with --init-from or --resume: the model stored there."""

    size: Annotated[str, one_of(*SIZES)] = "tiny"  # named size, which the options below change
    op: Annotated[str, one_of(*NAMED)] = "hla2"  # operator of the attention layers
    # a hybrid: operators and softmax by layer, again and again, such as hla2*3,softmax; none: --op everywhere
    pattern: str = ""
    window: Natural = 0  # tokens that a softmax layer sees, itself included; 0: all
    hidden_size: Natural = 0  # width; 0: the named size's
    layers: Natural = 0  # blocks; 0: the named size's
    heads: Natural = 0  # query heads; 0: the named size's
    kv_heads: Natural = 0  # key/value heads; 0: as many as query heads
    head_dim: Natural = 0  # dimension of a head; 0: width / heads
    # gates of the operators: one per token and head, a constant per head, one per token and channel of the keys
    # (linear_attention only), or none
    decay: Annotated[str, one_of("token", "head", "channel", "none")] = "token"
    conv: Natural = BACKED["conv"]  # width, 2 to 8, of a short convolution of queries, keys and values; 0: none
    # layers of hla2 and hla3 learn a gain and a skip per head: a path from first order to second; none: where there are
    # such layers
    key_term: bool | None = BACKED["key_term"]
    # gain and skip that they start from: 0 1 is first order, 1 0 second, which tracks states better
    # (docs/which-operator.md); none: 0 1
    key_term_start: Annotated[list[float], arg(metavar="GAIN SKIP")] = field(default_factory=list)
    # memory of an operator's first head and of its last as they start, in tokens, the others between; none: the named
    # size's, which of tiny are 0.5 512 and else 2 4096
    decay_range: Annotated[list[float], arg(metavar="SHORTEST LONGEST")] = field(default_factory=list)
    # divides the logarithm of the gates: at 16, as in GLA, a token cuts softly
    decay_temperature: Amount = 1.0
    # levels of the operators' last pass, which weighs near and far apart (log-linear attention), at least 2; 0: none
    levels: Natural = 0
    tie_embeddings: bool = True  # the output layer is the embedding; off: a matrix of its own
    experts: Natural = 0  # SwiGLU networks per block, of which a token takes a few; 0: one, which all tokens take
    active: Natural = 0  # experts that a token takes; 0: 2
    balance: Amount = 0.01  # weight of the loss that keeps experts equally busy, over the whole sequence


@dataclass
class Optimisation(Checked):
    """Steps and how they are taken."""

    steps: Count = DEMO_STEPS  # optimiser steps
    # end training after this time, start-up included, even if steps are left (0: no limit); the learning rate follows
    # steps or time, whichever is further; none: 4.2 if --steps is left at its default, else no limit
    max_minutes: float | None = None
    batch_size: Count = 1  # sequences per micro-batch and replica
    accumulate: Count = 1  # micro-batches whose gradients make a step
    lr: Amount = 4e-3  # peak learning rate of AdamW
    min_lr: Amount = 0.05  # last learning rate as a share of the peak
    warmup: Natural = 10  # steps of linear warm-up
    weight_decay: Amount = 0.1  # weight decay of matrices
    clip: Amount = 1.0  # largest global gradient norm; 0: no clipping
    bf16: bool = False  # matrix products in bfloat16 (autocast); parameters stay float32
    # what backward computes again to save memory: layer, each block (the flag without a value); sublayer, attention and
    # SwiGLU each, a few thousand tokens at a time: for the longest sequences
    checkpoint_activations: Annotated[str, one_of("none", "layer", "sublayer", alone="layer")] = "none"
    offload_activations: bool = False  # what backward needs waits in host memory, pinned, instead of the GPU's
    # FSDP2 keeps parameters, gradients and moments in host memory, and AdamW runs there: a GPU then holds a layer's
    # parameters at a time (needs --dp-shard)
    offload_parameters: bool = False
    seed: Natural = 0  # seed of initialisation and of the order of the data
    deterministic: bool = False  # only operations that give the same bits every time; an error names one that does not
    # steps in a row that may be skipped because a loss or gradient is not finite; one more ends the run
    max_skips: Natural = 10


@dataclass
class RankOptions(Checked):
    """Who computes what, on which device, and how long ranks wait for each other."""

    sp: Natural = 0  # ranks a sequence is sharded over, the cp axis of the mesh; 0: all that the data axes leave
    # FSDP2: data ranks that share parameters, sharded over dp-shard x sp ranks; 0: every rank has them whole
    dp_shard: Natural = 0
    dp_replicate: Natural = 0  # data ranks that repeat parameters; 0: what --dp-shard and --sp leave
    tp: Count = 1  # tensor-parallel ranks; there is no tensor parallelism: 1
    # data ranks that the experts are spread over: each has --experts / ep of them, and rows travel; 1: all have all
    ep: Count = 1
    exchange: Annotated[str, one_of(*EXCHANGES)] = "auto"  # how summaries travel between the ranks of a sequence
    bf16_wire: bool = False  # summaries travel rounded to bfloat16, in half the bytes
    device: Device = "auto"  # auto: a GPU per rank where there are GPUs
    threads: Threads = 0  # CPU threads per rank; 0: the machine's cores over its ranks
    timeout: Seconds = 120.0  # seconds after which a collective that cannot finish is an error
    save_timeout: Seconds = 1800.0  # the same for ranks that wait for each other to write a checkpoint
    check_every: Natural = 100  # steps between checks that all ranks have the same parameters; 0: never


@dataclass
class Output(Checked):
    """What is written, and how often."""

    # train nothing: print parameters, FLOPs, memory by kind and bytes on the wire of a step over --sp ranks, without
    # needing them
    dry_run: bool = False
    out: Annotated[
        str | None,
        arg(metavar="DIR", help=f"directory of the run: {', '.join(RUN_FILES)}; none: nothing is written"),
        Local(),
    ] = None
    # take --out although a run on another machine was at work in it less than its --timeout ago: if you know that it is
    # over
    break_lock: bool = False
    # continue from a checkpoint: a directory, or without a value the newest whole one of --out; auto: that one if there
    # is any, else start. A run that torchrun restarts needs no flag
    resume: Annotated[str | None, optional_value("", "DIR"), Local(words=("", "auto"))] = None
    # begin with these parameters, at step 0 and with fresh moments: a .safetensors file or folder, a checkpoint, or the
    # --out of a run. Its model and tokenizer come along if it says what they are and no option of the model is given;
    # with one, these options must describe the whole model
    init_from: Annotated[str | None, arg(metavar="PATH"), Local()] = None
    # log to this project of Weights & Biases too, by the package 'wandb' (needs --out)
    wandb: str | None = None
    eval_every: Count = 200  # steps between evaluations on held-out text, besides first and last
    eval_tokens: Count = 131072  # held-out tokens of an evaluation
    save_every: Natural = 0  # steps between checkpoints; 0: only the last
    keep: Count = 2  # checkpoints to keep
    async_save: bool = True  # write checkpoints in the background, from a copy of all that is saved
    parity: bool = True  # at the end compare one batch on all ranks with one process
    sample: Natural = 400  # tokens of generated text at the end
    prompt: str = "def "  # what the generated text continues


@dataclass
class TrainConfig(Checked):
    """Everything that decides a run. The defaults are the demonstration: minutes on two CPU cores."""

    data: Data = field(default_factory=Data)
    model: ModelShape = field(default_factory=ModelShape)
    optimisation: Optimisation = field(default_factory=Optimisation)
    ranks: RankOptions = field(default_factory=RankOptions)
    output: Output = field(default_factory=Output)

    def __post_init__(self) -> None:
        data, optimisation, ranks, output = self.data, self.optimisation, self.ranks, self.output
        if optimisation.max_minutes is None:
            optimisation.max_minutes = DEMO_MINUTES if optimisation.steps == DEMO_STEPS else 0.0
        expect(optimisation.max_minutes >= 0, "--max-minutes", "at least 0", optimisation.max_minutes)
        expect(0 < data.held_out < 1, "--held-out", "a share between 0 and 1", data.held_out)
        packed, at_once = data.packing == "documents", optimisation.batch_size
        single = "1 with --packing documents (a sequence holds many documents; --accumulate takes more of them)"
        expect(not packed or at_once == 1, "--batch-size", single, at_once)
        rounded = "--no-parity beside it (the ranks differ by its rounding)"
        expect(not (ranks.bf16_wire and output.parity), "--bf16-wire", rounded, "--parity")
        sharded = "--dp-shard beside it (FSDP2 offloads its shards)"
        expect(ranks.dp_shard or not optimisation.offload_parameters, "--offload-parameters", sharded, "none")
        experts, ep = self.model.experts, ranks.ep
        expect(ep == 1 or (experts and not experts % ep), "--ep", f"a divisor of --experts, {experts}", ep)
        alone = "no --dp-shard beside it (FSDP2 shards experts with all else)"
        expect(ep == 1 or not ranks.dp_shard, "--ep", alone, ranks.dp_shard)
        if ranks.device == "cpu":
            self.refuse_offload_on_cpu()
        written, resume, init_from = output.out is not None, output.resume, output.init_from
        nowhere = f"{output.save_every} and no --out"
        expect(written or not output.save_every, "--save-every", "--out to save checkpoints in", nowhere)
        known = "a directory, or --out to find the newest checkpoint in"
        expect(written or resume not in ("", "auto"), "--resume", known, "neither")
        fresh, both = "no --resume beside it, which goes on with parameters of its own", f"{resume or output.out}"
        expect(init_from is None or resume in (None, "auto"), "--init-from", fresh, f"both {init_from} and {both}")
        expect(written or output.wandb is None, "--wandb", "--out too, which holds what is logged", "none")

    @property
    def describes_model(self) -> bool:
        """Whether an option of the model is given, so that all of them describe it, and not a file."""
        if self.given is None:
            return self.model != ModelShape()
        return not self.given.isdisjoint(f.name for f in fields(ModelShape))

    def refuse_offload_on_cpu(self) -> None:
        """UserError if something is to be offloaded: without GPUs there is nowhere to."""
        for name in ("offload_activations", "offload_parameters"):
            cpu = "the device cpu, whose memory is the host's"
            expect(not getattr(self.optimisation, name), flag(name), "a GPU, whose memory it saves", cpu)

    def model_config(self, vocab_size: int) -> ModelConfig:
        """The model these options describe; UserError if they describe none."""
        model = self.model
        changes: dict[str, Any] = {"hidden_size": model.hidden_size, "num_layers": model.layers,
                                   "num_heads": model.heads, "num_kv_heads": model.kv_heads,
                                   "head_dim": model.head_dim, "experts": model.experts,
                                   "active": model.active}  # fmt: skip
        changes = {name: value for name, value in changes.items() if value}
        changes |= {kind: {"window": model.window} for kind in ("softmax", "memory") if model.window}
        attention: dict[str, Any] = {"conv": model.conv or None, "key_term": model.key_term}
        attention |= {"levels": model.levels} if model.levels else {}
        if start := model.key_term_start:
            expect(model.key_term is not False, "--key-term-start", "--key-term beside it, or no word on it", "False")
            attention["key_term"] = start
        if model.decay_range:
            expect(model.decay != "none", "--decay-range", "a --decay, whose gates start from them", model.decay)
            attention["decay_range"] = model.decay_range
        if model.decay_temperature != 1.0:
            softened = "a --decay, whose gates it softens"
            expect(model.decay != "none", "--decay-temperature", softened, model.decay)
            attention["decay_temperature"] = model.decay_temperature
        if model.decay != "token":  # which a configuration does not name: checkpoints of before have the same
            attention["decay"] = None if model.decay == "none" else model.decay
        changes["attention"] = SIZES[model.size]["attention"] | attention
        changes |= {"tie_word_embeddings": model.tie_embeddings, "balance": model.balance}
        try:
            named = ModelConfig.named(model.size, vocab_size=vocab_size, op=model.op, pattern=model.pattern, **changes)
        except ValueError as exc:
            raise UserError(str(exc)) from exc
        self._refuse_unused(named)
        return named

    def _refuse_unused(self, named: ModelConfig) -> None:
        """UserError for an option of a layer that the model does not have."""
        model, usual, layers = self.model, ModelShape(), ", ".join(dict.fromkeys(named.mixers))
        takers = dict.fromkeys(_OF_OPERATORS, tuple(NAMED)) | {"window": ("softmax", "memory")}
        for name, kinds in takers.items():
            passed_over = set(kinds).isdisjoint(named.mixers)
            asked = getattr(model, name) not in (getattr(usual, name), *_WITHOUT)
            expect(not (asked and passed_over), flag(name), f"a layer that takes it ({', '.join(kinds)})", layers)
        expect(model.op in (usual.op, *named.mixers), "--op", f"a layer of --pattern ({layers})", model.op)
        weighed = model.balance == usual.balance or named.experts
        expect(weighed, "--balance", "--experts, which it keeps equally busy", "none")

    def to_dict(self) -> dict[str, Any]:
        """All options by their names, as config.json and checkpoints hold them: flat, whatever the groups are."""
        return {name: value for group in asdict(self).values() for name, value in group.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The inverse of :meth:`to_dict`; what ``values`` lack has its default. UserError for unknown names."""
        rest = {"conv": 0, "key_term": False, **values}  # what they were before there were such options
        groups = {}
        for group in fields(cls):
            kind = type(getattr(cls(), group.name))
            groups[group.name] = kind(**{f.name: rest.pop(f.name) for f in fields(kind) if f.name in rest})
        expect(not rest, "options", "those of launch/train.py", f"also {', '.join(rest)}")
        return cls(**groups)


def parse(arguments: Sequence[str]) -> TrainConfig:
    """A configuration from command-line arguments; UserError in one line for what it does not take."""
    return parse_options(TrainConfig, "launch/train.py", ABOUT, arguments)
