"""First order against flash-linear-attention's own references: linear attention, RetNet's retention, simple GLA.

Their functions are plain torch, loaded from the installed distribution file by file: importing the package itself
needs Triton and a GPU. All but one compute in float32.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from importlib.metadata import distribution
from types import ModuleType

import pytest
import torch
from torch import Tensor

import hla_dist
from tests.harness import assert_close, shifted
from tests.tolerances import tolerance


def theirs(name: str) -> ModuleType:
    """The module ``fla.ops.<name>.naive``, alone."""
    path = distribution("fla-core").locate_file(f"fla/ops/{name}/naive.py")
    spec = importlib.util.spec_from_file_location(f"fla_{name}_naive", str(path))
    assert spec is not None and spec.loader is not None, f"fla-core has no {path}"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def inputs(T: int, dtype: torch.dtype, positive: bool = False) -> dict[str, Tensor]:
    """q, k, v, per-token log gates (heads of different memory), an initial state; K differs from V."""
    generator = torch.Generator().manual_seed(shifted(T))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    B, H, K, V = 2, 3, 16, 24
    x = {"q": normal(B, T, H, K), "k": normal(B, T, H, K), "v": normal(B, T, H, V)}
    if positive:  # elu(x) + 1, the feature map of the first linear transformer
        x |= {name: torch.nn.functional.elu(x[name]) + 1 for name in "qk"}
    x["g"] = -torch.rand(B, T, H, generator=generator, dtype=dtype) * torch.tensor([0.001, 0.1, 3.0], dtype=dtype)
    x["state"] = normal(B, H, K, V)
    return x


def compare(ours: Callable[..., tuple], other: Callable[..., tuple], x: dict[str, Tensor]) -> None:
    """Outputs, and the gradients of every input."""
    results = []
    for function in (ours, other):
        leaves = {name: value.clone().requires_grad_() for name, value in x.items()}
        outputs = function(**leaves)
        generator = torch.Generator().manual_seed(shifted(1))
        weights = [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in outputs]
        gradients = torch.autograd.grad(outputs, list(leaves.values()), weights)
        names = [f"output {i}" for i in range(len(outputs))] + [f"d{name}" for name in leaves]
        results.append(dict(zip(names, [*outputs, *gradients], strict=True)))
    for name, value in results[0].items():
        kind = "dlog_decay" if name == "dg" else name
        assert_close(name, value.detach(), results[1][name].detach(), tolerance(value.dtype, kind))


@pytest.mark.parametrize("normalize", [False, True])
def test_linear_attention_in_float64(normalize: bool) -> None:
    naive = theirs("linear_attn").naive_chunk_linear_attn
    x = inputs(192, torch.float64, positive=normalize)
    del x["g"], x["state"]

    def ours(q: Tensor, k: Tensor, v: Tensor) -> tuple:
        return hla_dist.linear_attention(q, k, v, scale=0.25, normalize=normalize, eps=1e-10)[:1]

    compare(ours, lambda q, k, v: (naive(q, k, v, scale=0.25, normalize=normalize),), x)


def test_linear_attention_with_states() -> None:
    naive = theirs("linear_attn").naive_recurrent_linear_attn
    x = inputs(77, torch.float32)
    del x["g"]

    def ours(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple:
        initial = hla_dist.LinearState(state)
        out, final = hla_dist.linear_attention(q, k, v, scale=0.25, initial_state=initial, output_final_state=True)
        return out, final.P

    def other(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple:
        return naive(q, k, v, scale=0.25, initial_state=state, output_final_state=True)

    compare(ours, other, x)


def test_retention_is_a_gate_per_head() -> None:
    naive = theirs("retention").naive_retention
    x = inputs(130, torch.float32)
    del x["g"], x["state"]
    log_decay = torch.log1p(-(2.0 ** -(5.0 + torch.arange(3))))

    def ours(q: Tensor, k: Tensor, v: Tensor) -> tuple:
        return hla_dist.linear_attention(q, k, v, log_decay=log_decay, scale=q.shape[-1] ** -0.5)[:1]

    compare(ours, lambda **y: (naive(*(t.transpose(1, 2) for t in y.values())).transpose(1, 2),), x)


def test_simple_gla_is_a_gate_per_token() -> None:
    naive = theirs("simple_gla").naive_recurrent_simple_gla
    x = inputs(131, torch.float32)

    def ours(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple:
        initial = hla_dist.LinearState(state)
        out, final = hla_dist.linear_attention(
            q, k, v, log_decay=g, scale=q.shape[-1] ** -0.5, initial_state=initial, output_final_state=True
        )
        return out, final.P

    def other(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple:
        return naive(q, k, v, g, initial_state=state)

    compare(ours, other, x)


def test_hla2_is_two_of_their_linear_attentions() -> None:
    naive = theirs("linear_attn").naive_chunk_linear_attn
    x = inputs(128, torch.float64)
    del x["g"], x["state"]

    def other(q: Tensor, k: Tensor, v: Tensor) -> tuple:
        return (naive(q, naive(q, k, k, scale=1.0), v, scale=1.0),)

    compare(lambda q, k, v: hla_dist.hla2(q, k, v)[:1], other, x)
