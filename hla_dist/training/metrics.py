"""What a run leaves to look at: metrics.jsonl, TensorBoard events, a plot of the loss."""

import contextlib
import json
import math
import threading
import uuid
from pathlib import Path
from typing import Any

from hla_dist.processes.failure import UserError, describe, optional_package, reporting
from hla_dist.processes.whole_file import whole_file

WANDB_ID = "wandb-id"
MARKED = {"loss", "grad_norm", "held_out"}  # TensorBoard shows where these were not finite


class MetricsLog:
    """One JSON line and one set of TensorBoard scalars per step; use it on one rank.

    With ``resume_step`` lines of later steps, which the resumed run will write again, are dropped. Raises UserError
    where the disk does not take a line. ``wandb_project``: lines go to Weights & Biases too, with ``config``; UserError
    if its package is not there.
    """

    def __init__(
        self, directory: Path, resume_step: int | None = None, wandb_project: str | None = None, config: Any = None
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter  # late: a second of imports that one rank needs

        self._wandb = None
        if wandb_project is not None:
            self._wandb = start_wandb(wandb_project, directory, config, goes_on=resume_step is not None)
        self.path = directory / "metrics.jsonl"
        self.history: list[dict[str, Any]] = []
        if resume_step is not None and self.path.is_file():
            self.history = [line for line in read_metrics(self.path) if line["step"] <= resume_step]
        with whole_file(self.path) as partial:  # a kill between the lines would lose the rest
            partial.write_text("".join(json.dumps(line) + "\n" for line in self.history))
        self._file = open(self.path, "a")
        purge = None if resume_step is None else resume_step + 1
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=purge, flush_secs=30)
        self._board_path = directory / "tensorboard"

    def write(self, step: int, **values: Any) -> None:
        """Append a line; values that are None are left out, those that are not finite become null."""
        line = {"step": step} | {
            key: value if not isinstance(value, float) or math.isfinite(value) else None
            for key, value in values.items()
            if value is not None
        }
        self.history.append(line)
        with reporting(f"metrics: cannot write {self.path}"):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        with reporting(f"metrics: cannot write {self._board_path}"):
            for key, value in values.items():
                if isinstance(value, (int, float)) and (key in MARKED or math.isfinite(value)):
                    self._board.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log({key: value for key, value in line.items() if value is not None}, step=step)

    def close(self, exit_code: int = 0) -> None:
        """Flush all."""
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=exit_code)

    def abandon(self, seconds: float = 10.0) -> None:
        """Flush what it can of a run that fails; a writer whose disk is full, or whose network is gone, may hang."""

        def close() -> None:
            with contextlib.suppress(Exception):  # the run has an error of its own to report
                self.close(exit_code=1)

        closing = threading.Thread(target=close, daemon=True)
        closing.start()
        closing.join(seconds)


def start_wandb(project: str, directory: Path, config: dict[str, Any] | None, goes_on: bool) -> Any:
    """A run of Weights & Biases named as the directory; offline and the like are up to its own variables.

    Its id is kept in the directory: a run that ``goes_on`` there goes on under the same id.
    """
    wandb = optional_package("wandb", "--wandb")
    kept = directory / WANDB_ID
    run_id = kept.read_text().strip() if goes_on and kept.is_file() else uuid.uuid4().hex
    kept.write_text(f"{run_id}\n")
    try:
        return wandb.init(
            project=project, name=directory.name, dir=str(directory), config=config, id=run_id, resume="allow"
        )
    except Exception as exc:  # no key, no network, a setting it does not know: its errors share no class
        raise UserError(f"--wandb: cannot start a run (WANDB_MODE=offline needs no account): {describe(exc)}") from exc


def perplexity(loss: float) -> float:
    """exp of nats per token; infinity beyond what a number holds."""
    return math.exp(loss) if loss < 700 else loss * math.inf


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl; a last line that a crash has cut off is dropped."""
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def pyplot() -> Any:
    """matplotlib.pyplot, drawing into files; late: seconds of imports that few programs need."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    matplotlib.rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "figure.constrained_layout.use": True})
    return matplotlib.pyplot


def save_figure(figure: Any, path: Path) -> None:
    """Write the figure as a PNG, and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, format="png")
    pyplot().close(figure)


def plot_loss(path: Path, history: list[dict[str, Any]], unit: str, per_unit: float, bigram: float | None) -> None:
    """PNG of training loss (times ``per_unit``), held-out loss and the bigram model's line, all in ``unit``."""
    train = [(line["tokens"], line["loss"] * per_unit) for line in history if line.get("loss") is not None]
    held_out = [(line["tokens"], line["held_out"]) for line in history if line.get("held_out") is not None]
    figure, axes = pyplot().subplots(figsize=(8, 4.5))
    if train:
        axes.plot(*zip(*train, strict=True), color="0.7", linewidth=0.8, label="training, each step")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="tab:blue", marker="o", label="held out")
    if bigram is not None:
        axes.axhline(bigram, color="tab:red", linestyle="--", label=f"bigram model, held out: {bigram:.2f}")
    axes.set(xlabel="training tokens", ylabel=unit)
    axes.legend()
    save_figure(figure, path)
