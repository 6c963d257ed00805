"""The language model behind transformers' interface; the network is ``hla_dist.models.LanguageModel``.

Letters: B batch, T tokens of this call, D hidden_size, N vocabulary.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MoeCausalLMOutputWithPast,
)
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from hla_dist.huggingface.cache import HLACache
from hla_dist.huggingface.configuration import HLAConfig
from hla_dist.huggingface.inputs import read
from hla_dist.models import LanguageModel
from hla_dist.models.experts import MixtureOfExperts
from hla_dist.models.language_model import EMBEDDING_STD, Block
from hla_dist.nn.attention import HLAAttention
from hla_dist.nn.head_norm import HeadNorm, current_name
from hla_dist.nn.initialization import normal_linear
from hla_dist.nn.memory_attention import Hedgehog, MemoryAttention
from hla_dist.nn.short_convolution import ShortConvolution
from hla_dist.parallel.collectives import group_size

ATTENTION = (None, "eager", "sdpa", "flash_attention_2")  # what training scripts pass
_ONE_BATCH = "generate_batch: expected generate(), a state has no pages of keys for continuous batching to share"

_renamings = [  # folders of earlier versions
    WeightRenaming(rf"\.{_name}_weight$", f".{_name}_norm.weight") for _name in ("q", "k", "o")
]
register_checkpoint_conversion_mapping("hla", _renamings, overwrite=True)


class HLAPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of the network: initialisation, precision, checkpointing."""

    config: HLAConfig
    config_class = HLAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _is_stateful = False  # as transformers means it: the cache takes tokens back
    _supports_context_parallel = False  # hla_dist.SequenceParallelHLA is what shards a sequence
    _no_split_modules = ["Block"]
    _supports_sdpa = True
    _skip_keys_device_placement = ["past_key_values"]
    _can_record_outputs = {"hidden_states": Block}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The network's own initialisation, of the parameters that were not loaded."""
        if isinstance(module, (HLAAttention, MemoryAttention, Hedgehog)):
            own = [p for p in module.parameters(recurse=False) if getattr(p, "_is_hf_initialized", False)]
            loaded = [p.clone() for p in own]
            module.reset_parameters() if isinstance(module, Hedgehog) else module._reset_gates()
            for parameter, value in zip(own, loaded):
                parameter.copy_(value)
        elif "reset_parameters" in module.__dict__:
            module.__dict__["reset_parameters"]()
        elif isinstance(module, (nn.RMSNorm, HeadNorm, ShortConvolution, MixtureOfExperts)):
            module.reset_parameters()
        elif isinstance(module, (nn.Linear, nn.Embedding)):  # heads, and embeddings that were resized
            nn.init.normal_(module.weight, std=EMBEDDING_STD)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        """The usual names all mean the same: linear layers have one implementation, softmax layers use torch's own."""
        if attn_implementation not in ATTENTION:
            raise ValueError(
                f"attn_implementation: expected one of {', '.join(map(repr, ATTENTION))} (how an HLA layer runs is its "
                f"option attention={{'backend': ...}}), got {attn_implementation!r}"
            )
        return "eager" if attn_implementation == "eager" else "sdpa"

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Nothing: see ``HLAConfig.register_for_auto_class``."""

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As torch's; a line says of a Trainer's checkpoint of an earlier version how its optimizer goes on."""
        if any(name != current_name(name) for name in state_dict):
            warnings.warn(
                "parameters have an earlier version's names; before a Trainer resumes from their folder: "
                "python -m hla_dist.huggingface.folders optimizer FOLDER",
                stacklevel=2,
            )
        return super().load_state_dict(state_dict, *args, **kwargs)

    def save_pretrained(
        self, save_directory: Any, *args: Any, save_original_format: bool = False, **kwargs: Any
    ) -> None:
        """As transformers'; parameters always get their names of today."""
        super().save_pretrained(save_directory, *args, save_original_format=save_original_format, **kwargs)

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


@dataclass
class HLAOutput(BaseModelOutputWithPast):
    """Hidden states, and of experts in training the balance loss, summed over this rank's tokens."""

    aux_loss: Tensor | None = None


