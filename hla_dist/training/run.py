"""A training run from configuration to last line: what `launch/train.py` does once the ranks are connected."""

import math
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from hla_dist.checkpoints import directory as checkpoints
from hla_dist.checkpoints.saver import Saver
from hla_dist.checkpoints.tensors import capture, read_random
from hla_dist.checkpoints.weights import HINT, Weights, described, put_weights, read_weights
from hla_dist.data.bigram import bigram_bits
from hla_dist.data.corpus import Corpus, load_corpus
from hla_dist.data.fingerprint import changes, check_alike
from hla_dist.data.packing import cuts_between
from hla_dist.data.text import BYTES
from hla_dist.data.windows import cut, held_out_windows
from hla_dist.generation.generate import generate
from hla_dist.models import LanguageModel, ModelConfig
from hla_dist.parallel.collectives import group_size
from hla_dist.parallel.shard import default_lengths
from hla_dist.processes.failure import UserError, expect, reporting, together
from hla_dist.processes.lock import DirectoryLock, followed
from hla_dist.processes.mesh import MeshPlace
from hla_dist.processes.stop import StopSignal
from hla_dist.processes.whole_file import write_json
from hla_dist.training.config import RUN_FILES, TrainConfig
from hla_dist.training.continuation import JobInfo, check_out, decide, run_in
from hla_dist.training.determinism import be_deterministic, check_equal_parameters, random_state, set_random_state
from hla_dist.training.fully_sharded import distributed, whole_state
from hla_dist.training.loop import Trainer
from hla_dist.training.meter import Meter
from hla_dist.training.metrics import MetricsLog, perplexity, plot_loss
from hla_dist.training.optim import build_adamw, lr_factor
from hla_dist.training.parity import Parity, check_parity


