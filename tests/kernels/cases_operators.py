"""Every operator on backend="triton" against the oracle in float64: outputs, states, every gradient. Interpreted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import hla_dist
from hla_dist.reference import quadratic
from hla_kernels import device, tiles
from tests.harness import assert_close, relative_error
from tests.kernels.interpreted import NONE_OF_THEM, ONE_OF_THEM, THE_LONGEST, compare, ridge_of, slowly
from tests.problems import Problem, draw, oracle, run
from tests.tolerances import FLOAT32, LOW_PRECISION_FACTOR


@pytest.mark.parametrize(("name", "mask"), THE_LONGEST)
def test_several_segments_with_gates_ridge_scale_and_grouped_heads(name, mask, short_segments) -> None:
    compare(
        Problem(
            name,
            mask,
            T=40,
            H=2,
            G=1,
            K=20,
            V=12,
            gate_values="per_head",
            scale=0.7,
            ridge=ridge_of(name),
            dtype=torch.float32,
        )
    )


@pytest.mark.parametrize(("name", "mask"), NONE_OF_THEM)
def test_several_segments_without_gates(name, mask, short_segments) -> None:
    compare(Problem(name, mask, T=70, H=1, K=5, V=33, gates="none", ridge=ridge_of(name), dtype=torch.float32))


@pytest.mark.parametrize(("name", "mask"), NONE_OF_THEM)
def test_one_segment_normalised_with_fixed_gates(name, mask) -> None:
    compare(Problem(name, mask, B=2, T=65, H=1, K=16, V=16, gates="H", normalize=True, dtype=torch.float32))


@pytest.mark.parametrize(("name", "mask"), NONE_OF_THEM)
def test_a_single_token(name, mask) -> None:
    """The decoding step, and its gradients."""
    shapes = {"T": 1, "H": 2, "G": 1, "K": 20, "V": 12, "scale": 0.7, "ridge": ridge_of(name), "dtype": torch.float32}
    compare(Problem(name, mask, B=2, gates="BTH", **shapes))
    compare(Problem(name, mask, gates="none", normalize=True, **shapes))


@pytest.mark.parametrize(("name", "mask"), ONE_OF_THEM)
@pytest.mark.parametrize(("columns", "launches"), [(16, 1), (65, None)])
def test_a_cascade_that_fits_is_one_launch(name, mask, columns, launches, monkeypatch) -> None:
    """And one that does not runs pass by pass."""
    found = []

    def launcher(kernel, grid, arguments, options):
        found.append(kernel.fn.__name__)
        kernel[(grid,)](**arguments)

    monkeypatch.setattr(device, "_launcher", launcher)
    q, k, v = torch.randn(3, 1, 40, 1, columns).unbind()
    hla_dist_out, _ = getattr(hla_dist, name)(q, k, v, mask=mask, backend="triton")
    want, _ = hla_dist.reference.quadratic(name, q.double(), k.double(), v.double(), mask=mask)
    assert_close("out", hla_dist_out, want, FLOAT32)
    passes = 1 if name == "linear_attention" else 3 if name == "hla3" else 2
    kernel = "first_order_kernel" if launches is None or name == "linear_attention" else "fused_forward_kernel"
    assert found == [kernel] * (launches or passes)


@pytest.mark.parametrize("T", [0, slowly(31), 32, 33])
def test_lengths_about_a_chunk(T, short_segments) -> None:
    gates = "BTG" if T % 2 else "G"  # a gate a K/V head
    compare(Problem("hla2", T=T, K=17, V=16, gates=gates, scale=0.5, ridge=0.2, strided=True, dtype=torch.float32))


@pytest.mark.parametrize("gate_values", ["hard_cut", slowly("near_zero"), slowly("near_one"), slowly("zero")])
def test_gates_of_every_strength(gate_values, short_segments) -> None:
    compare(Problem("hla2", T=70, H=1, gate_values=gate_values, scale=0.5, dtype=torch.float32))


@pytest.mark.parametrize(("name", "mask"), ONE_OF_THEM)
def test_a_cut_is_a_cut_whatever_its_number(name, mask, short_segments) -> None:
    """Two in one chunk, one that ends a segment, the first token: results alike, no gradient, never NaN."""
    inputs = torch.randn(3, 1, 40, 1, 8) / 3
    found = []
    for number in (-1e4, torch.finfo(torch.float32).min):
        log = torch.full((1, 40, 1), -0.1)
        log[:, [0, 3, 5, 32, 39]] = number
        leaves = [x.clone().requires_grad_() for x in (*inputs, log)]
        out, state = getattr(hla_dist, name)(
            *leaves[:3], log_decay=leaves[3], mask=mask, output_final_state=True, backend="triton"
        )
        loss = out.square().sum() + sum(x.sum() for x in state)
        found.append([out, *state, *torch.autograd.grad(loss, leaves)])
        assert not found[-1][-1][:, [0, 3, 5, 32, 39]].any() and found[-1][-1].any()
    for x, *others in zip(*found, strict=True):
        assert x.isfinite().all() and all(torch.equal(x, other) for other in others)


PER_CHANNEL = Problem("linear_attention", T=40, H=2, G=1, K=18, V=5, gates="BTGK", scale=0.7, dtype=torch.float32)


@pytest.mark.parametrize(
    "more",
    [
        dict(gate_values="per_head"),
        slowly(dict(gates="BTHK", gate_values="hard_cut", T=33, V=35)),
        slowly(dict(gates="BTHK", gate_values="least", normalize=True, strided=True)),
        slowly(dict(gate_values="zero", T=0)),
        slowly(dict(gates="BTHK", T=1)),
        slowly(dict(gates="BTHK", T=73, documents=(33, 0, 1, 39))),
    ],
    ids=str,
)
def test_gates_per_channel(more, short_segments, monkeypatch) -> None:
    """As on a GPU: programs with a part of the state's columns or rows each."""
    monkeypatch.setattr(tiles, "channels", lambda *args: tiles.Tile(16, 16, 4, 1, 16))
    compare(replace(PER_CHANNEL, **more))


