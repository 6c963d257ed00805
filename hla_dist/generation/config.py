"""The options of launch/generate.py."""

from dataclasses import dataclass, field
from typing import Annotated

from tyro.conf import arg

from hla_dist.generation.generate import Sampling
from hla_dist.processes.failure import UserError
from hla_dist.processes.options import Checked, Count, File, Local, Natural, Seconds, Threads


@dataclass
class ModelSource(Checked):
    """Which model, and where it runs."""

    # a checkpoint, the --out of a run, a .safetensors file of launch/export.py, or a pretrained softmax model: a folder
    # of transformers or a .gguf file
    checkpoint: Annotated[str, arg(metavar="PATH"), Local()]
    # cpu, cuda, cuda:1, ...; with several ranks cuda is a GPU for each
    device: Annotated[str, Local(value=True)] = "cpu"
    threads: Threads = 0  # CPU threads per rank; 0: the machine's cores over its ranks
    timeout: Seconds = 600.0  # seconds after which a collective that cannot finish is an error


@dataclass
class Prompt(Checked):
    """What is continued."""

    # the text to continue; several are continued each, as one batch; none: a line end, unless there is a --prompt-file
    # or --state
    prompt: list[str] = field(default_factory=list)
    chat: bool = False  # every --prompt is a turn of the model's chat template, and what comes is the answer
    prompt_file: File = None  # a text that comes before every --prompt, read once
    state: File = None  # go on from a text that --save-state kept, before --prompt-file and --prompt
    save_state: File = None  # keep the state after the prompt, for this model only (safetensors)
    piece: Count = 8192  # tokens of a prompt that a rank reads at a time

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.save_state is not None and len(self.prompt) > 1:
            raise UserError(f"--save-state: expected one prompt whose state to keep, got {len(self.prompt)}")


@dataclass
class NewText(Checked):
    """How much is written, and how tokens are drawn."""

    tokens: Natural = 500  # tokens to generate
    temperature: float = 0.8  # 0: always the likeliest token
    greedy: bool = False  # the same as --temperature 0
    top_k: int = 40  # draw from the likeliest N; 0: from all
    top_p: float = 1.0  # draw from the likeliest tokens that together have this probability
    seed: Natural = 0  # seed of the draws; prompt i draws with seed + i
    stats: bool = False  # say tokens per second and the size of the state, on standard error

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            self.sampling = Sampling(0.0 if self.greedy else self.temperature, self.top_k, self.top_p)
        except ValueError as exc:
            raise UserError(f"--{str(exc).replace('_', '-')}") from exc


@dataclass
class GenerateConfig:
    """What to continue, and how."""

    model: ModelSource
    prompt: Prompt = field(default_factory=Prompt)
    new_text: NewText = field(default_factory=NewText)
