"""The language model behind transformers' interface; the network is :class:`hla_dist.models.LanguageModel`.

Letters: B batch, T tokens of this call, D hidden_size, N vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from hla_dist.huggingface.cache import HLACache
from hla_dist.huggingface.configuration import HLAConfig
from hla_dist.huggingface.inputs import read
from hla_dist.models import LanguageModel
from hla_dist.models.language_model import Block, SwiGLU, residual_scale
from hla_dist.nn.attention import HLAAttention, Projection


class HLAPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of the network: initialisation, precision, checkpointing."""

    config: HLAConfig
    config_class = HLAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _is_stateful = True  # no token can be taken back: no assisted generation
    _supports_context_parallel = False  # hla_dist.SequenceParallelHLA is what shards a sequence
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["decay_bias"]  # a slow gate is 1 - 10^-4
    _can_record_outputs = {"hidden_states": Block}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The network's own initialisation, of the parameters that were not loaded."""
        if isinstance(module, HLAAttention):
            bias = module.decay_bias
            loaded = bias.clone() if bias is not None and getattr(bias, "_is_hf_initialized", False) else None
            module._reset_vectors()
            if bias is not None and loaded is not None:
                bias.copy_(loaded)
        elif isinstance(module, Projection):
            module.reset_parameters()
        elif isinstance(module, SwiGLU):
            module.reset_parameters(residual_scale(self.config.to_model_config()))
        elif isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # "custom code" would pass over modules without parameters of their own, here SwiGLU
        super()._initialize_weights(module, is_custom_code=False)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, every_n_layers: int = 1
    ) -> None:
        """The network checkpoints by itself: every block, without re-entering autograd, sending nothing twice."""
        options = dict(getattr(gradient_checkpointing_func, "keywords", {}))
        plain = getattr(gradient_checkpointing_func, "func", gradient_checkpointing_func) is checkpoint
        if enable and (not plain or every_n_layers != 1 or options not in ({}, {"use_reentrant": False})):
            raise ValueError(
                f"activation checkpointing: expected every layer, no offload and use_reentrant=False, got "
                f"every_n_layers={every_n_layers}, offload={not plain}, {options}"
            )
        for module in self.modules():
            if isinstance(module, HLAModel):
                module.gradient_checkpointing = enable


class HLAModel(HLAPreTrainedModel):
    """Tokens to hidden states [B, T, D] after the last norm."""

    def __init__(self, config: HLAConfig) -> None:
        super().__init__(config)
        self.network = LanguageModel(config.to_model_config())
        self.post_init()

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether backward computes each block again; what is sent over a group is sent once all the same."""
        return self.network.activation_checkpointing != "none"

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        self.network.activation_checkpointing = "layer" if enable else "none"

    def get_input_embeddings(self) -> nn.Module:
        return self.network.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.network.embedding = value
        self.network.config = replace(self.network.config, vocab_size=value.num_embeddings)

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HLACache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states, and with ``use_cache`` (by default outside of training) the states after the last token.

        ``attention_mask`` [B, past + T] is 0 (as floats: -inf) at padding, wherever it lies: it leaves the states as
        they are, and the results at tokens are those without it. ``position_ids`` matter with rotary attention only, by
        default counted without padding, over all ranks of a group. Packed documents have a state each; they are told
        by ``cu_seq_lens_q``, ``cu_seq_lens_k`` or ``cu_seqlens`` (B = 1), by ``seq_idx`` [B, T] or by position_ids that
        start again. Raises ValueError naming the argument; one that is not known is refused.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: expected exactly one of them")
        if past_key_values is not None and not isinstance(past_key_values, HLACache):
            raise ValueError(f"past_key_values: expected an HLACache, got {type(past_key_values).__name__}")
        x = self.network.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        wanted = self.config.use_cache and not self.training if use_cache is None else use_cache
        attention = [block.attention for block in self.network.blocks]
        batch = read(
            x, attention_mask, position_ids, kwargs, past_key_values, wanted or past_key_values is not None,
            positions_matter=any(layer.rope_theta is not None for layer in attention),
            hybrid="softmax" in self.network.config.mixers, group=attention[0].group,
        )  # fmt: skip
        packed = batch.documents is not None
        if packed and use_cache is None:  # nor must a training step pay for states
            wanted = False
        if packed and (wanted or past_key_values is not None):
            raise ValueError("use_cache, past_key_values: expected neither with packed documents (a state each)")
        if wanted and past_key_values is None:
            past_key_values = HLACache(self.config)
        mask, positions, shape = batch.mask, batch.positions, x.shape
        if packed:  # rows one after the other
            x = x.reshape(1, -1, x.shape[-1])
            mask, positions = (y if y is None else y.reshape(1, -1) for y in (mask, positions))
        x, states = self.network.features(
            x,
            None if past_key_values is None else past_key_values.states,
            batch.documents,
            positions=positions,
            attention_mask=mask,
            return_state=past_key_values is not None,
        )
        x = x.view(shape)
        if past_key_values is not None:
            past_key_values.replace(states, batch.places, batch.tokens)
        return BaseModelOutputWithPast(last_hidden_state=self.network.norm(x), past_key_values=past_key_values)


class HLAForCausalLM(HLAPreTrainedModel, GenerationMixin):
    """Tokens to next-token logits [B, T, N]; the output layer is the embedding."""

    _tied_weights_keys = {"lm_head.weight": "model.network.embedding.weight"}

    def __init__(self, config: HLAConfig) -> None:
        super().__init__(config)
        self.model = HLAModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HLACache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As :meth:`HLAModel.forward`; with ``labels`` [B, T] (shifted here, -100 left out) also the mean loss.

        ``logits_to_keep``: only the last so many places' logits, or those at the given indices; 0 is all.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """generate()'s cache: ours; another kind is refused."""
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(f"cache_implementation: expected None, an HLA cache has one size anyway; got {kind!r}")
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = HLACache(self.config)
        else:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