@pytest.mark.parametrize(("name", "mask"), NONE_OF_THEM)
def test_float16_at_most_twice_the_error_of_plain_torch(name, mask, monkeypatch) -> None:
    """Pass by pass, as on a GPU: only bfloat16 walks a whole cascade at once."""
    monkeypatch.setattr(tiles, "fused", lambda *args: None)
    problem = Problem(
        name, mask, T=70, H=2, G=1, K=16, V=16, scale=0.05, gates="BTH", state=False, dtype=torch.float16, seed=1
    )
    per_channel = [replace(problem, gates="BTHK")] if name == "linear_attention" else []
    for case in (problem, replace(problem, normalize=True, gates="none"), *per_channel):
        tensors = draw(case)
        want = oracle(case, tensors)
        plain = oracle(case, tensors, quadratic, dtype=torch.float16)
        got = run(case, tensors, getattr(hla_dist, name), backend="triton")
        for key in want:
            allowed = LOW_PRECISION_FACTOR * relative_error(plain[key], want[key])
            assert_close(f"{key} of {case}", got[key], want[key], allowed)


def test_float16_inner_sequences_do_not_overflow() -> None:
    """u = q T 16 is 1e5 at the end; the output, v of which is small, is not."""
    ones = torch.ones(1, 100, 1, 16, dtype=torch.float16)
    out, _ = hla_dist.hla2(ones, 16 * ones, ones * 2**-20, backend="triton")
    want = hla_dist.reference.serial("hla2", ones.double(), 16 * ones.double(), ones.double() * 2**-20)[0]
    assert want.abs().max() < 65504 < 16**2 * 16 * 100
    assert_close("out", out, want, torch.finfo(torch.float16).eps)


@pytest.mark.parametrize(
    ("name", "K", "V", "gates"),
    [
        slowly("linear_attention", 256, 96, "H"),
        slowly("hla2", 128, 128, "BTH"),
        slowly("hla2", 64, 256, "none"),
        slowly("ahla", 96, 80, "BTH"),
        slowly("hla3", 32, 64, "BTH"),
    ],
)
def test_head_dims(name, K, V, gates, short_segments) -> None:
    compare(Problem(name, T=45, H=1, K=K, V=V, gates=gates, scale=1 / K, ridge=ridge_of(name), dtype=torch.float32))


def test_offsets_beyond_31_bits() -> None:
    """Batch elements and tokens further apart than that; the storage is never touched between them."""
    apart, T, D = 2**24 - 16, 135, 16
    storage = torch.from_numpy(np.zeros(T * apart + 2**20, dtype=np.float16))
    q = storage.as_strided((2, T, 1, D), (2**31, D, D, 1))
    k = storage.as_strided((2, T, 1, D), (D, apart, D, 1), 2**16)
    for x in (q, k):
        x.copy_(torch.randn(x.shape) / 4)
    v = torch.randn(2, T, 1, D).half()
    assert (T - 1) * apart > 2**31
    got, _ = hla_dist.linear_attention(q, k, v, backend="triton")
    want, _ = hla_dist.linear_attention(q.contiguous(), k.contiguous(), v, backend="triton")
    assert torch.equal(got, want) and want.isfinite().all() and want.abs().min(1).values.max() > 0


def test_tokens_too_far_apart_for_a_chunk_are_copied() -> None:
    storage = torch.from_numpy(np.zeros(2**24 * 4, dtype=np.float32))
    q = storage.as_strided((1, 3, 1, 4), (4, 2**24, 4, 1))
    q.copy_(torch.randn(q.shape))
    got, want = (hla_dist.hla2(x, x, x, backend="triton")[0] for x in (q, q.contiguous()))
    assert torch.equal(got, want)
