"""Distillation: all layers of a converted model together, on the next tokens and on another model's chances of them.

Letters: B rows of a step, T tokens, N vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hla_dist.convert.swap import converted, mixer_of, require_change
from hla_dist.functional.validate import require
from hla_dist.models import LanguageModel
from hla_dist.nn import MemoryAttention, SequenceParallelHLA
from hla_dist.parallel.collectives import all_reduce_sum, resolve_group
from hla_dist.parallel.shard import shard_batch, token_loss
from hla_dist.training.optim import lr_factor

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
ALPHA = 2.0  # an adapter's scale is this, whatever its rank: alpha / rank of LoRA, 16 / 8
GATES = 30  # gates' learning rate over the others'


class LowRank(nn.Module):
    """``W + ALPHA B A``: A ``[rank, in]`` random, B ``[out, rank]`` zero, so that training starts at W."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        self.a = nn.Parameter(torch.randn(rank, inputs, device=weight.device) * inputs**-0.5)
        self.b = nn.Parameter(torch.zeros(outputs, rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (ALPHA * self.b @ self.a).to(weight.dtype)


def distill(
    student: LanguageModel,
    rows: Tensor,
    *,
    teacher: LanguageModel | None = None,
    lora: int = 8,
    kl: float = 0.0,
    tokens: float = 1.0,
    steps: int = 20,
    batch: int = 1,
    lr: float = 1e-3,
    thaw: float | None = None,
    window_dropout: tuple[float, float] | None = None,
    group: Any = None,
    seed: int = 0,
    report: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train the student as a whole; return the loss of every step.

        loss = tokens * mean_t -log p(x_t+1) + kl * mean_t KL(p'_t || p_t)     p' of the teacher

    Args:
        student: A converted model; it changes.
        rows: Tokens ``[N, T]``.
        teacher: Needed with ``kl``: on the same device, unchanged.
        lora: Rank of the adapters on q, k, v and o of the converted layers, which are merged into the
            weights at the end; feature maps and gates are trained beside them. 0: every parameter.
        kl: Weight of the divergence.
        tokens: Weight of the next tokens' cross-entropy.
        steps: AdamW steps, warm-up over a tenth of them, then a cosine.
        batch: Rows of a step.
        lr: The highest learning rate; gates take thirty times as much.
        thaw: Needs ``lora=0``. What the new layers share with the old model, their output projections
            included, is frozen until the mean loss of an eighth of the steps is no longer below the one
            before by this share (XATL). None: nothing is frozen.
        window_dropout: The share of tokens that see their memory alone, at the first step and at the
            last, linear between (scheduled window dropout). It needs memories of all tokens beside a
            window. None: the layers' own share, throughout.
        group: Ranks among which each row is cut into shards; every rank gets the same rows.
        seed: Of the rows' order and the adapters.
        report: Called with each step's number and loss.

    Raises:
        ValueError: An argument is wrong, or no parameter would change.
    """
    require(steps >= 1, "steps", "at least 1", steps)
    require(batch >= 1, "batch", "at least 1", batch)
    if rows.dim() != 2 or rows.is_floating_point() or len(rows) < batch or rows.shape[1] < 2:
        raise ValueError(f"rows: expected integers [N, T], at least {batch} rows, got {rows.dtype} {list(rows.shape)}")
    require(kl >= 0 and tokens >= 0 and kl + tokens > 0, "kl, tokens", "weights >= 0, not both 0", f"{kl} and {tokens}")
    require(not kl or teacher is not None, "teacher", f"a model with kl={kl}", "None")
    require(thaw is None or not lora, "thaw", f"None with lora={lora}, which freezes what is shared to the end", thaw)
    layers = [mixer_of(student, index) for index in converted(student)]
    require(layers, "distill", "a converted model", f"the pattern {student.config.pattern!r}")
    dropping = [layer for layer in layers if getattr(layer, "memory", None) == "all" and layer.window is not None]
    if window_dropout is not None:
        require(all(0 <= x <= 1 for x in window_dropout), "window_dropout", "two shares from 0 to 1", window_dropout)
        require(dropping, "window_dropout", "None without memories of all tokens beside a window", window_dropout)
    torch.manual_seed(seed)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    wanted = {name: p.requires_grad for name, p in student.named_parameters()}
    mode, own = student.training, [layer.window_dropout for layer in dropping]
    shares = [] if window_dropout is None else torch.linspace(*window_dropout, steps, dtype=torch.float64).tolist()
    try:
        with _adapted(student, layers, lora):
            losses = _train(
                student, layers, rows, teacher, kl, tokens, steps, batch, lr, thaw, dropping, shares, group, report
            )
    finally:  # also where a user stops it
        for layer, share in zip(dropping, own):
            layer.window_dropout = share
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(wanted[name])
            parameter.grad = None
        student.train(mode)
    require_change("distill", before, student)
    return losses


@contextmanager
def _adapted(student: LanguageModel, layers: list[nn.Module], rank: int) -> Iterator[None]:
    """What is to be trained, and nothing else, takes gradients; adapters are merged when the block ends."""
    student.requires_grad_(rank == 0)
    adapted = [getattr(layer, name) for layer in layers for name in PROJECTIONS] if rank else []
    for layer in layers if rank else []:
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(name.partition(".")[0] not in PROJECTIONS)
    for linear in adapted:
        parametrize.register_parametrization(linear, "weight", LowRank(linear.weight, rank))
    try:
        yield
    finally:
        for linear in adapted:
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)
            if linear.bias is not None:  # behind the weight again, as an optimiser's state expects
                linear._parameters["bias"] = linear._parameters.pop("bias")


def _train(
    student: LanguageModel, layers: list[nn.Module], rows: Tensor, teacher: LanguageModel | None, kl: float,
    tokens: float, steps: int, batch: int, lr: float, thaw: float | None,
    dropping: list[Any], shares: list[float], group: Any, report: Callable[[int, float], None] | None,
) -> list[float]:  # fmt: skip
    model: Any = student if group is None else SequenceParallelHLA(student, group)
    guide: Any = teacher
    if teacher is not None and group is not None:
        guide = SequenceParallelHLA(teacher, group, reduce_gradients=False, sync_parameters=False)
    gates = {id(p) for layer in layers if isinstance(layer, MemoryAttention) for p in layer.gates()}
    parameters = [p for p in student.parameters() if p.requires_grad]
    own = {id(p) for layer in layers for name, p in layer.named_parameters() if not name.startswith("o_proj.")}
    shared = set() if thaw is None else {id(p) for p in parameters} - own
    groups = [
        {
            "params": [p for p in parameters if (id(p) in gates, id(p) in shared) == (is_gate, is_shared)],
            "peak": lr * (GATES if is_gate else 1),
            "frozen": is_shared,
        }
        for is_gate, is_shared in ((False, False), (True, False), (False, True))
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, weight_decay=0.0)
    student.train()
    order = torch.cat([torch.randperm(len(rows)) for _ in range(-(-steps * batch // len(rows)))])
    losses: list[float] = []
    for step, picked in enumerate(order[: steps * batch].split(batch)):
        for layer in dropping if shares else []:
            layer.window_dropout = shares[step]
        shards = shard_batch(rows[picked].to(student.embedding.weight.device), group)
        logits = model(shards.inputs)
        loss = tokens * token_loss(logits, shards.labels, group)
        if guide is not None and kl:
            with torch.no_grad():
                wanted = guide(shards.inputs).float().log_softmax(-1)
            divergence = F.kl_div(logits.float().log_softmax(-1), wanted, reduction="sum", log_target=True)
            loss = loss + kl * divergence / (batch * (rows.shape[1] - 1))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for entry in optimizer.param_groups:
            entry["frozen"] = entry["frozen"] and not _stopped_falling(losses, max(1, steps // 8), thaw)
            # 0 freezes: gradients are still wanted, since ranks reduce those of all parameters that had one at first
            factor = 0.0 if entry["frozen"] else lr_factor(step, max(1, steps // 10), step / steps, 0.0)
            entry["lr"] = entry["peak"] * factor
        optimizer.step()
        losses.append(_summed(loss.detach(), group))
        if report is not None:
            report(step, losses[-1])
    for wrapped in (model, guide):
        if isinstance(wrapped, SequenceParallelHLA):
            wrapped.unwrap()
    return losses


def _stopped_falling(losses: list[float], span: int, share: float | None) -> bool:
    """Whether the mean of the last ``span`` losses is not below that of those before by this share."""
    recent, before = losses[-span:], losses[-2 * span : -span]
    return len(before) == span and sum(recent) > (1 - (share or 0.0)) * sum(before)


def _summed(loss: Tensor, group: Any) -> float:
    """The ranks' shares of a loss, put together."""
    total = loss.double()
    if group is not None:
        all_reduce_sum(total, resolve_group(group))
    return float(total)
