"""In-context linear regression: one layer of attention beside the best that one step of gradient descent can do.

A prompt is n examples (x_j, y_j), y_j = x_j . beta_j + noise, and a query x whose label is to be told. The optima are
those of Li, Rawat and Oymak (arXiv 2407.10005) for one preconditioned step, and of Li et al. (arXiv 2504.04308) for
gates, which weigh examples by their age.

Letters: B prompts, n examples, d features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Generator, Tensor, nn

from benchmarks.evidence.steps import beside, clock, shortest, take_step
from hla_dist import HLAAttention, SoftmaxAttention
from hla_dist.models.config import NEITHER

CHOOSING, REPORTED = 1, 2  # seeds of validation prompts: the first choose the step size
PROMPTS = 1 << 17

LAYERS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "linear_attention": {"op": "linear_attention", "decay": None},
    "linear_attention, decay per head": {"op": "linear_attention", "decay": "head"},
    "linear_attention, gated": {"op": "linear_attention", "decay": "token"},
    "hla2": {"op": "hla2", "decay": None},
    "hla2, key term": {"op": "hla2", "decay": None, "key_term": True},
    "hla2, key term, decay per head": {"op": "hla2", "decay": "head", "key_term": True},
    "ahla": {"op": "ahla", "decay": None},
}


@dataclass(frozen=True)
class Setting:
    """Where prompts come from.

    Features are normal with variances from 1 down to ``smallest`` in equal ratios; beta is normal, and from each
    example to the next keeps the share ``kept`` of itself.
    """

    features: int
    examples: int
    noise: float = 0.25  # variance
    smallest: float = 1.0
    kept: float = 1.0

    @property
    def name(self) -> str:
        moves = f"beta keeps {self.kept:g}" if self.kept < 1 else f"variances 1 to {self.smallest:g}"
        return f"regression, {self.examples} examples of {self.features} features, {moves}, noise {self.noise:g}"

    @property
    def variances(self) -> Tensor:
        """Return those of the features, [d]."""
        return self.smallest ** torch.linspace(0, 1, self.features, dtype=torch.float64)

    def prompts(self, generator: Generator, count: int) -> tuple[Tensor, Tensor]:
        """Return prompts [B, n + 1, d + 1], the query's label left 0, and the labels without noise [B]."""
        n, d = self.examples, self.features
        x = torch.randn(count, n + 1, d, generator=generator) * self.variances.sqrt().float()
        beta = torch.randn(count, n + 1, d, generator=generator)
        for j in range(1, n + 1):
            beta[:, j] = self.kept * beta[:, j - 1] + (1 - self.kept**2) ** 0.5 * beta[:, j]
        y = (x * beta).sum(-1)
        labels = y[:, -1].clone()
        y += self.noise**0.5 * torch.randn(count, n + 1, generator=generator)
        y[:, -1] = 0
        return torch.cat([x, y[..., None]], -1), labels

    def risk(self, ages: Tensor, step: Tensor) -> Tensor:
        """Return E(x . beta - sum_j ages_j y_j x^T diag(step) x_j)^2 in closed form, from normal moments.

            sum_i s_i (1 - 2 w_i s_i r.a + w_i^2 (s_i^2 a^T R a + (s_i + tr + noise) s_i |a|^2))

        a = ages [n], the oldest first; w = step [d]; s variances, tr their sum; R_ij = kept^|i-j|, r_j = kept^(n-j).
        """
        s, n = self.variances, self.examples
        time_ = torch.arange(n, dtype=torch.float64)
        among = self.kept ** (time_[:, None] - time_).abs()
        query = self.kept ** (n - time_)
        square = s**2 * (ages @ among @ ages) + (s + s.sum() + self.noise) * s * (ages @ ages)
        return (s * (1 - 2 * step * s * (query @ ages) + step**2 * square)).sum()

    def best(self, gated: bool) -> tuple[float, Tensor, Tensor]:
        """Return the least risk, and its ages and step: ages all 1, or with ``gated`` gamma^(n-1-j).

        For given ages the step is in closed form; gamma is searched.
        """
        s, n = self.variances, self.examples
        time_ = torch.arange(n, dtype=torch.float64)
        among, query = self.kept ** (time_[:, None] - time_).abs(), self.kept ** (n - time_)
        best: tuple[float, Tensor, Tensor] | None = None
        for gamma in torch.linspace(0.3, 1, 701, dtype=torch.float64) if gated else torch.ones(1, dtype=torch.float64):
            ages = gamma ** (n - 1 - time_)
            step = (query @ ages) / (s * (ages @ among @ ages) + (s + s.sum() + self.noise) * (ages @ ages))
            risk = float(self.risk(ages, step))
            if best is None or risk < best[0]:
                best = risk, ages, step
        assert best is not None
        return best


