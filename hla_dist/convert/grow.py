"""A trained model with larger states: more channels per query and key, and where it grows the same function (StateX).

q' . k' = q . k,  and S' q' restricted to the old channels is S q,  because the new channels of q' are 0
d loss / d weight of the new channels != 0,  because those of k' are not

A convolution, like norms and rotary positions, takes new channels apart from old ones.
"""

from dataclasses import replace

import torch

from hla_dist.functional.validate import require
from hla_dist.models import LanguageModel
from hla_dist.models.config import ModelConfig


def grow(model: LanguageModel, head_dim: int, *, seed: int = 0) -> LanguageModel:
    """Return a copy of ``model`` whose linear layers have ``head_dim`` channels per query and key.

    Its logits are the model's; train it further, and it learns to use the new channels. Values keep
    their size. A state per head grows from K x V to ``head_dim`` x V, in second and third order S to
    the square of ``head_dim`` besides.

    Args:
        model: Of linear layers throughout.
        head_dim: Above the model's own.
        seed: Of the new channels' weights, drawn as a new layer's.

    Raises:
        ValueError: The model has other layers, has grown before, or has options that mix channels.
    """
    config, size = _config(model.config, head_dim)
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    larger = LanguageModel(config)
    torch.set_rng_state(state)
    like = model.embedding.weight
    larger.to(like.device, like.dtype)
    given = model.state_dict()
    with torch.no_grad():
        for name, parameter in larger.named_parameters():
            if name not in given:  # q_grown, which is 0
                continue
            old = given[name]
            heads = (len(parameter) - len(old)) // (head_dim - size)  # 0 where nothing grows
            grown, before = parameter[: heads * head_dim], old[: heads * size]
            grown.unflatten(0, (heads, head_dim))[:, :size] = before.unflatten(0, (heads, size))
            parameter[heads * head_dim :] = old[heads * size :]  # of a convolution the values' channels
    return larger.train(model.training)


def _config(config: ModelConfig, head_dim: int) -> tuple[ModelConfig, int]:
    """The larger model's configuration, and the channels that there were."""
    size = config.head_dim or config.hidden_size // config.num_heads
    others = sorted({"softmax", "memory"} & set(config.mixers))
    require(not others, "grow", "linear layers throughout", ", ".join(others))
    if config.attention.get("grown"):
        raise ValueError(f"grow: expected a model that has not grown, got one by {config.attention['grown']} channels")
    require(head_dim > size, "head_dim", f"above the model's {size}", head_dim)
    by_norm = size ** (0.5 if config.attention.get("qk_norm", "l2") == "l2" else -0.5)
    scale = config.attention.get("scale")
    pinned = {
        "grown": head_dim - size,
        "value_dim": config.attention.get("value_dim") or size,
        "scale": by_norm if scale is None else scale,
    }
    return replace(config, head_dim=head_dim, attention={**config.attention, **pinned}), size
