"""Attention transfer: each new layer learns to do what the old one did, on what the old model gives it.

Layers are independent. The teacher's hidden states of all rows are carried from one layer to the next, so that memory
holds those of one layer, and a layer is trained between two steps. Letters: N rows, T tokens, D hidden_size.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hla_dist.convert.swap import converted, mixer_of, require_change
from hla_dist.functional.validate import require
from hla_dist.models import LanguageModel
from hla_dist.nn import MemoryAttention
from hla_dist.operators.precision import sum_dtype
from hla_dist.parallel.collectives import all_reduce_sum, broadcast, members
from hla_dist.processes.failure import expect
from hla_dist.processes.tensor_file import read_tensors, write_tensors

KEY = "hla_dist_transfer"  # in a stored layer's metadata: JSON of its errors
STORED = "layer_{:03d}.safetensors"  # a layer that is done
CALIBRATION = 4  # rows that set the memory's mass
HELD_OUT = 8  # at most so many rows, a tenth of them, measure a layer
GATES = 10  # gates' learning rate over that of feature maps
TRAINED, LOSSES = ("features", "attention"), ("output", "weights")


class LayerError(NamedTuple):
    """How much of the power of the old layer's output the new one misses, on rows it was not trained on.

    Attributes:
        layer: Its number.
        before: After calibration, before training.
        after: After training.
    """

    layer: int
    before: float
    after: float


def transfer(
    student: LanguageModel,
    teacher: LanguageModel,
    rows: Tensor,
    *,
    loss: str = "output",
    train: str = "features",
    steps: int = 40,
    batch: int = 2,
    lr: float = 1e-2,
    directory: Path | None = None,
    group: Any = None,
    seed: int = 0,
    report: Callable[[LayerError], None] | None = None,
) -> list[LayerError]:
    """Train the student's new layers, one after another; return each one's error.

        loss = |o - o'|^2 / |o'|^2     o of the new layer, o' of the old one, of the same input

    Args:
        student: As ``swap`` returns it; its new layers change.
        teacher: The model it came from; unchanged.
        rows: Tokens ``[N, T]``.
        loss: ``"output"``: as above. ``"weights"``: the divergence of each token's weights on the
            tokens before it, old and new, as in HedgeCATs: a memory cannot hide behind the window
            there. Weights exist as ``[T, T]`` per head, of memories of first order without decay only.
        train: ``"features"``: feature maps and gates, on the heads' outputs. ``"attention"``: all of
            the layer, on its output.
        steps: Adam steps per layer.
        batch: Rows of a step. Of long rows one is enough, and more steps are better.
        lr: The highest learning rate, of feature maps or of all; gates take ten times as much.
        directory: Keeps each layer when it is done: what is there is read, not trained again.
        group: Ranks that share the layers, each with all rows; at the end all have all layers.
        seed: Of the rows' order.
        report: Called after each layer of this rank.

    Raises:
        ValueError: An argument is wrong, or a layer has nothing to train.
    """
    require(train in TRAINED, "train", f"one of {', '.join(TRAINED)}", repr(train))
    if loss not in LOSSES or (loss == "weights" and train != "features"):
        raise ValueError(f"loss: expected 'output', or 'weights' with train='features', got {loss!r}")
    if rows.dim() != 2 or rows.is_floating_point() or len(rows) < 2:
        raise ValueError(f"rows: expected integers [N, T], at least two rows, got {rows.dtype} {list(rows.shape)}")
    layers = converted(student)
    for index in layers:
        if not _trained(mixer_of(student, index), train):
            raise ValueError(f"transfer: expected parameters to train in layer {index}, got none with train={train!r}")
        if loss == "weights" and (problem := _no_weights(mixer_of(student, index))):
            raise ValueError(f"loss: expected 'output' for layer {index} with {problem}, got 'weights'")
    require(steps >= 1, "steps", "at least 1", steps)
    require(batch >= 1, "batch", "at least 1", batch)
    pg, rank, ranks = members(group)
    modes = student.training, teacher.training
    student.eval(), teacher.eval()
    errors = torch.zeros(len(layers), 2, dtype=torch.float64, device=rows.device)
    with torch.no_grad():
        hidden = [teacher.embedding(part) for part in rows.split(batch)]
    for index in range(student.config.num_layers):
        block: Any = teacher.blocks[index]
        if index in layers:
            number = layers.index(index)
            if number % ranks == rank:
                new = mixer_of(student, index)
                stored = None if directory is None else directory / STORED.format(index)
                error = _read(new, stored) if stored is not None and stored.is_file() else None
                if error is None:
                    with torch.no_grad():
                        x = torch.cat([block.attention_norm(part) for part in hidden])
                    error = _teach(new, block.attention, x, loss, train, steps, batch, lr, seed, index)
                    if stored is not None:
                        _write(new, stored, error)
                errors[number] = torch.tensor(error)
                if report is not None:
                    report(LayerError(index, *error))
        with torch.no_grad():
            hidden = [block(part, None, None, None, False)[0] for part in hidden]
    student.train(modes[0]), teacher.train(modes[1])
    if pg is not None and ranks > 1:
        for number, index in enumerate(layers):
            for parameter in mixer_of(student, index).parameters():
                broadcast(parameter.data, pg, number % ranks)
        all_reduce_sum(errors, pg)
    return [LayerError(index, *error) for index, error in zip(layers, errors.tolist())]


def _trained(layer: nn.Module, train: str) -> list[nn.Parameter]:
    if train == "attention":
        return list(layer.parameters())
    return [*layer.maps(), *layer.gates()] if isinstance(layer, MemoryAttention) else []


def heads(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer's heads put out, before the output projection, ``[B, T, H V]``."""
    kept: list[Tensor] = []
    hook = layer.o_proj.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))  # type: ignore[union-attr]
    try:
        layer(x, output_final_state=False)
    finally:
        hook.remove()
    return kept[0]