class TrainingRun:
    """State of one run on one rank. Rank 0 writes and prints; all ranks compute."""

    def __init__(
        self,
        config: TrainConfig,
        mesh: MeshPlace,
        stop: StopSignal,
        started: float,
        job: JobInfo | None = None,
        lock: DirectoryLock | None = None,
    ) -> None:
        data, optimisation, ranks, output = config.data, config.optimisation, config.ranks, config.output
        self.config = config
        self.job = job or JobInfo()
        self.lock = lock  # of --out, on the first rank
        self.mesh = mesh
        self.stop = stop
        self.started = started  # time.monotonic() at the start of the program
        self.main = mesh.rank == 0
        self.step = 0
        self.saved = -1  # the step of the last checkpoint
        self.log: MetricsLog | None = None
        self.out = None if output.out is None else followed(Path(output.out))
        self.start = decide(config, self.job, mesh.world)
        self.resumed: checkpoints.Checkpoint | None = None
        weights = self._open_weights()
        # the configuration stays as it was given: a restart is known by it
        self.tokenizer, self.vocab_size = data.tokenizer, data.vocab_size
        self.stored: ModelConfig | None = None  # the model, where a file describes it and no option does
        if weights is not None and weights.model is not None and not config.describes_model:
            self.stored, self.tokenizer = weights.model, data.tokenizer or weights.tokenizer
            if self.tokenizer is not None and data.tokenizer != BYTES:  # it may be rounded up from the tokenizer's
                self.vocab_size = data.vocab_size or self.stored.vocab_size
            reader = "" if self.tokenizer is None else f", its tokenizer {self.tokenizer}"
            self.say(f"the model is as {weights.path} describes it{reader}")
        self.corpus: Corpus = together(mesh.world, self._load_corpus, patient=True)
        check_alike(self.corpus.fingerprint, self.corpus.description, mesh.world)
        self.model_config: ModelConfig = together(mesh.world, self._describe_model)
        if optimisation.deterministic:
            be_deterministic()
        torch.manual_seed(optimisation.seed)  # the same on every rank: parameters start equal
        model = together(mesh.world, lambda: LanguageModel(self.model_config))
        if weights is not None and self.resumed is None:
            self._init_from(weights, model)
        del weights
        model = model.to(mesh.device)
        if self.start.source is None:  # FSDP2 would take its slices from ranks that differ
            where = "--init-from" if output.init_from is not None else "--seed"
            check_equal_parameters(model, mesh.world, f"{where} gives other parameters there")
        model.activation_checkpointing = optimisation.checkpoint_activations
        self.parameters = sum(p.numel() for p in model.parameters())
        self.model = distributed(
            model, mesh, shard_lengths=default_lengths(data.seq_len, mesh.shards), exchange=ranks.exchange,
            wire_dtype=torch.bfloat16 if ranks.bf16_wire else None, on_host=optimisation.offload_parameters,
        )  # fmt: skip
        optimizer = build_adamw(self.model, optimisation.lr, optimisation.weight_decay)
        together(mesh.world, self._check_data)
        windows = self.corpus.windows(data.seq_len, self.model_config.vocab_size, optimisation.seed, self.packed)
        self.trainer = Trainer(
            self.model, optimizer, windows, mesh, batch_size=optimisation.batch_size,
            accumulate=optimisation.accumulate, clip=optimisation.clip, bf16=optimisation.bf16,
            offload=optimisation.offload_activations,
        )  # fmt: skip
        self.starts = held_out_windows(self.corpus.held_out, data.seq_len, output.eval_tokens)
        # bits per byte, or per token where the text behind the tokens is not known
        self.unit = "bits per byte" if self.corpus.bytes_per_token else "bits per token"
        self.per_unit = 1 / (math.log(2) * (self.corpus.bytes_per_token or 1.0))
        self.meter = Meter(self.model_config, data.seq_len, group_size(mesh.world), mesh.device)
        self.saver = None
        if self.out is not None:
            # without a group for it there is no second thread
            self.saver = Saver(
                self.out / "checkpoints", output.keep, mesh.saving or mesh.world,
                output.async_save and mesh.saving is not None, self.job.faults.saving,
            )  # fmt: skip
        self._resume()
        together(mesh.world, self._open_output)

    def _open_weights(self) -> Weights | None:
        """What the run begins with: of a checkpoint to resume from, what it says of its model, else --init-from's."""
        world, path = self.mesh.world, self.config.output.init_from
        if self.start.source is None:
            return None if path is None else read_weights(Path(path), world)
        self.resumed = checkpoints.open_checkpoint(self.start.source, world)
        return together(world, partial(described, self.resumed))

    def _describe_model(self) -> ModelConfig:
        vocabulary = self.vocab_size or self.corpus.vocab_size
        if self.stored is None:
            return self.config.model_config(vocabulary)
        size = self.stored.vocab_size
        expect(vocabulary == size, "--tokenizer, --vocab-size", f"those of the model, {size:,} tokens", vocabulary)
        return self.stored

    def _load_corpus(self) -> Corpus:
        data = self.config.data
        return load_corpus(
            data.data, seq_len=data.seq_len, held_out=data.held_out, tokenizer=self.tokenizer,
            vocab_size=self.vocab_size, token_dtype=None if data.token_dtype == "none" else data.token_dtype,
            text_field=data.text_field, end_token=data.end_token, weights=data.data_weights,
            verify=self.main if data.verify_data is None else data.verify_data, whole=bool(data.verify_data),
        )  # fmt: skip

    @property
    def packed(self) -> bool:
        return self.config.data.packing == "documents"

    def _check_data(self) -> None:
        readable, given = "text, or a memmap with the JSON that launch/prepare.py writes", self.corpus.description
        expect(not self.packed or self.corpus.has_documents, "--packing documents", readable, f"{given} without")
        if self.config.output.sample:  # not at the end of the run
            prompt, size = self.config.output.prompt, self.model_config.vocab_size
            tokens = self.corpus.codec.encode(prompt)
            some = f"at least one token to continue, all of the vocabulary of {size}"
            expect(tokens and max(tokens) < size, "--prompt", some, f"{prompt!r}: {tokens}")

    def _init_from(self, weights: Weights, model: LanguageModel) -> None:
        """Begin with these parameters; what their model says of itself and this one's differs in is a line."""
        together(self.mesh.world, lambda: put_weights(weights, model))
        self.say(f"begins with the parameters of {weights.path}")
        for name in self.model_config.differences(weights.model) if weights.model is not None else []:
            before, now = getattr(weights.model, name), getattr(self.model_config, name)
            self.warn(f"--init-from: {name} of {weights.path} is {before}, here it is {now}", all_ranks=False)

    def _resume(self) -> None:
        """Go on from a checkpoint if the options say so, or if this launch has been here before."""
        world = self.mesh.world
        if self.resumed is None:
            if self.start.data is not None:
                self._compare_data(self.start.data, "the earlier life of this run")
            return
        saved = self.resumed
        for line in saved.passed_over:
            self.warn(f"{line}; going on from {saved.path}", all_ranks=False)

        def load() -> None:
            before = ModelConfig.from_dict(saved.state["model"])
            for name in self.model_config.differences(before):  # parameters of the same shapes do not tell
                stored, configured = getattr(before, name), getattr(self.model_config, name)
                expected = f"the model of {saved.path}, {name} {stored!r}"
                raise UserError(f"checkpoint: expected {expected}, got {configured!r}{HINT}")
            checkpoints.load(saved, self.model, self.trainer.optimizer)
            self._compare_data(saved.state.get("data"), str(saved.path))
            self.step = saved.step
            self._find_position(saved.state)
            self.saved = self.step if self.start.in_place else -1
            steps = self.config.optimisation.steps
            if self.step >= steps and not self.start.by_itself:
                raise UserError(f"--steps: expected more than the {self.step} of {saved.path}, got {steps}")
            random = read_random(saved.path, self.mesh.rank)
            if random is not None and int(saved.state["ranks"]) == group_size(world):
                set_random_state(random)

        together(world, load, patient=True)
        if self.job.restart:
            self.say(f"restart {self.job.restart}: going on from {saved.path}")

    def _compare_data(self, before: dict[str, Any] | None, name: str) -> None:
        """UserError, or with --allow-changed-data a line, unless ``before``, the data of ``name``, are these."""
        if before is None:
            self.warn(f"{name} does not know its data: nobody can say whether they have changed", all_ranks=False)
            return
        if not (changed := changes(before, self.corpus.fingerprint)):
            return
        same, other = f"what {name} was trained on (or --allow-changed-data)", f"other data: {changed}"
        expect(self.config.data.allow_changed_data, "--data", same, f"{other} ({self.corpus.description})")
        self.warn(f"going on from {name} with other data: {changed}", all_ranks=False)

    def _find_position(self, state: dict[str, Any]) -> None:
        """Where the data goes on: at the same window, or for another ``--seq-len`` at the same token of the epoch."""
        samples, length = int(state["samples"]), self.config.data.seq_len
        before = int(state["run"].get("seq_len", length))
        position = samples * before
        self.trainer.samples = samples if before == length else -(-position // length)
        self.trainer.tokens = int(state.get("tokens", position))  # older checkpoints: all of one length
        if before != length:
            self.say(f"--seq-len is {length:,}, was {before:,}: the data goes on at its token {position:,}")

    def _open_output(self) -> None:
        if self.out is not None and self.main:
            with reporting(f"--out: cannot write {self.out}"):
                self._open_directory(self.out)

    def _open_directory(self, out: Path) -> None:
        expect(not out.exists() or out.is_dir(), "--out", "a directory", f"the file {out}")
        own = self.start.in_place
        if not own and run_in(out) is not None:
            aside = move_aside(out) if self.lock is None else self.lock.move(lambda: move_aside(out))
            self.say(f"the earlier run in {out} is now {aside}")
        elif not own and (others := check_out(out)):
            self.warn(f"{out} holds something else too: {others}", all_ranks=False)
        if own:
            for path in checkpoints.set_aside_later(out / "checkpoints", self.step):
                self.warn(f"a later checkpoint is now {path}", all_ranks=False)
        out.mkdir(parents=True, exist_ok=True)
        resolved = {
            "run": self.config.to_dict(),
            "model": self.model_config.to_dict(),
            "parameters": self.parameters,
            "ranks": group_size(self.mesh.world),
            "shards": self.mesh.shards,
            "mesh": self.mesh.degrees and asdict(self.mesh.degrees),
            "device": self.mesh.device.type,
            "data": self.corpus.description,
            "torch": torch.__version__,
            "launch": self.job.name,
        }
        write_json(out / "config.json", resolved | {"fingerprint": self.corpus.fingerprint})
        self.log = MetricsLog(out, self.step if own else None, self.config.output.wandb, resolved)

    def train(self) -> int:
        """The whole run; returns the exit code. Raises UserError alike on every rank."""
        try:
            return self._train()
        except Exception:
            if self.log is not None:
                self.log.abandon()
            raise

    def _train(self) -> int:
        mixers = self.model_config.pattern or self.model_config.op
        self.say(
            f"{self.parameters:,} parameters, {mixers}; {self.config.data.seq_len:,} tokens per sequence over "
            f"{self.mesh.shards} rank(s), {self.mesh.replicas} replica(s)" + self.mesh.sharding
        )
        evaluated = len(self.starts) * self.config.data.seq_len
        self.say(
            f"text: {self.corpus.description}; {self.corpus.train_tokens:,} tokens to train on, "
            f"{len(self.corpus.held_out):,} held out, evaluation on {evaluated:,} of them"
        )
        for note in self.corpus.notes:
            self.warn(note, all_ranks=False)
        first = self.evaluate()
        if first is None:
            return self._stopped()
        history = self.log.history if self.log is not None else []
        before = next((line["held_out"] for line in history if line.get("held_out") is not None), first)
        if not history or history[-1]["step"] < self.step:  # a run resumed in place has this line
            self.write(held_out=first, tokens=self.trainer.tokens)
        # a restart may find that nothing but the end is left to do
        last, speed = self._loop(first) if self.step < self.config.optimisation.steps else (first, 0.0)
        if last is None:
            return self._stopped()
        self.save(wait=True)
        self.stop.end_steps()
        return self._finish(before, last, speed)

    def _check_lock(self) -> None:
        if self.lock is not None and self.lock.lost:
            raise UserError(f"--out: another run has taken {self.out}, this one ends after step {self.step}")

    def _stopped(self) -> int:
        """The end of a run that a signal stops; returns the exit code."""
        together(self.mesh.world, self._check_lock)
        self.save(wait=True)
        how = f"; continue with --resume --out {self.out}" if self.out else ""
        self.say(f"stopped by {self.stop.name} after step {self.step}{how}")
        self._close()
        return self.stop.exit_code

    def _loop(self, loss: float) -> tuple[float | None, float]:
        """Steps until the end; returns the last held-out loss (None if stopped by a signal) and tokens per second."""
        steps, often = self.config.optimisation.steps, 0.5 if sys.stderr.isatty() else 10.0
        with tqdm(total=steps, initial=self.step, disable=not self.main, unit="step", dynamic_ncols=True,
                  mininterval=often) as bar:  # fmt: skip
            return self._steps(bar, loss)  # closed after an error too, which then has a line of its own

    def _steps(self, bar: Any, loss: float) -> tuple[float | None, float]:
        optimisation, output, check_every = self.config.optimisation, self.config.output, self.config.ranks.check_every
        tokens = seconds = 0.0
        bad_steps = 0
        while True:
            self.meter.start(self.trainer.data_seconds)
            self.job.faults.before(self.step + 1, self.model.module)
            # only all ranks together can find out why
            failed = (self.saver is not None and self.saver.failed) or (self.lock is not None and self.lock.lost)
            agreed = self.trainer.compute_gradients(bool(self.stop) or failed, self._clock())
            after_warmup = (self.step - optimisation.warmup) / max(optimisation.steps - optimisation.warmup, 1)
            progress = max(after_warmup, agreed.clock)
            lr = optimisation.lr * lr_factor(self.step, optimisation.warmup, progress, optimisation.min_lr)
            bad_steps = 0 if self.trainer.step(agreed, lr) else bad_steps + 1
            self.step += 1
            cost = self.meter.read(self.trainer.tokens_per_step, self.trainer.data_seconds)
            seconds += cost["step_s"]
            tokens += self.trainer.tokens_per_step
            if bad_steps:
                self._skipped(bad_steps, agreed.blame)
            if check_every and self.step % check_every == 0:
                check_equal_parameters(self.model.module, self.mesh.world)
            end = self.step >= optimisation.steps or agreed.clock >= 1
            held_out, stopped = None, agreed.stop
            if not stopped and (end or self.step % output.eval_every == 0):
                held_out = self.evaluate()
                stopped, loss = held_out is None, loss if held_out is None else held_out
            self.write(
                loss=agreed.loss, **{self.unit.replace(" ", "_"): agreed.loss * self.per_unit},
                perplexity=perplexity(agreed.loss), tokens=self.trainer.tokens, grad_norm=agreed.grad_norm, lr=lr,
                held_out=held_out, skipped=bool(bad_steps) or None, **cost,
            )  # fmt: skip
            bar.set_postfix_str(f"loss {agreed.loss:.3f}, held out {loss:.3f} {self.unit}", refresh=False)
            bar.update()
            if end or stopped:
                return (None if stopped else loss), tokens / seconds
            if output.save_every and self.step % output.save_every == 0:
                self.save()

    def _clock(self) -> float:
        """Share of the time budget that is over; 0 without a budget."""
        minutes = self.config.optimisation.max_minutes
        return (time.monotonic() - self.started) / (60 * minutes) if minutes else 0.0

    def evaluate(self) -> float | None:
        """Held-out loss in the run's unit, the same on every rank; None where a signal to any of them broke it off."""
        documents = self.corpus.held_out_documents if self.packed else None
        loss = self.trainer.evaluate(self.corpus.held_out, self.starts, documents, lambda: bool(self.stop))
        return None if loss is None else loss * self.per_unit

    def bigram(self) -> float | None:
        """The bigram model's held-out loss in the run's unit, on the labels that :meth:`evaluate` scores."""
        size = self.model_config.vocab_size
        windows = [cut(self.corpus.held_out, start, self.config.data.seq_len, size).numpy() for start in self.starts]
        if self.packed and (documents := self.corpus.held_out_documents) is not None:
            cuts = [cuts_between(documents, start, self.config.data.seq_len).numpy() for start in self.starts]
            pieces = [piece for window, inside in zip(windows, cuts, strict=True) for piece in np.split(window, inside)]
            windows = [piece for piece in pieces if len(piece) > 1]
        if len(self.corpus.texts) > 1:
            return None
        bits = bigram_bits(self.corpus.train, windows, size)
        return None if bits is None else bits / (self.corpus.bytes_per_token or 1.0)

    def _skipped(self, in_a_row: int, blame: str) -> None:
        """Every rank says where the step went wrong; one too many in a row ends the run."""
        text = f"step {self.step} is skipped, loss or gradients are not finite: {blame}"
        self.warn(text)
        if in_a_row > self.config.optimisation.max_skips:
            if self.saver is not None:
                self.saver.wait()
            raise UserError(f"{text}; {in_a_row} steps in a row, --max-skips is {in_a_row - 1}: lower --lr?")

    def save(self, wait: bool = False) -> None:
        """A checkpoint, each rank its part; every rank raises UserError if that, or the save before, fails."""
        if self.saver is None:
            return
        schedule = ("lr", "min_lr", "warmup", "steps")
        if self.saved != self.step:
            values = {
                "samples": self.trainer.samples,
                "tokens": self.trainer.tokens,
                "ranks": group_size(self.mesh.world),
                "schedule": {name: getattr(self.config.optimisation, name) for name in schedule},
                "model": self.model_config.to_dict(),
                "run": self.config.to_dict() | {"tokenizer": self.tokenizer},
                "data": self.corpus.fingerprint,
            }
            self.saver.wait()  # before the copy: two would be twice the memory
            random = random_state(self.mesh.device)
            tensors = capture(self.model, self.trainer.optimizer, random, self.mesh.rank)
            self.saver.start(self.step, tensors, values)
            self.saved = self.step
        if wait:
            self.saver.wait()

    def _finish(self, first: float, last: float, speed: float) -> int:
        """What comes after the last step: parity, sample, plot, and the lines that sum the run up."""
        alone = None
        parameters = whole_state(self.model)
        if self.main:
            alone = LanguageModel(self.model_config).to(self.mesh.device)
            alone.load_state_dict(parameters)
        del parameters
        parity = None
        if self.config.output.parity:
            parity = check_parity(self.model, alone, self.trainer.windows, self.trainer.samples, self.mesh)
        together(self.mesh.world, lambda: self._report(alone, parity, first, last, speed), patient=True)
        self._close()
        return 0 if parity is None or parity.ok else 1

    def _report(
        self, alone: LanguageModel | None, parity: Parity | None, first: float, last: float, speed: float
    ) -> None:
        if alone is None:
            return
        bigram = self.bigram()
        text = ""
        output = self.config.output
        if output.sample:
            prompt = self.corpus.codec.encode(output.prompt)
            more = generate(alone, prompt, output.sample, seed=self.config.optimisation.seed)
            text = self.corpus.codec.decode(prompt + more)
            self.say(f"sample after {output.prompt!r}:\n" + "".join(f"    {line}\n" for line in text.splitlines()))
        self.say(f"held-out loss: first {first:.3f}, last {last:.3f} {self.unit}" + against(bigram, last))
        self.say(f"training: {self.step} steps, {self.trainer.tokens:,} tokens, {speed:,.0f} tokens per second")
        if parity is not None:
            self.say("\n".join(parity.lines()))
        if self.out is not None and self.log is not None:
            plot_loss(self.out / "loss.png", self.log.history, self.unit, self.per_unit, bigram)
            summary = {
                "unit": self.unit, "held_out_first": first, "held_out_last": last, "bigram": bigram, "steps": self.step,
                "tokens": self.trainer.tokens, "tokens_per_s": speed, "parity": parity and parity.to_dict(),
                "sample": text, "seconds": time.monotonic() - self.started,
            }  # fmt: skip
            write_json(self.out / "summary.json", summary)
            self.say(f"in {self.out}: {', '.join(RUN_FILES)}")

    def write(self, **values: Any) -> None:
        if self.log is not None:
            self.log.write(self.step, **values)

    def warn(self, text: str, all_ranks: bool = True) -> None:
        """A line on standard error, of every rank or of the first."""
        if self.main or all_ranks:
            tqdm.write(f"train.py: warning{f' (rank {self.mesh.rank})' if all_ranks else ''}: {text}", file=sys.stderr)
            sys.stderr.flush()

    def say(self, text: str) -> None:
        if self.main:
            tqdm.write(text)
            sys.stdout.flush()

    def _close(self) -> None:
        if self.log is not None:
            self.log.close()


def against(bigram: float | None, loss: float) -> str:
    """How a loss compares with the bigram model's."""
    if bigram is None:
        return ""
    where = "below" if loss < bigram else "above"
    return f"; a bigram model on the same text {bigram:.3f}, so the model is {abs(bigram - loss):.3f} {where} it"


def move_aside(directory: Path) -> Path:
    """Rename an earlier run's directory to the first free ``<name>.N``, so that nothing of it is lost; the new name.

    Not one that is a link: see :func:`hla_dist.processes.lock.followed`.
    """
    number = 1
    while (target := directory.with_name(f"{directory.name}.{number}")).exists():
        number += 1
    return directory.rename(target)
