"""What a batch says beside its tokens: padding, positions and packed documents, on one device and over ranks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hla_dist import HLAAttention, SequenceParallelHLA, SoftmaxAttention
from hla_dist.huggingface import HLAConfig, HLAForSequenceClassification, HLAForTokenClassification
from tests.harness import assert_close, raises_value_error, run_ranks
from tests.huggingface.models import SIZES, left_padded, model, tokens
from tests.tolerances import FLOAT64

ROTARY: dict[str, Any] = {"attention": {"rope_theta": 1e4}}
HYBRID: dict[str, Any] = {"pattern": "hla2,softmax", "softmax": {"window": 5}}
LENGTHS = (4, 1, 6)
CU = torch.tensor([0, 4, 5, 11], dtype=torch.int32)
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
NUMBERS = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))[None]
PACKED: dict[str, dict[str, Any]] = {
    "cu_seq_lens_q": {"cu_seq_lens_q": CU},
    "cu_seq_lens_k": {"cu_seq_lens_k": CU},
    "cu_seqlens": {"cu_seqlens": CU},
    "seq_idx": {"seq_idx": NUMBERS},
    "position_ids": {"position_ids": POSITIONS},
    "position_ids beside a mask of ones": {"position_ids": POSITIONS, "attention_mask": torch.ones(1, 11).bool()},
    "all that a collator returns": {
        "cu_seq_lens_q": CU, "cu_seq_lens_k": CU.clone(), "max_length_q": 6, "max_length_k": 6, "seq_idx": NUMBERS,
        "position_ids": POSITIONS,
    },
}  # fmt: skip


@pytest.mark.parametrize("told", PACKED)
def test_packed_documents_do_not_see_each_other(told):
    hla = model(**ROTARY)
    texts = [tokens(1, length, seed=length) for length in LENGTHS]
    got = hla(torch.cat(texts, 1), **PACKED[told]).logits.split(LENGTHS, 1)
    for one, text in zip(got, texts, strict=True):
        assert_close("logits", one, hla(text).logits, FLOAT64)
    with raises_value_error("use_cache, past_key_values: expected neither with packed documents"):
        hla(torch.cat(texts, 1), **PACKED[told], use_cache=True)


@pytest.mark.parametrize("options", [ROTARY, HYBRID], ids=["rotary", "hybrid"])
def test_documents_in_several_rows(options):
    hla, ids = model(**options), tokens(2, 8)
    cuts = (3, 6)
    positions = torch.stack([torch.cat([torch.arange(cut), torch.arange(8 - cut)]) for cut in cuts])
    numbers = (torch.arange(8) >= torch.tensor(cuts)[:, None]).long()
    for told in ({"position_ids": positions}, {"seq_idx": numbers}):
        got = hla(ids, **told).logits
        for row, cut in enumerate(cuts):
            parts = ids[row : row + 1].split([cut, 8 - cut], 1)
            assert_close("logits", got[row], torch.cat([hla(part).logits[0] for part in parts]), FLOAT64)


def test_keywords_that_nobody_reads_are_refused_by_name():
    hla, ids = model(), tokens(1, 11)
    for name in ("cu_seq_lens", "cu_seqlens_q", "segment_ids", "cache_position"):
        with raises_value_error(f"{name}: expected no argument of that name"):
            hla(ids, **{name: CU})
    hla(ids, segment_ids=None, num_items_in_batch=3, output_hidden_states=True)
    with raises_value_error("cu_seqlens: expected the same documents as cu_seq_lens_q"):
        hla(ids, cu_seq_lens_q=CU, cu_seqlens=CU[:2])
    with raises_value_error("seq_idx: expected the documents that cu_seq_lens tells"):
        hla(ids, cu_seqlens=CU, seq_idx=NUMBERS.flip(1))
    with raises_value_error("seq_idx: expected the documents that cu_seq_lens tells"):
        hla(ids, cu_seqlens=CU, seq_idx=torch.zeros_like(NUMBERS))
    with raises_value_error("cu_seqlens: expected one row (B = 1)"):
        hla(tokens(2, 11), cu_seqlens=CU)


def test_float_masks_mean_padding_where_they_are_minus_infinity():
    hla, ids = model(), tokens(2, 7)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = mask[1, 5:] = 0
    want = hla(ids, attention_mask=mask).logits[mask == 1]
    for cut in (-torch.inf, torch.finfo(torch.float32).min):
        floats = torch.zeros(2, 7).masked_fill(mask == 0, cut)
        assert_close("logits", hla(ids, attention_mask=floats).logits[mask == 1], want, FLOAT64)
    x = torch.randn(2, 7, 16)
    for layer in (HLAAttention(16, 2), SoftmaxAttention(16, 2)):
        floats = torch.zeros(2, 7).masked_fill(mask == 0, -torch.inf)
        assert torch.equal(layer(x, attention_mask=floats)[0], layer(x, attention_mask=mask)[0])
        for wrong in (mask.float(), floats - 1):
            with raises_value_error("attention_mask: expected bool, integers (0 at padding), or floats of 0"):
                layer(x, attention_mask=wrong)
    with raises_value_error("attention_mask: expected bool, integers (0 at padding), or floats of 0"):
        hla(ids, attention_mask=mask.float())


@pytest.mark.parametrize("options", [ROTARY, HYBRID], ids=["rotary", "hybrid"])
@torch.no_grad()
def test_without_a_mask_a_call_goes_on_where_each_row_of_the_cache_ends(options):
    hla, texts = model(**options), [tokens(1, n, seed=n)[0] for n in (8, 3)]
    ids, mask = left_padded(texts)
    more = tokens(2, 4, seed=9)
    cache = hla(ids, attention_mask=mask, use_cache=True).past_key_values
    assert cache.tokens.tolist() == [8, 3] and cache.get_seq_length() == 8
    got = hla(more, past_key_values=copy.deepcopy(cache)).logits
    generated = hla.generate(more, past_key_values=copy.deepcopy(cache), max_new_tokens=3, do_sample=False)
    for row, text in enumerate(texts):
        whole = torch.cat([text, more[row]])[None]
        assert_close("logits", got[row], hla(whole).logits[0, -4:], FLOAT64)
        alone = hla.generate(whole, max_new_tokens=3, do_sample=False)
        assert torch.equal(generated[row, 4:], alone[0, whole.shape[1] :])


@torch.no_grad()
def test_a_cache_that_covers_the_prompt_is_refused():
    hla, ids = model(), tokens(1, 12)
    cache = hla(ids, use_cache=True).past_key_values
    for prompt, mask in ((ids, None), (ids, torch.ones_like(ids)), (ids[:, :9], None)):
        with raises_value_error("past_key_values: expected a cache of less than the whole text", "only new tokens"):
            hla.generate(prompt, attention_mask=mask, past_key_values=copy.deepcopy(cache), max_new_tokens=2)
    new = tokens(1, 20, seed=5)  # more than the cache has, and another beginning
    got = hla.generate(new, past_key_values=copy.deepcopy(cache), max_new_tokens=2, do_sample=False)
    want = hla.generate(torch.cat([ids, new], 1), max_new_tokens=2, do_sample=False)
    assert torch.equal(got[:, -2:], want[:, -2:])
    with raises_value_error("generate_batch: expected generate()"):
        hla.generate_batch([[1, 2]])


def padded_batch() -> tuple[Tensor, Tensor]:
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[0, :4] = mask[1, 9:] = mask[1, 2] = 0
    return tokens(2, 13), mask


def on_ranks(lengths: list[int]) -> dict[str, Tensor]:
    """Logits of this rank's shard by case; gradients of the last one."""
    rank, group, results = dist.get_rank(), dist.group.WORLD, {}
    ids, mask = padded_batch()
    here = slice(sum(lengths[:rank]), sum(lengths[: rank + 1]))
    for name, options in (("rotary", ROTARY), ("hybrid", HYBRID)):
        hla = SequenceParallelHLA(model(**options), group, shard_lengths=lengths)
        for padding in (torch.ones_like(mask), mask):
            logits = hla(ids[:, here], attention_mask=padding[:, here], use_cache=False).logits
            results[f"{name} {bool(padding.all())}"] = logits.detach()
        packed = tokens(1, 13)
        for told, value in (("position_ids", documents()[0]), ("seq_idx", documents()[1])):
            results[f"{name} {told}"] = hla(packed[:, here], **{told: value[:, here]}, use_cache=False).logits.detach()
        cache = hla(ids[:, here], attention_mask=mask[:, here], use_cache=True).past_key_values
        results[f"{name} counts"] = torch.tensor([cache.get_seq_length(), *cache.tokens])
        (logits * mask[:, here, None]).sum().backward()
        results[f"{name} gradient"] = hla.module.get_input_embeddings().weight.grad
    with raises_value_error("labels: expected none, got a model sharded over 2 ranks", "token_loss"):
        hla(ids[:, here], labels=ids[:, here])
    with raises_value_error("generate: expected whole prompts, got a model sharded over 2 ranks", "alone()"):
        hla.generate(ids[:, here], max_new_tokens=1)
    with hla.alone() as alone:
        assert alone(ids, labels=ids).loss > 0 and alone.generate(ids, max_new_tokens=1).shape == (2, 14)
    texts = HLAForSequenceClassification(HLAConfig(**SIZES))
    with raises_value_error("texts: expected whole ones", "sharded over 2 ranks"):
        SequenceParallelHLA(texts, group)(ids[:, here])
    each_token = SequenceParallelHLA(HLAForTokenClassification(HLAConfig(**SIZES)), group)
    assert each_token(ids[:, here]).logits.shape == (2, lengths[rank], 2)
    with raises_value_error("labels: expected none, got a model sharded over 2 ranks", "token_loss"):
        each_token(ids[:, here], labels=ids[:, here] % 2)
    with raises_value_error("frobnicate: expected no argument of that name"):
        hla(ids[:, here], **({"frobnicate": 1} if rank == 0 else {}))
    return results


