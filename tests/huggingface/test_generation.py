"""generate() and its cache: every way of decoding gives what a full forward at each step gives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from hla_dist.huggingface import HLACache, byte_tokenizer
from tests.harness import assert_close, raises_value_error, shifted
from tests.huggingface.models import left_padded, model, tokens
from tests.tolerances import FLOAT64

VARIANTS: dict[str, dict[str, Any]] = {
    "hla2": {},
    "rotary": dict(attention={"rope_theta": 1e4}),
    "ahla": dict(op="ahla"),
    "hla3": dict(op="hla3", attention={"rope_theta": 1e4, "conv": 4}),
    "first order, ratio": dict(op="linear_attention", attention={"normalize": True, "feature_map": "elu+1"}),
    "window and memory": dict(pattern="memory", memory={"window": 3, "op": "hla2"}),
    "window and memory, joined per token": dict(
        pattern="memory", memory={"window": 3, "memory": "all", "join": "token", "gate_bias": 0.0}
    ),
    "grouped, gate a head": dict(num_heads=4, num_kv_heads=2, attention={"decay": "head"}),
}
DECODING: dict[str, dict[str, Any]] = {
    "greedy": dict(do_sample=False),
    "sampling": dict(do_sample=True, top_k=7, temperature=1.3),
    "several samples": dict(do_sample=True, num_return_sequences=3),
    "beams": dict(do_sample=False, num_beams=4, num_return_sequences=2),
    "sampled beams": dict(do_sample=True, num_beams=3),
    "penalties": dict(do_sample=False, repetition_penalty=1.3, no_repeat_ngram_size=2, min_new_tokens=3),
}


def generate(hla, ids, **options):
    torch.manual_seed(shifted(3))
    return hla.generate(ids, max_new_tokens=9, **options)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_prefill_and_decode_equal_the_full_forward(variant):
    """In pieces of several sizes, each with the cache of the last; the cache's size never changes."""
    hla, ids = model(**VARIANTS[variant]), tokens(2, 20)
    whole = hla(ids).logits
    cache, pieces, sizes, start = None, [], set(), 0
    for length in (7, 1, 1, 10, 1):
        out = hla(ids[:, start : start + length], past_key_values=cache, use_cache=True)
        cache, start = out.past_key_values, start + length
        assert isinstance(cache, HLACache) and cache.get_seq_length() == start and cache.get_max_length() == -1
        pieces.append(out.logits)
        sizes.add(cache.nbytes())
    assert_close("logits", torch.cat(pieces, 1), whole, FLOAT64)
    assert len(sizes) == 1 and sizes.pop() > 0


def test_a_text_ends_at_a_stop_string():
    hla, ids = model(vocab_size=256), tokens(1, 5)
    others = [token for token in range(256) if token != ord("a")]
    out = generate(hla, ids, do_sample=False, suppress_tokens=others, stop_strings=["aa"], tokenizer=byte_tokenizer())
    assert out[0, 5:].tolist() == list(b"aa")


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_padded_rows_equal_the_rows_alone(variant):
    """Left, right and inner padding, prefill and decode: logits at tokens, and the states, are those without it."""
    hla = model(**VARIANTS[variant])
    texts = [tokens(1, length, seed=length)[0] for length in (9, 4, 6)]
    ids, mask = left_padded(texts)
    ids[2], mask[2] = torch.tensor([*texts[2][:2], 0, *texts[2][2:], 0, 0]), torch.tensor([1, 1, 0, 1, 1, 1, 1, 0, 0])
    more = tokens(3, 3, seed=5)
    padded = hla(ids, attention_mask=mask, use_cache=True)
    after = hla(
        more, attention_mask=torch.cat([mask, torch.ones_like(more)], 1), past_key_values=padded.past_key_values
    )
    for row, text in enumerate(texts):
        alone = hla(torch.cat([text, more[row]])[None], use_cache=True)
        got = torch.cat([padded.logits[row, mask[row] == 1], after.logits[row]])
        assert_close("logits", got, alone.logits[0], FLOAT64)
        for layer, want in zip(after.past_key_values.layers, alone.past_key_values.layers):
            for one, two in zip(layer.state, want.state):
                assert_close("state", one[row], two[0], FLOAT64)


