"""shard, unshard, shard_batch and token_loss: losses and gradients that do not depend on who owns which tokens."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from hla_dist.parallel.collectives import counter
from hla_dist.parallel.shard import default_lengths, shard, shard_batch, token_loss, unshard
from tests.harness import assert_bitwise, assert_close, raises_value_error, shifted
from tests.tolerances import FLOAT64, ROUND_OFF

SPLITS = {
    1: [[13]],
    2: [None, [13, 0]],
    3: [None, [0, 4, 9]],
    4: [None, [5, 0, 7, 1]],
    8: [None, [3, 0, 0, 1, 2, 0, 7, 0]],
}


def _sequence(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(shifted(0)))


def _cut_and_join(pg, lengths):
    rank = dist.get_rank(pg)
    x = _sequence(2, 13, 3)
    weight = _sequence(2, 13, 3) + rank  # every rank weighs the whole differently
    mine = shard(x, pg, lengths=lengths).requires_grad_()
    counter.reset()
    whole = unshard(mine, pg, lengths=lengths)
    sent = counter.calls
    (whole * weight).sum().backward()
    other_dim = unshard(mine.detach().transpose(0, 1).half(), pg, lengths, dim=0)
    return mine.shape[1], whole.detach(), mine.grad, sent, counter.calls, other_dim


@pytest.mark.parametrize("size", SPLITS)
def test_unshard_joins_what_shard_cut_and_sums_gradients(pool, size):
    x = _sequence(2, 13, 3)
    want = sum(_sequence(2, 13, 3) + rank for rank in range(size))
    for lengths in SPLITS[size]:
        owned = default_lengths(13, size) if lengths is None else lengths
        results = pool.run_group(size, _cut_and_join, lengths)
        grads = want.split(owned, dim=1)
        for (length, whole, grad, forward, both, other_dim), expected, n in zip(results, grads, owned, strict=True):
            assert length == n
            assert_bitwise("whole", whole, x)
            assert_close("gradient of a shard", grad, expected, ROUND_OFF, scale=want.norm().item())
            assert_bitwise("dim 0, half", other_dim, x.transpose(0, 1).half())
            # one gather forward (and one of lengths where they are not given); the sum, and the second unshard
            asked = 0 if lengths else 1
            assert (forward, both) == ((0, 0) if size == 1 else (1 + asked, 2 + asked + 1 + asked))


def _batch_and_loss(pg, tokens, logits, lengths, valid):
    batch = shard_batch(tokens, pg, lengths)
    mine = shard(logits, pg, lengths=lengths).requires_grad_()
    counter.reset()
    loss = token_loss(mine, batch.labels, pg, valid_tokens=valid)
    calls = counter.calls
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total, group=pg)
    return batch, total, mine.grad, calls


@pytest.mark.parametrize("size", SPLITS)
def test_losses_and_gradients_do_not_depend_on_the_split(pool, size):
    generator = torch.Generator().manual_seed(shifted(1))
    tokens = torch.randint(0, 11, (2, 14), generator=generator)
    tokens[0, 9:] = -100  # padding: whole shards without a valid token
    logits = _sequence(2, 13, 11).requires_grad_()
    want = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=-100)
    (dlogits,) = torch.autograd.grad(want, logits)
    valid = int((tokens[:, 1:] != -100).sum())
    for lengths in SPLITS[size]:
        for given in (None, valid):
            results = pool.run_group(size, _batch_and_loss, tokens, logits.detach(), lengths, given)
            batches = [r[0] for r in results]
            assert torch.equal(torch.cat([b.labels for b in batches], 1), tokens[:, 1:])
            assert torch.equal(torch.cat([b.inputs for b in batches], 1), tokens[:, :-1].clamp(min=0))
            assert torch.equal(torch.cat([b.positions for b in batches]), torch.arange(13))
            assert_close("gradient", torch.cat([r[2] for r in results], 1), dlogits, FLOAT64)
            for _, total, _, calls in results:
                assert_close("loss", total, want.detach(), FLOAT64)
                assert calls == (0 if size == 1 or given else 1)


def test_a_loss_without_tokens_is_zero_and_connected():
    for shape in ((1, 0, 5), (1, 3, 5)):
        logits = torch.randn(shape, requires_grad=True)
        loss = token_loss(logits, torch.full(shape[:2], -100))
        loss.backward()
        assert loss.item() == 0.0
        assert torch.equal(logits.grad, torch.zeros(shape))


def test_low_precision_logits_give_a_float32_loss():
    logits = torch.randn(1, 300, 50)
    labels = torch.randint(0, 50, (1, 300))
    loss = token_loss(logits.bfloat16(), labels)
    assert loss.dtype == torch.float32
    assert_close("loss", loss, F.cross_entropy(logits.bfloat16().double().flatten(0, 1), labels.flatten()), 1e-5)


def test_bad_input_is_named():
    x, tokens = torch.randn(2, 5, 3), torch.zeros(2, 6, dtype=torch.long)
    for call, parts in (
        (lambda: shard(x, None, dim=3), ("dim", "[2, 5, 3]", "got 3")),
        (lambda: shard(x, None, lengths=[2, 3]), ("lengths", "each of 1 ranks", "got 2")),
        (lambda: shard(x, None, lengths=[4]), ("lengths", "sum to the 5", "got [4]")),
        (lambda: shard(x, None, lengths=[-5]), ("lengths", ">= 0", "got [-5]")),
        (lambda: shard(x, "world"), ("group",)),
        (lambda: unshard(x, None, lengths=[4]), ("lengths", "sum to the 5", "got [4]")),
        (lambda: shard_batch(tokens.float(), None), ("tokens", "integers [B, T + 1]", "torch.float32")),
        (lambda: shard_batch(tokens[0], None), ("tokens", "[B, T + 1]", "[6]")),
        (lambda: shard_batch(tokens[:, :1], None), ("tokens", "at least 2", "[2, 1]")),
        (lambda: token_loss(x, tokens), ("labels", "[2, 5]", "[2, 6]")),
        (lambda: token_loss(tokens, tokens), ("logits", "floating-point", "torch.int64")),
        (lambda: token_loss(x, tokens[:, 1:] + 3), ("labels", "[0, 3)", "3 to 3")),
    ):
        with raises_value_error(*parts):
            call()


def _bad_on_one_rank(pg):
    rank = dist.get_rank(pg)
    x = torch.randn(2, 3, 4 if rank == 1 else 5)
    for call, parts in (
        (lambda: unshard(x, pg), ("x: expected the same", "[2, 3, 5] on rank 0", "[2, 3, 4] on rank 1")),
        (
            lambda: unshard(x.to(torch.float64 if rank == 2 else torch.float32)[..., :4], pg),
            ("x: expected the same dtype",),
        ),
        (lambda: unshard(x[..., :4], pg, dim=5 if rank == 0 else 1), ("dim: expected a dimension", "wrong on rank 0")),
        (lambda: unshard(x, pg, lengths=[3, 3]), ("lengths", "each of 3 ranks", "got 2")),
        (lambda: unshard(x, pg, lengths=[4, 4, 4]), ("x: expected lengths[", "= 4")),
        (lambda: token_loss(x, torch.zeros(2, 4 if rank == 1 else 3).long(), pg), ("labels: expected",)),
        (lambda: token_loss(x, torch.full((2, 3), 9 * (rank == 1)), pg), ("labels: expected",)),
    ):
        with raises_value_error(*parts):
            call()


def test_one_ranks_mistake_is_every_ranks_error(pool):
    pool.run_group(3, _bad_on_one_rank, timeout=20)
