"""Between the library's models and transformers' folders; the tensors are the same, their names gain a prefix."""

from collections.abc import Mapping

import torch
from torch import Tensor

from hla_dist.huggingface.configuration import HLAConfig
from hla_dist.huggingface.modeling import HLAForCausalLM
from hla_dist.models import ModelConfig
from hla_dist.nn.head_norm import current_name

PREFIX, OUTPUT = "model.network.", "lm_head.weight"


def to_huggingface(state_dict: Mapping[str, Tensor], config: ModelConfig) -> HLAForCausalLM:
    """Return a transformers model with copies of a ``hla_dist.models.LanguageModel``'s parameters.

    Raises ValueError if names or shapes are not those of ``config``.
    """
    with torch.device("meta"):
        model = HLAForCausalLM(HLAConfig.from_model_config(config))
    copies = {current_name(name): tensor.detach().clone() for name, tensor in state_dict.items()}
    output = copies.get("embedding.weight", torch.empty(0)) if config.tie_word_embeddings else copies.pop(OUTPUT, None)
    tensors = {PREFIX + name: tensor for name, tensor in copies.items()}
    try:
        model.load_state_dict(tensors if output is None else {**tensors, OUTPUT: output}, assign=True)
    except RuntimeError as exc:
        first = " ".join(str(exc).split(",")[0].split())  # torch names every parameter, on lines of their own
        raise ValueError(f"state_dict: expected the parameters of {config}, got others: {first} ...") from exc
    model.tie_weights()
    return model.eval()


def from_huggingface(model: HLAForCausalLM) -> tuple[dict[str, Tensor], ModelConfig]:
    """Return copies of the parameters as LanguageModel names them, and the configuration."""
    tensors = {
        name.removeprefix(PREFIX): tensor.detach().clone()
        for name, tensor in model.state_dict().items()
        if name.startswith(PREFIX) or (name == OUTPUT and not model.config.tie_word_embeddings)
    }
    return tensors, model.config.to_model_config()