def documents() -> tuple[Tensor, Tensor]:
    """Positions and numbers of the documents of 13 tokens of which one begins with the second rank's shard."""
    lengths = torch.tensor([3, 5, 5])
    positions = torch.cat([torch.arange(n) for n in lengths.tolist()])[None]
    return positions, torch.repeat_interleave(torch.arange(3), lengths)[None]


def test_shards_with_masks_and_documents_equal_one_device():
    """Positions beside a mask, even of ones, are those of the whole text; so are padding and documents."""
    ids, mask = padded_batch()
    ranks = run_ranks(on_ranks, 2, [8, 5], timeout=120)
    for name, options in (("rotary", ROTARY), ("hybrid", HYBRID)):
        hla = model(**options)
        for padding in (torch.ones_like(mask), mask):
            got = torch.cat([rank[f"{name} {bool(padding.all())}"] for rank in ranks], 1)
            want = hla(ids, attention_mask=padding).logits
            assert_close(name, got[padding == 1], want[padding == 1], FLOAT64)
        (want * mask[..., None]).sum().backward()
        packed = hla(tokens(1, 13), position_ids=documents()[0]).logits
        assert (packed - hla(tokens(1, 13)).logits).norm() > 0.01 * packed.norm()
        for told in ("position_ids", "seq_idx"):
            assert_close(told, torch.cat([rank[f"{name} {told}"] for rank in ranks], 1), packed, FLOAT64)
        for rank in ranks:
            assert rank[f"{name} counts"].tolist() == [13, 9, 8]
            assert_close("gradient", rank[f"{name} gradient"], hla.get_input_embeddings().weight.grad, FLOAT64)
