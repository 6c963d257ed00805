"""Assisted generation and crop: greedy decoding's tokens, whoever guesses them, and caches that go back exactly."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from hla_dist.huggingface import HLACache, HLAForCausalLM
from tests.harness import assert_close, raises_value_error
from tests.huggingface.models import left_padded, model, tokens
from tests.tolerances import FLOAT64

VARIANTS: dict[str, dict[str, Any]] = {
    "linear_attention": dict(op="linear_attention"),
    "hla2": dict(attention={"rope_theta": 1e4}),
    "ahla": dict(op="ahla", attention={"decay": "head"}),
    "hla3": dict(op="hla3", attention={"conv": 4}),
    "key term": dict(attention={"key_term": True, "conv": 4, "rope_theta": 1e4}),
    "memory": dict(pattern="memory,hla2", memory={"window": 5}),
    "memory, joined per token": dict(
        pattern="memory", memory={"window": 5, "memory": "all", "join": "token", "gate_bias": 0.0}
    ),
    "hybrid": dict(pattern="hla2,softmax", softmax={"window": 5}),
}


def new_tokens(hla: HLAForCausalLM, ids: torch.Tensor, **options: Any) -> tuple[torch.Tensor, int]:
    """The whole text, and how many calls of the model wrote it."""
    calls = []
    hook = hla.register_forward_hook(lambda *_: calls.append(1))
    text = hla.generate(ids, max_new_tokens=10, do_sample=False, **options)
    hook.remove()
    return text, len(calls)


@pytest.mark.parametrize("variant", VARIANTS)
def test_assisted_generation_writes_what_greedy_does(variant: str) -> None:
    """By prompt lookup, with a draft model that is nearly always wrong, and with one that is always right."""
    hla, draft = model(**VARIANTS[variant]), model(num_layers=1, op="ahla")
    ids = tokens(1, 6).repeat(1, 3)
    want, calls = new_tokens(hla, ids)
    for options in (dict(prompt_lookup_num_tokens=3), dict(assistant_model=draft)):
        assert torch.equal(new_tokens(hla, ids, **options)[0], want)
    twin = copy.deepcopy(hla)
    twin.generation_config.num_assistant_tokens = 4
    twin.generation_config.assistant_confidence_threshold = 0.0
    cache = HLACache(hla.config)
    text, fewer = new_tokens(hla, ids, assistant_model=twin, past_key_values=cache)
    assert torch.equal(text, want) and calls == 10 and fewer <= 3
    # the cache is that of greedy decoding, and nothing more
    size, read = cache.nbytes(), cache.get_seq_length()
    hla(text[:, read:], past_key_values=cache)
    assert not cache.records and read == 27 and cache.nbytes() == size


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_crop_goes_back_over_several_calls(variant: str) -> None:
    """Padded rows; after a crop every logit, and the cache, are those of a text that was never longer."""
    hla, more = model(**VARIANTS[variant]), tokens(3, 4, seed=5)
    ids, mask = left_padded([tokens(1, length, seed=length)[0] for length in (11, 5, 8)])

    def read(cache: HLACache, begin: int, end: int) -> torch.Tensor:
        return hla(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache).logits

    for first in (0, 4):  # the text's beginning can be taken back, too
        cache = HLACache(hla.config)
        if first:
            read(cache, 0, first)
        cache.activate_past_recording()
        for begin, end in ((first, 7), (7, 8), (8, 11)):
            read(cache, begin, end)
        bytes_to_go_back = cache.nbytes()
        for back, length in ((-5, 6), (0, 6)):
            cache.crop(back)
            assert cache.get_seq_length() == length and cache.nbytes() < bytes_to_go_back
        want = HLACache(hla.config)
        read(want, 0, 6)
        assert torch.equal(cache.tokens, want.tokens) and torch.equal(cache.mask(), mask[:, :6])
        assert torch.equal(cache.beginning, ids[:, : first or 6])
        read(cache, 6, 11)
        cache.batch_select_indices(torch.tensor([2, 0, 1]))
        cache.crop(-5)
        cache.reorder_cache(torch.tensor([1, 2, 0]))
        for layer, other in zip(cache.layers, want.layers, strict=True):
            for one, two in zip(layer.state, other.state, strict=True):
                assert_close("state", one, two, FLOAT64)
        whole = torch.cat([mask[:, :6], torch.ones_like(more)], 1)
        got, plain = (hla(more, attention_mask=whole, past_key_values=one).logits for one in (cache, want))
        assert_close("logits", got, plain, FLOAT64)


@torch.no_grad()
def test_a_crop_that_is_impossible_is_refused() -> None:
    hla, ids = model(), tokens(2, 4)
    cache = hla(ids, use_cache=True).past_key_values
    with raises_value_error("crop: expected 0 to 0, minus the places", "activate_past_recording() on, got -1"):
        cache.crop(-1)
    cache.activate_past_recording()
    hla(ids[:, :2], past_key_values=cache)
    for wrong in (-3, 1):
        with raises_value_error("crop: expected -2 to 0", f"got {wrong}"):
            cache.crop(wrong)
    cache.crop(0)
    with raises_value_error("crop: expected 0 to 0"):
        cache.crop(-1)
    assert cache.get_seq_length() == 6