@pytest.mark.parametrize("decoding", DECODING)
def test_generation_with_the_cache_equals_without(decoding):
    hla, ids = model(attention={"rope_theta": 1e4}), tokens(2, 6)
    cached, plain = (generate(hla, ids, use_cache=use, **DECODING[decoding]) for use in (True, False))
    assert torch.equal(cached, plain) and len(cached.unique()) > 5
    if "greedy" in decoding:
        assert torch.equal(generate(hla, ids, prefill_chunk_size=4, do_sample=False), plain)
        embeds = hla.get_input_embeddings()(ids)
        assert torch.equal(generate(hla, None, inputs_embeds=embeds, do_sample=False), plain[:, ids.shape[1] :])


@pytest.mark.parametrize("options", [dict(), dict(num_beams=3)], ids=["greedy", "beams"])
@pytest.mark.parametrize(
    "variant", ["rotary", "window and memory", "window and memory, joined per token", "grouped, gate a head"]
)
def test_left_padded_batches_generate_what_each_text_does_alone(variant, options):
    hla = model(**VARIANTS[variant])
    texts = [tokens(1, length, seed=length)[0] for length in (3, 8, 5)]
    ids, mask = left_padded(texts)
    together = generate(hla, ids, attention_mask=mask, do_sample=False, **options)
    inferred = generate(hla, ids, do_sample=False, **options)  # from pad_token_id
    assert torch.equal(together, inferred)
    for row, text in enumerate(texts):
        alone = generate(hla, text[None], do_sample=False, **options)
        assert torch.equal(together[row, ids.shape[1] :], alone[0, len(text) :])


@torch.no_grad()
def test_a_prompts_cache_is_read_once_and_used_again():
    """A second call goes on from the first one's cache; a copy leaves the original for another continuation."""
    hla, prompt, questions = model(), tokens(1, 8), [tokens(1, 3, seed=s) for s in (7, 8)]
    read = hla(prompt, use_cache=True).past_key_values
    for question in questions:
        ids = torch.cat([prompt, question], 1)
        got = generate(hla, ids, past_key_values=copy.deepcopy(read), do_sample=False)
        assert torch.equal(got, generate(hla, ids, do_sample=False))
    assert read.get_seq_length() == 8


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_the_cache_moves_with_its_rows(variant):
    """Every row goes on as its text does alone, texts shorter than a window among them."""
    hla, texts = model(**VARIANTS[variant]), [tokens(1, length, seed=length)[0] for length in (5, 1, 8)]
    (ids, mask), next_tokens = left_padded(texts), tokens(3, 2, seed=9)

    def after(change, rows):
        cache = hla(ids, attention_mask=mask, use_cache=True).past_key_values
        change(cache)
        more = next_tokens[rows]
        whole = torch.cat([mask[rows], torch.ones_like(more)], 1)
        got = hla(more, attention_mask=whole, past_key_values=cache).logits
        for place, row in enumerate(rows):
            want = hla(torch.cat([texts[row], next_tokens[row]])[None]).logits[0, -2:]
            assert_close("logits", got[place], want, FLOAT64)

    beams = torch.tensor([2, 2, 0])
    after(lambda cache: cache.reorder_cache(beams), beams)
    after(lambda cache: cache.batch_select_indices(beams[1:]), beams[1:])
    after(lambda cache: cache.batch_repeat_interleave(2), torch.tensor([0, 0, 1, 1, 2, 2]))
    after(lambda cache: cache.batch_select_indices(torch.tensor([1, 1])), torch.tensor([1, 1]))
    cache = hla(ids, use_cache=True).past_key_values
    assert cache.batch_size == 3
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.states is None and cache.nbytes() == 0


def test_what_a_state_cannot_do_is_refused_by_name():
    from transformers import DynamicCache

    hla, ids = model(), tokens(2, 4)
    with raises_value_error("cache_implementation: expected None", "got 'static'"):
        hla.generate(ids, cache_implementation="static", max_new_tokens=2)
    with raises_value_error("past_key_values: expected an HLACache, got DynamicCache"):
        hla(ids, past_key_values=DynamicCache())
    with raises_value_error("attention_mask: expected [B, past + T] = [2, 4], got [2, 3]"):
        hla(ids, attention_mask=torch.ones(2, 3))
    with raises_value_error("position_ids: expected [B, T] = [2, 4], got [2, 3]"):
        hla(ids, position_ids=torch.arange(3).expand(2, 3))
    with raises_value_error("input_ids, inputs_embeds: expected exactly one of them"):
        hla()
