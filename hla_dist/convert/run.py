"""A conversion from a folder to a folder, stage by stage; needs the extra ``hf``. The program is launch/convert.py.

OUT/options.json          what was asked for, of which weights and text; in the same directory others are refused
OUT/layers/               each layer when its transfer is done: a conversion that was stopped goes on from there
OUT/model/                the converted model as a folder of transformers, with its tokenizer
OUT/summary.md            perplexities before, after each stage and of the teacher, and how the memory is used
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm
from tyro.conf import arg

from hla_dist.convert.distill import distill
from hla_dist.convert.recipes import RECIPES
from hla_dist.convert.swap import converted, mixer_of, swap
from hla_dist.convert.transfer import STORED, LayerError, transfer
from hla_dist.convert.usage import Usage, exp_mean, row_losses, usage
from hla_dist.data.sources import LeftOut, read_documents
from hla_dist.generation.prompt_state import fingerprint
from hla_dist.huggingface import load_softmax, to_huggingface
from hla_dist.huggingface.speech import PretrainedCodec
from hla_dist.models import LanguageModel
from hla_dist.models.language_model import CHECKPOINTING
from hla_dist.processes.failure import UserError, describe, reporting, together
from hla_dist.processes.lock import Owner, holding
from hla_dist.processes.options import Amount, Checked, Count, Local, Natural, Paths, Seconds, Threads, one_of
from hla_dist.processes.whole_file import whole_file, write_json
from hla_dist.training.continuation import refuse_run

OPTIONS = "options.json"
USAGE_ROWS, USAGE_TOKENS = 8, 16_384  # are read three times: so many rows, of no more tokens, one at least
STAGES = ("all", "transfer", "distill")
# amounts that transferred layers do not depend on
LATER = ("distill_rows", "held_out", "between", "other", "other_rows", "distill_steps", "distill_lr",
         "window_dropout", "longer_steps", "batch")  # fmt: skip
JOINED = 4  # rows that are one of the stage on longer rows
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Asked(Checked):
    """What becomes of which model."""

    # the pretrained model: a folder of transformers or a .gguf file
    source: Annotated[str, arg(name="from", metavar="PATH"), Local()]
    data: Paths  # text to learn from and, its end, to measure on: files, .jsonl, .parquet, folders, hf:NAME
    out: Annotated[str, arg(metavar="DIR"), Local()]  # the directory of this conversion
    recipe: Annotated[str, one_of(*RECIPES)] = "lolcats"
    stage: Annotated[str, one_of(*STAGES)] = "all"  # stop after transfer; or only distill what has been transferred
    window: Natural = 0  # tokens of the exact window; 0: the recipe's


@dataclass
class Amounts(Checked):
    """How much of the text is used, and how long."""

    seq_len: Count = 512  # tokens of a row
    rows: Count = 40  # rows to learn from; transfer holds the hidden states of all at once
    distill_rows: Natural = 0  # rows that distill alone learns from, behind those; 0: the same rows
    held_out: Count = 20  # rows to measure on, the last of the text
    between: Natural = 0  # of these rows, those that swap and transfer are measured on; 0: all
    other: Annotated[list[str], arg(metavar="PATH [PATH ...]"), Local()] = field(default_factory=list)  # text elsewhere
    other_rows: Natural = 0  # rows of that text to measure on, the first; 0: as many as are held out
    transfer_steps: Count = 40  # steps per layer
    transfer_batch: Count = 2  # rows of such a step; of rows of 4,096 tokens one is enough
    transfer_lr: Amount = 0.0  # the highest learning rate of feature maps or layers; 0: the recipe's
    distill_steps: Count = 20
    distill_lr: Amount = 0.0  # the highest learning rate of distill; 0: the recipe's
    # share of tokens without a window at the first step of distill and at the last, linear between; else the recipe's
    window_dropout: Annotated[list[float], arg(metavar="FIRST LAST")] = field(default_factory=list)
    # steps of a last stage on the next tokens of rows four times as long, behind distill; of radlads only; 0: none
    longer_steps: Natural = 0
    batch: Count = 1  # rows of a step of distill
    seed: Natural = 0


@dataclass
class Machine(Checked):
    """Where it runs."""

    device: Annotated[str, Local(value=True)] = "cpu"  # cpu, cuda, cuda:1, ...; with several ranks a GPU for each
    dtype: Annotated[str, one_of(*DTYPES)] = "float32"  # of what is kept of the model; what is new is float32
    threads: Threads = 0  # CPU threads per rank; 0: the machine's cores over its ranks
    # what backward of distill computes again to save memory, as for launch/train.py: for long rows
    checkpoint_activations: Annotated[str, one_of(*CHECKPOINTING, alone="layer")] = "none"
    timeout: Seconds = 3600.0  # seconds after which a collective that cannot finish is an error
    # take --out although a conversion on another machine was at work in it less than its --timeout ago: if you know
    # that it is over
    break_lock: bool = False


@dataclass
class ConvertConfig:
    """A pretrained softmax model in, a model of this library out."""

    asked: Asked
    amounts: Amounts = field(default_factory=Amounts)
    machine: Machine = field(default_factory=Machine)


class Conversion:
    """One run of the program; every rank has both models, rank 0 measures and writes."""

    def __init__(self, config: ConvertConfig, device: torch.device, group: Any, say: Callable[[str], None]) -> None:
        self.config, self.device, self.group, self.say = config, device, group, say
        self.rank = 0 if group is None else dist.get_rank(group)
        self.out, self.recipe = Path(config.asked.out), RECIPES[config.asked.recipe]
        self.layers = self.out / "layers"
        self.losses: dict[str, dict[str, list[float]]] = {}  # of each stage and text: nats per token, row by row
        self.kept = 0  # layers of an earlier run
        self.began = time.monotonic()

    def run(self) -> None:
        asked, amounts = self.config.asked, self.config.amounts
        if amounts.seq_len < 2:
            raise UserError(f"--seq-len: expected at least 2, a token and the one after it, got {amounts.seq_len}")
        if self.recipe.transfer is not None and amounts.rows < 2:
            raise UserError(f"--rows: expected at least 2, of which transfer holds one out, got {amounts.rows}")
        name, rows = ("--distill-rows", amounts.distill_rows) if amounts.distill_rows else ("--rows", amounts.rows)
        if asked.stage != "transfer" and amounts.batch > rows:
            raise UserError(f"--batch: expected at most the {rows} rows ({name}), got {amounts.batch}")
        if amounts.between > amounts.held_out:
            raise UserError(f"--between: expected at most the {amounts.held_out} rows held out, got {amounts.between}")
        if amounts.longer_steps and self.recipe.longer is None:
            raise UserError(f"--longer-steps: expected none, since {asked.recipe} has no stage on longer rows, got "
                            f"{amounts.longer_steps}")  # fmt: skip
        if amounts.longer_steps and rows < (least := JOINED * amounts.batch):
            raise UserError(f"--longer-steps: expected at least {least} rows ({name}), of which {JOINED} are joined "
                            f"into one, got {rows}")  # fmt: skip
        if asked.stage == "transfer" and self.recipe.transfer is None:
            raise UserError(f"--stage: expected all or distill, since the recipe {asked.recipe} has no transfer")
        if asked.window and "memory" not in self.recipe.swap:
            raise UserError(f"--window: expected none, since {asked.recipe} has no window, got {asked.window}")
        options = dict(self.recipe.swap)
        if asked.window:
            options["memory"] = {**options["memory"], "window": asked.window}
        window = options.get("memory", {}).get("window", 0)
        if dropout := amounts.window_dropout:
            if options.get("memory", {}).get("memory") != "all":
                raise UserError(f"--window-dropout: expected none, since {asked.recipe} has no memory of all tokens "
                                f"beside a window, got {dropout}")  # fmt: skip
            if len(dropout) != 2 or not all(0 <= share <= 1 for share in dropout):
                raise UserError(f"--window-dropout: expected two shares from 0 to 1, got {dropout}")
        if window >= amounts.seq_len:
            raise UserError(f"--window: expected below the {amounts.seq_len} tokens of a row (--seq-len), got {window}")
        machine = self.config.machine
        owner = Owner.this_process("", machine.timeout, under_launcher=False)
        with holding(self.out, self.group, owner, machine.break_lock, False, self.say):
            self._convert(options)

    def _convert(self, options: dict[str, Any]) -> None:
        wanted = together(self.group, self._wanted)
        teacher, self.codec = together(self.group, self._load)
        self.texts = together(self.group, self._rows)
        student = together(self.group, lambda: self._swap(teacher, options))
        wanted["read"] = together(self.group, lambda: self._what_was_read(teacher))
        together(self.group, lambda: self._begin(student, wanted))
        self._measure("teacher", teacher)
        self._measure("swapped in, untrained", student, self.config.amounts.between)
        errors = self._transfer(student, teacher)
        losses = self._distill(student, teacher) if self.config.asked.stage != "transfer" else []
        if self.rank == 0:
            self._write(student, errors, losses)

    def _wanted(self) -> dict[str, dict[str, Any]]:
        """The options that make it this conversion; UserError where the directory holds one with others."""
        wanted = asdict(self.config)
        for name in ("out", "stage"):
            del wanted["asked"][name]
        for name in LATER:
            del wanted["amounts"][name]
        wanted["machine"] = {"dtype": self.config.machine.dtype}
        refuse_run(self.out, "--out", held=True)
        self._refuse_others(wanted)
        return wanted

    def _swap(self, teacher: LanguageModel, options: dict[str, Any]) -> LanguageModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.amounts.seed)  # of what the new layers have of their own
            return swap(teacher, **options).to(self.device)

    def _what_was_read(self, teacher: LanguageModel) -> dict[str, Any]:
        """What the layers are of: a path alone does not tell."""
        text = self.texts["transfer"].cpu().numpy().tobytes()
        return {"weights": fingerprint(teacher), "text": hashlib.sha256(text).hexdigest()}

    def _refuse_others(self, wanted: dict[str, dict[str, Any]]) -> None:
        file = self.out / OPTIONS
        try:
            before = json.loads(file.read_text()) if file.is_file() else wanted
            before = {"read": wanted.get("read"), **before}  # an earlier version did not say
            names = [
                name for group, values in wanted.items() for name in sorted(values | before[group])
                if before[group].get(name) != values.get(name)
            ]  # fmt: skip
        except (ValueError, KeyError, TypeError) as exc:
            raise UserError(f"{file}: expected the options of a conversion in JSON, got {describe(exc)}") from exc
        if names:
            raise UserError(f"--out: expected a new directory, or the options of the conversion in {file}, got others: "
                            f"{', '.join(names)}")  # fmt: skip

    def _begin(self, student: LanguageModel, wanted: dict[str, dict[str, Any]]) -> None:
        """Take the directory, once nothing more can be wrong with what was asked for."""
        self._refuse_others(wanted)
        layers = converted(student)
        missing = [n for n in layers if not (self.layers / STORED.format(n)).is_file()]
        self.kept = 0 if self.recipe.transfer is None else len(layers) - len(missing)
        if self.config.asked.stage == "distill" and self.recipe.transfer is not None and missing:
            raise UserError(f"--stage: expected layers {missing} to be in {self.layers} for distill, "
                            "run transfer first")  # fmt: skip
        if self.rank == 0:
            with reporting(f"--out: cannot write {self.out}"):
                write_json(self.out / OPTIONS, wanted)

    def _load(self) -> tuple[LanguageModel, PretrainedCodec]:
        path = Path(self.config.asked.source)
        model = load_softmax(path, DTYPES[self.config.machine.dtype])
        return model.to(self.device), PretrainedCodec(path)

    def _rows(self) -> dict[str, Tensor]:
        """Rows that each stage learns from, those behind them to measure on, one between them left out, and those of
        other text.
        """
        amounts = self.config.amounts
        learned = amounts.rows + amounts.distill_rows
        rows = self._cut(self.config.asked.data, "--data", learned + 1 + amounts.held_out)
        of_distill = slice(amounts.rows, learned) if amounts.distill_rows else slice(learned)
        texts = {"transfer": rows[: amounts.rows], "distill": rows[of_distill], "held out": rows[learned + 1 :]}
        if amounts.other:
            texts["other text"] = self._cut(amounts.other, "--other", amounts.other_rows or amounts.held_out)
        return {name: tokens.to(self.device) for name, tokens in texts.items()}

    def _cut(self, paths: list[str], name: str, wanted: int) -> Tensor:
        seq_len, left_out = self.config.amounts.seq_len, LeftOut()
        tokens: list[int] = []
        try:
            for document in read_documents(paths, left_out=left_out):
                tokens += self.codec.encode_file(document.text).tolist()
                if len(tokens) >= wanted * seq_len:
                    break
        except UserError as exc:  # it takes every text for --data
            raise UserError(str(exc).replace("--data", name, 1)) from exc
        if len(tokens) < wanted * seq_len:
            raise UserError(f"{name}: expected {wanted} rows of {seq_len} tokens, got {len(tokens) // seq_len} rows")
        return torch.tensor(tokens[: wanted * seq_len]).view(wanted, seq_len)

    def _measure(self, stage: str, model: LanguageModel, first: int = 0) -> None:
        """Measure on the texts' first rows; 0: on all."""
        if self.rank == 0:
            texts = {name: rows[: first or None] for name, rows in self.texts.items() if name not in STAGES}
            with self._bar(f"perplexity, {stage}", sum(map(len, texts.values())), "row") as bar:
                self.losses[stage] = {name: row_losses(model, rows, bar.update) for name, rows in texts.items()}
            shown = ", ".join(f"{value:.4g} on {name}" for name, (value, _) in self._perplexities()[stage].items())
            self.say(f"perplexity, {stage}: {shown}")

    def _perplexities(self) -> dict[str, dict[str, tuple[float, float]]]:
        """Each stage's perplexity of each text, and its ratio to the teacher's of the same rows."""
        teacher = self.losses["teacher"]
        of = lambda losses, known: (exp_mean(losses), exp_mean(losses) / exp_mean(known[: len(losses)]))  # noqa: E731
        return {
            stage: {text: of(losses, teacher[text]) for text, losses in texts.items()}
            for stage, texts in self.losses.items()
        }

    def _transfer(self, student: LanguageModel, teacher: LanguageModel) -> list[LayerError]:
        options = self.recipe.transfer
        if options is None:
            return []
        amounts = self.config.amounts
        if amounts.transfer_lr:
            options = {**options, "lr": amounts.transfer_lr}
        with self._bar("transfer", len(converted(student)), "layer") as bar:
            errors = transfer(
                student, teacher, self.texts["transfer"], steps=amounts.transfer_steps,
                batch=amounts.transfer_batch, directory=self.layers, group=self.group, seed=amounts.seed, **options,
                report=lambda error: self._step(bar, f"layer {error.layer}: missed {error.after:.3f}"),
            )  # fmt: skip
        self._measure("after transfer", student, 0 if self.config.asked.stage == "transfer" else amounts.between)
        return errors

    def _distill(self, student: LanguageModel, teacher: LanguageModel) -> list[float]:
        options, amounts, rows = dict(self.recipe.distill), self.config.amounts, self.texts["distill"]
        if amounts.distill_lr:
            options["lr"] = amounts.distill_lr
        if amounts.window_dropout:
            options["window_dropout"] = tuple(amounts.window_dropout)
        student.activation_checkpointing = self.config.machine.checkpoint_activations
        losses = self._learn("distill", student, teacher, rows, amounts.distill_steps, options)
        if amounts.longer_steps and self.recipe.longer is not None:
            joined = rows[: len(rows) // JOINED * JOINED].reshape(-1, JOINED * rows.shape[1])
            self._learn("longer rows", student, teacher, joined, amounts.longer_steps, self.recipe.longer)
        return losses

    def _learn(
        self, stage: str, student: LanguageModel, teacher: LanguageModel, rows: Tensor, steps: int,
        options: dict[str, Any],
    ) -> list[float]:  # fmt: skip
        amounts = self.config.amounts
        with self._bar(stage, steps, "step") as bar:
            losses = distill(
                student, rows, teacher=teacher if options.get("kl") else None,
                steps=steps, batch=amounts.batch, group=self.group, seed=amounts.seed, **options,
                report=lambda _, loss: self._step(bar, f"loss {loss:.3f}"),
            )  # fmt: skip
        self._measure(f"after {stage}", student)
        return losses

    def _usage_rows(self) -> int:
        amounts = self.config.amounts
        return min(amounts.held_out, USAGE_ROWS, max(1, USAGE_TOKENS // amounts.seq_len))

    def _bar(self, stage: str, total: int, unit: str) -> Any:
        return tqdm(total=total, desc=stage, unit=unit, disable=self.rank > 0, dynamic_ncols=True)

    def _step(self, bar: Any, text: str) -> None:
        bar.set_postfix_str(text, refresh=False)
        bar.update()

    def _write(self, student: LanguageModel, errors: list[LayerError], losses: list[float]) -> None:
        used = usage(student, self.texts["held out"][: self._usage_rows()]) if "memory" in self.recipe.swap else None
        self.codec.save(to_huggingface(student.float().cpu().state_dict(), student.config), self.out / "model")
        text = "\n".join(self._summary(student, errors, losses, used)) + "\n"
        with whole_file(self.out / "summary.md") as partial:
            partial.write_text(text)
        measured = {
            what: {
                stage: {text: pair[n] for text, pair in texts.items()} for stage, texts in self._perplexities().items()
            }
            for n, what in enumerate(("perplexity", "over_teacher"))
        }
        figures = {**measured, "transfer": [error._asdict() for error in errors], "losses": losses}
        write_json(self.out / "summary.json", {**figures, "usage": used and used._asdict()})
        print(text, end="")

    def _summary(
        self, student: LanguageModel, errors: list[LayerError], losses: list[float], used: Usage | None
    ) -> Iterator[str]:
        asked, between = self.config.asked, self.config.amounts.between
        yield from (f"# {asked.source}, converted", "", f"Recipe {asked.recipe}: {self.recipe.about}.", "")
        texts = self.losses["teacher"]
        columns = [f"{text}, {what}" for text in texts for what in ("perplexity", "over the teacher's")]
        yield f"| | {' | '.join(columns)} |"
        yield "|---|" + "---|" * len(columns)
        for stage, values in self._perplexities().items():
            cells = [f"{value:.4g} | {ratio:.3f}" for value, ratio in values.values()]
            yield f"| {stage} | {' | '.join(cells)} |"
        rows_of = {stage: max(map(len, of.values())) for stage, of in self.losses.items()}
        if few := [stage for stage, rows in rows_of.items() if rows < rows_of["teacher"]]:
            yield from ("", f"{'; '.join(few).capitalize()}: measured on the first {between} rows of each text, with "
                        "ratios to the teacher on the same rows.")  # fmt: skip
        if errors:
            before, after = (sum(x) / len(errors) for x in zip(*((e.before, e.after) for e in errors)))
            worst = max(errors, key=lambda e: e.after)
            figures = f"{before:.3f} before, {after:.3f} after, at most {worst.after:.3f} (layer {worst.layer})"
            what = "heads'" if self.recipe.swap.get("memory") else "layers'"
            yield from ("", f"Transfer: of the power of the {what} outputs, held-out rows, new layers miss {figures}.")
        if self.kept:
            yield from (
                "",
                f"{self.kept} of {len(errors)} layers were transferred by an earlier run and only read here.",
            )
        if losses:
            yield from ("", f"Distill: loss {losses[0]:.4f} at the first step, {losses[-1]:.4f} at the last.")
        yield from ("", "## How the memory is used", "")
        if used is None:
            yield "There is no window beside it: it is all that the layers have."
        else:
            rows = self._usage_rows()
            of = {"all": "all tokens, those in the window too", "before": "the tokens that have left the window alone"}
            held = of[mixer_of(student, converted(student)[0]).memory]
            yield from (f"On {rows} of the held-out rows. The memory was trained to hold {held}.", "", *used.lines())
        yield from ("", f"This run took {time.monotonic() - self.began:.0f} s of wall clock.")
