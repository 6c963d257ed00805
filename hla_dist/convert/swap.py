"""A model with other mixers around the same projections, norms, MLPs and embeddings."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hla_dist.functional.validate import require
from hla_dist.models import LanguageModel, ModelConfig

_NOT_SHARED = ("window", "exchange")  # options of SoftmaxAttention that mean something else for MemoryAttention


def swap(
    model: LanguageModel,
    pattern: str = "memory",
    *,
    memory: dict[str, Any] | None = None,
    attention: dict[str, Any] | None = None,
    keep: str = "all",
) -> LanguageModel:
    """Return a copy of ``model`` with the layers of ``pattern``; parameters that both have are the same.

    What a layer has of its own (feature maps, gates, norms of outputs) starts as it always does, in
    float32: these are few, and gates of a bf16 model could not move in small steps. What the old layer
    had and the new one lacks is refused, since the model would be another one: parameters, and scaled
    rotary positions where a layer becomes one of ``HLAAttention``.

    Args:
        model: As ``load_softmax`` returns it.
        pattern: As in ``ModelConfig``: ``"memory"``, ``"memory*3,softmax"``, ``"hla2"``, ...
        memory: Options of ``MemoryAttention``; rotary positions, norms and biases come from the model.
        attention: Options of ``HLAAttention``; its rotary positions come from the model.
        keep: ``"all"``, or ``"shared"``: the new layers project queries, keys and values anew, as in
            XATL, and all else is kept.

    Raises:
        ValueError: An option is wrong, no layer changes, or a parameter or scaled rotary positions have
            no place in the new layers.
    """
    config = _config(model.config, pattern, memory, attention)
    require(keep in ("all", "shared"), "keep", "'all' or 'shared'", repr(keep))
    changed = [n for n, (old, new) in enumerate(zip(model.config.mixers, config.mixers)) if old != new]
    require(changed, "swap", f"a pattern that changes a layer of {model.config.pattern!r}", repr(pattern))
    linear = sorted(set(config.mixers) - {"memory", "softmax"})
    if linear and model.config.softmax.get("rope_factors") is not None:
        raise ValueError(f"swap: expected memory layers for scaled rotary positions (rope_factors), got {linear[0]}")
    student = LanguageModel(config)
    given = model.state_dict()
    places = student.state_dict()
    for name, tensor in given.items():
        if name not in places or places[name].shape != tensor.shape:
            got = "none of that name" if name not in places else f"shape {tuple(places[name].shape)}"
            raise ValueError(f"swap: expected a place of shape {tuple(tensor.shape)} for {name}, got {got}")
    if keep == "shared":
        for name in [name for name in given if name.startswith(tuple(_anew(changed)))]:
            del given[name]
    device = model.embedding.weight.device
    for name, parameter in student.named_parameters():
        kept = given.get(name)
        dtype = torch.float32 if kept is None and not _projection(student, name) else model.embedding.weight.dtype
        parameter.data = parameter.data.to(device, dtype) if kept is None else kept.detach().clone()
    return student.train(model.training)


def _config(
    config: ModelConfig, pattern: str, memory: dict[str, Any] | None, attention: dict[str, Any] | None
) -> ModelConfig:
    shared = {name: value for name, value in config.softmax.items() if name not in _NOT_SHARED}
    rotary = {"rope_theta": config.softmax.get("rope_theta", 1e4)}
    return replace(
        config, pattern=pattern, memory={**shared, **(memory or {})}, attention={**rotary, **(attention or {})}
    )


def _anew(layers: list[int]) -> list[str]:
    """What the names of the queries', keys' and values' parameters begin with."""
    return [f"blocks.{layer}.attention.{letter}_" for layer in layers for letter in "qkv"]


def _projection(student: LanguageModel, name: str) -> bool:
    """Whether a parameter is a matrix that activations of the model's dtype meet."""
    module, _, _ = name.rpartition(".")
    return isinstance(student.get_submodule(module), nn.Linear)


def mixer_of(model: LanguageModel, index: int) -> Any:
    """The attention of a layer."""
    return model.blocks[index].attention


def converted(student: LanguageModel) -> list[int]:
    """The layers that are not softmax."""
    return [index for index, mixer in enumerate(student.config.mixers) if mixer != "softmax"]


def require_change(stage: str, before: dict[str, torch.Tensor], model: nn.Module) -> None:
    """ValueError if no parameter differs from ``before``: a stage that changes nothing is a mistake."""
    parameters = dict(model.named_parameters())
    if all(torch.equal(value, parameters[name].detach()) for name, value in before.items()):
        raise ValueError(f"{stage}: expected parameters that change, got the same numbers in all {len(before)}")