def _no_weights(layer: Any) -> str:
    """Why a layer's weights cannot be told; empty if they can."""
    if not isinstance(layer, MemoryAttention) or layer.window is None:
        return "no window"
    options = {"op": layer.op != "linear_attention", "decay": layer.decay is not None, "join": layer.join == "sum"}
    return ", ".join(f"{name}={getattr(layer, name)!r}" for name, bad in options.items() if bad)


def weights(layer: Any, x: Tensor) -> Tensor:
    """Each token's weights on all tokens, ``[B, H, T, T]``, of a softmax layer or of a memory of first order."""
    tokens, repeats = x.shape[1], layer.num_heads // layer.num_kv_heads
    at = torch.arange(tokens, device=x.device)
    q, k, v, *gate = layer._operands(x, at.expand(x.shape[:2]))
    age = at[:, None] - at
    seen = (age >= 0) & (age < (layer.window or tokens))
    wide = sum_dtype(q.dtype)
    queries, keys = (y.to(wide).transpose(1, 2) for y in (q, k.repeat_interleave(repeats, 2)))
    scores = (layer.scale * queries @ keys.mT).masked_fill(~seen, -torch.inf)
    near = scores.softmax(-1)
    if not isinstance(layer, MemoryAttention):
        return near
    present = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    of_q, of_k, _ = layer._features(q, present, k, v)
    far = of_q.transpose(1, 2) @ of_k.repeat_interleave(repeats, 2).transpose(1, 2).mT * (age >= layer._delay)
    mass = far.sum(-1, keepdim=True)
    filled = mass > 0
    mass = mass.where(filled, 1.0)
    by_token = [y.transpose(1, 2) for y in (scores.logsumexp(-1, keepdim=True), mass)]
    share = layer._share(*by_token, *gate).expand_as(by_token[0]).transpose(1, 2) * filled
    return near + share * (far / mass - near)


def _divergence(new: nn.Module, old: nn.Module, x: Tensor) -> Tensor:
    """Mean over tokens and heads of KL(old's weights || new's)."""
    with torch.no_grad():
        wanted = weights(old, x)
    terms = torch.xlogy(wanted, wanted) - wanted * weights(new, x).clamp(min=1e-9).log()
    return terms.sum(-1).mean()


def _teach(
    new: Any, old: nn.Module, x: Tensor, loss: str, train: str, steps: int, batch: int, lr: float, seed: int, index: int
) -> tuple[float, float]:
    """Train one layer on inputs ``x [N, T, D]``; its errors before and after."""
    output = heads if train == "features" else lambda layer, part: layer(part, output_final_state=False)[0]
    known: list[Tensor] = []  # of a memory with its maps and gates alone in training, what stays as it is
    with torch.no_grad():
        wanted = torch.cat([output(old, part) for part in x.split(batch)])
        if train == "features" and loss == "output":
            known = [torch.cat(parts) for parts in zip(*(new.untrained(part) for part in x.split(batch)))]
        if isinstance(new, MemoryAttention) and new.level is not None and x.shape[1] > new._delay:
            new.calibrate(x[:CALIBRATION])
    held_out = max(1, min(HELD_OUT, len(x) // 10))
    learned = len(x) - held_out

    def missed(part: Any) -> Tensor:
        o = new.heads(x[part], *(y[part] for y in known)) if known else output(new, x[part])
        want = wanted[part].float()
        return (o.float() - want).square().sum() / want.square().sum()

    def measured() -> float:
        with torch.no_grad():
            return sum(float(missed(slice(n, n + 1))) for n in range(learned, len(x))) / held_out

    before = measured()
    parameters = _trained(new, train)
    gates = {id(p) for p in new.gates()} if isinstance(new, MemoryAttention) and train == "features" else set()
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if (id(p) in gates) == is_gate], "lr": lr * (GATES if is_gate else 1)}
        for is_gate in (False, True)
    ]
    groups = [group for group in groups if group["params"]]
    start = {name: p.detach().clone() for name, p in new.named_parameters()}
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in groups], total_steps=steps + 1, pct_start=max(0.05, 2 / (steps + 1))
    )
    generator = torch.Generator().manual_seed(seed + index)
    order = torch.cat([torch.randperm(learned, generator=generator) for _ in range(-(-steps * batch // learned))])
    for picked in order[: steps * batch].split(batch):
        value = missed(picked) if loss == "output" else _divergence(new, old, x[picked])
        for parameter, gradient in zip(parameters, torch.autograd.grad(value, parameters)):
            parameter.grad = gradient
        optimizer.step()
        schedule.step()
    for parameter in parameters:
        parameter.grad = None
    require_change(f"transfer, layer {index}", start, new)
    return before, measured()


def _write(layer: nn.Module, path: Path, error: tuple[float, float]) -> None:
    tensors = {name: p.detach().cpu().contiguous() for name, p in layer.named_parameters()}
    write_tensors(path, tensors, KEY, {"before": error[0], "after": error[1]}, "--out")


def _read(layer: nn.Module, path: Path) -> tuple[float, float]:
    tensors, about = read_tensors(path, KEY, "--out")
    stored, own = ({name: list(x.shape) for name, x in of} for of in (tensors.items(), layer.named_parameters()))
    fits = stored == own and about.keys() == {"before", "after"}
    expect(fits, "--out", "transferred layers of this model", f"{path} of something else")
    layer.load_state_dict(tensors)
    return about["before"], about["after"]