class HLAModel(HLAPreTrainedModel):
    """Tokens to hidden states [B, T, D] after the last norm."""

    def __init__(self, config: HLAConfig) -> None:
        super().__init__(config)
        self.network = LanguageModel(replace(config.to_model_config(), tie_word_embeddings=True))  # no output layer
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
        """Return hidden states, and with ``use_cache`` the states after the last token.

        Args:
            input_ids: ``[B, T]``.
            attention_mask: ``[B, past + T]``, 0 (as floats: -inf) at padding, wherever it lies. Padding
                leaves the states as they are, and the results at tokens are those without it.
            position_ids: Matter with rotary attention only; by default counted without padding, over all
                ranks of a group. Positions that start again begin a new document.
            past_key_values: An HLACache.
            inputs_embeds: Instead of ``input_ids``.
            use_cache: By default outside of training.
            **kwargs: ``cu_seq_lens_q``, ``cu_seq_lens_k`` or ``cu_seqlens`` (B = 1), or ``seq_idx`` ``[B,
                T]``, say where packed documents begin; each has a state.

        Raises:
            ValueError: An argument is wrong, or unknown; the message names it.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: expected exactly one of them")
        if past_key_values is not None and not isinstance(past_key_values, HLACache):
            raise ValueError(f"past_key_values: expected an HLACache, got {type(past_key_values).__name__}")
        x = self.network.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        wanted = self.config.use_cache and not self.training if use_cache is None else use_cache
        attention: list[Any] = [block.attention for block in self.network.blocks]
        batch = read(
            x, attention_mask, position_ids, kwargs, past_key_values, wanted or past_key_values is not None,
            positions_matter=any(layer.rope_theta is not None for layer in attention),
            hybrid=not {"softmax", "memory"}.isdisjoint(self.network.config.mixers), group=attention[0].group,
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
        recording = past_key_values is not None and past_key_values.records
        x, states, loads = self.network.features(
            x,
            None if past_key_values is None else past_key_values.states,
            batch.documents,
            positions=positions,
            attention_mask=mask,
            return_state="pending" if recording else past_key_values is not None,
        )
        x = x.view(shape)
        if past_key_values is not None:
            past_key_values.replace(states, batch.places, batch.tokens, input_ids, batch.mask)
        balance = None if loads is None or not self.training else self.network.balance_loss(loads)
        return HLAOutput(last_hidden_state=self.network.norm(x), past_key_values=past_key_values, aux_loss=balance)


class HLAForCausalLM(HLAPreTrainedModel, GenerationMixin):
    """Tokens to next-token logits [B, T, N], by the embedding or an output layer of its own."""

    _tied_weights_keys = {"lm_head.weight": "model.network.embedding.weight"}

    def __init__(self, config: HLAConfig) -> None:
        super().__init__(config)
        self.model = HLAModel(config)
        self.lm_head = normal_linear(config.hidden_size, config.vocab_size, EMBEDDING_STD)
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
        """As ``HLAModel.forward``; with ``labels`` ``[B, T]`` also the mean loss.

        Labels are shifted inside, and -100 is left out. ``logits_to_keep``: only the last so many places'
        logits, or those at the given indices; 0 is all.
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
            _refuse_shards(
                self.model,
                "labels: expected none",
                "the last label of a shard is the next rank's: cut shifted ones, hla_dist.token_loss takes the logits",
            )
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            if outputs.aux_loss is not None:  # per label, as the rest
                items = kwargs.get("num_items_in_batch")
                loss = loss + outputs.aux_loss / ((labels[:, 1:] != -100).sum() if items is None else items)
        fields = dict(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )
        if self.config.experts:
            return MoeCausalLMOutputWithPast(aux_loss=outputs.aux_loss, **fields)
        return CausalLMOutputWithPast(**fields)

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; with ``past_key_values``, ``inputs`` are the whole text or new tokens alone.

        They are the whole text if they begin as the text in the cache did, or if an ``attention_mask`` has
        their length. They are new tokens if they begin otherwise, or if the mask covers all places, ``[B,
        past + T]``. Raises ValueError if the cache covers the whole text already.
        """
        _refuse_shards(
            self.model, "generate: expected whole prompts", "it would read one per rank; inside alone() it runs on one"
        )
        cache, ids = kwargs.get("past_key_values"), kwargs.get("input_ids") if inputs is None else inputs
        if isinstance(cache, HLACache) and isinstance(ids, Tensor) and cache.get_seq_length():
            mask, past = kwargs.get("attention_mask"), cache.get_seq_length()
            if mask is None and cache.is_continued_by(ids):
                kwargs["attention_mask"] = torch.cat([cache.mask().to(ids.device), torch.ones_like(ids)], 1)
            elif (ids if mask is None else mask).shape[1] <= past:
                raise ValueError(
                    f"past_key_values: expected a cache of less than the whole text, got one of {past} places for "
                    f"inputs of {ids.shape[1]}: pass only new tokens, with an attention_mask [B, past + T]"
                )
        return super().generate(inputs, *args, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(_ONE_BATCH)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(_ONE_BATCH)

    @wraps(GenerationMixin._assisted_decoding)  # generate() asks for its arguments
    def _assisted_decoding(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._assisted_decoding(*args, **kwargs)
        finally:  # transformers lets the cache record on, and it would keep what leads back over all later tokens
            for layer in kwargs["past_key_values"].layers:
                layer.record_past = False

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """generate()'s cache: ours; another kind is refused."""
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(f"cache_implementation: expected None, an HLA cache has one size anyway; got {kind!r}")
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            cache = model_kwargs["past_key_values"] = HLACache(self.config)
            if generation_config.is_assistant:
                cache.activate_past_recording()
        else:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)


class HLAForSequenceClassification(GenericForSequenceClassification, HLAPreTrainedModel):
    """Texts to logits [B, num_labels], read at each row's last token that is not ``pad_token_id``."""

    @wraps(GenericForSequenceClassification.forward)  # the Trainer reads its arguments' names
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        _refuse_shards(
            self.model, "texts: expected whole ones", "their last token decides; inside alone() it runs on one rank"
        )
        return super().forward(*args, **kwargs)


class HLAForTokenClassification(GenericForTokenClassification, HLAPreTrainedModel):
    """Tokens to logits [B, T, num_labels]."""

    @wraps(GenericForTokenClassification.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("labels") is not None or len(args) > 5:
            _refuse_shards(
                self.model,
                "labels: expected none",
                "a shard's mean is not the whole text's: hla_dist.token_loss takes the logits",
            )
        return super().forward(*args, **kwargs)


def _refuse_shards(model: HLAModel, expected: str, reason: str) -> None:
    block: Any = model.network.blocks[0]
    group = block.attention.group
    if group is not None and group_size(group) > 1:
        raise ValueError(f"{expected}, got a model sharded over {group_size(group)} ranks ({reason})")