def descend(prompts: Tensor, ages: Tensor, step: Tensor) -> Tensor:
    """Return what one step of gradient descent from 0 predicts: sum_j ages_j y_j x^T diag(step) x_j, [B]."""
    x, y = prompts[:, :-1, :-1], prompts[:, :-1, -1]
    direction = torch.einsum("bnd,bn->bd", x, y * ages.to(y.dtype))
    return (prompts[:, -1, :-1] * step.to(y.dtype) * direction).sum(-1)


@dataclass(frozen=True)
class Regression:
    """Everything that decides a run's figures."""

    setting: Setting
    mixer: str
    step_size: float
    seed: int
    steps: int = 600
    batch: int = 256

    @property
    def group(self) -> str:
        """Name what runs of one table have in common."""
        return f"{self.setting.name}; {self.steps} steps of {self.batch}"

    @property
    def key(self) -> str:
        """Name the run; a line of results with this key makes it done."""
        return f"{self.group}; {self.mixer}; step size {self.step_size:g}, seed {self.seed}"

    def model(self) -> nn.Module:
        """Return one head of attention, its operator bare: no norms, no output gate, no positions."""
        torch.manual_seed(self.seed)
        size, options = self.setting.features + 1, NEITHER | LAYERS[self.mixer]
        if self.mixer == "softmax":
            return SoftmaxAttention(size, 1, qk_norm=None, rope_theta=None)
        memory = float(self.setting.examples)
        # scaled so that outputs start at order 1, as the library's own scale does for unit keys
        scale = 1 / memory if options["op"] == "linear_attention" else 1 / memory**2
        bare: dict[str, Any] = dict(qk_norm=None, output_norm=False, output_gate=None, decay_range=(memory, memory))
        return HLAAttention(size, 1, scale=scale, **bare, **options)


def _predict(model: nn.Module, prompts: Tensor) -> Tensor:
    (prompts,) = beside(model, prompts)
    return model(prompts)[0][:, -1, -1]


def _mean_square(predicted: Tensor, labels: Tensor) -> Tensor:
    return (predicted - labels.to(predicted.device)).square().mean()


@torch.no_grad()
def measured(predict: Callable[[Tensor], Tensor], setting: Setting, seed: int) -> float:
    """Return the mean squared error on the validation prompts of ``seed``."""
    generator = Generator().manual_seed(seed)
    errors = []
    for _ in range(PROMPTS >> 13):
        prompts, labels = setting.prompts(generator, 1 << 13)
        errors.append(_mean_square(predict(prompts), labels))
    return float(torch.stack(errors).mean())


@cache
def drawn_optimum(setting: Setting, gated: bool) -> float:
    """Return the error of the best step, gated or not, on the reported prompts: their draw moves both alike."""
    _, ages, step = setting.best(gated)
    return measured(lambda prompts: descend(prompts, ages, step), setting, REPORTED)


def _step(model: nn.Module, run: Regression, optimizer: torch.optim.Optimizer, generator: Generator) -> None:
    prompts, labels = run.setting.prompts(generator, run.batch)
    take_step(_mean_square(_predict(model, prompts), labels), model, optimizer)


def predicted_seconds(run: Regression, device: torch.device) -> float:
    """Predict the seconds of ``run`` from the shortest of five steps."""
    model = run.model().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=run.step_size)
    step = lambda seed: _step(model, run, optimizer, Generator().manual_seed(100 + seed))  # noqa: E731
    return shortest(step, 5, device) * run.steps


def train(run: Regression, device: torch.device) -> dict[str, Any]:
    """Return the line of results: Adam, the step size falling to zero as a cosine; risk beside the two optima."""
    model = run.model().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=run.step_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, run.steps)
    generator, start = Generator().manual_seed(1000 + run.seed), clock(device)
    for _ in range(run.steps):
        _step(model, run, optimizer, generator)
        schedule.step()
    seconds = clock(device) - start
    return {
        "key": run.key,
        "group": run.group,
        **asdict(run),
        "risk": measured(partial(_predict, model), run.setting, REPORTED),
        "choosing": measured(partial(_predict, model), run.setting, CHOOSING),
        "chance": float(run.setting.variances.sum()),  # the risk of always saying 0
        "best_step": run.setting.best(gated=False)[0],
        "best_gated": run.setting.best(gated=True)[0],
        f"{device.type}_seconds": round(seconds, 1),
    }
