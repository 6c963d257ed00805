"""bf16 and fp16: at most twice the error of plain torch in the same dtype, both against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import hla_dist
from hla_dist.reference import quadratic
from tests.harness import assert_close, relative_error
from tests.problems import KINDS, Problem, draw, errors_of_plain_torch, mask_options, oracle, run
from tests.tolerances import LOW_PRECISION_FACTOR

DTYPES = [torch.bfloat16, torch.float16]


def _problem(name: str, mask: str, dtype: torch.dtype, **options) -> Problem:
    streaming = mask != "full"
    # a scale that keeps the sums of fp16 far from its largest number, in plain torch too
    scale, tokens = (0.05, 40) if name == "hla3" else (0.05, 150)
    base = Problem(
        name, mask, B=1, T=tokens, H=4, G=2, K=16, V=16, gates="BTH" if streaming else "none", scale=scale, dtype=dtype
    )
    return replace(base, state=False, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "mask"), KINDS)
def test_at_most_twice_the_error_of_plain_torch(name: str, mask: str, dtype: torch.dtype) -> None:
    gates = ("none",) if mask == "full" else ("none", "H", "BTH")
    for gate_form in gates:
        for normalize in (False, True):
            problem = _problem(name, mask, dtype, gates=gate_form, normalize=normalize)
            tensors = draw(problem)
            want = oracle(problem, tensors)
            plain = oracle(problem, tensors, quadratic, dtype=dtype)
            got = run(problem, tensors, getattr(hla_dist, name))
            for key in want:
                error = relative_error(plain[key], want[key])
                if want[key].numel() <= 4:  # so few numbers can be near by luck: the worst of several draws
                    error = max(error, *(_error_of_plain_torch(replace(problem, seed=s), key) for s in (1, 2, 3)))
                assert_close(f"{key} of {problem}", got[key], want[key], LOW_PRECISION_FACTOR * error)


def _error_of_plain_torch(problem: Problem, key: str) -> float:
    tensors = draw(problem)
    plain = oracle(problem, tensors, quadratic, dtype=problem.dtype)
    return relative_error(plain[key], oracle(problem, tensors)[key])


def test_a_tensor_of_few_numbers_is_judged_by_several_draws() -> None:
    """Of the key term's gradients, a number per head: one draw's error is luck, that of several hardly changes."""
    problem = replace(_problem("hla2", "causal", torch.bfloat16, H=2, key_term="H"), T=40)
    one_draw, several = [], []
    for seed in range(6):
        one = replace(problem, seed=seed)
        tensors = draw(one)
        want, plain = (oracle(one, tensors, quadratic, dtype=x) for x in (torch.float64, one.dtype))
        size = want["dskip"].norm().item()
        one_draw.append(relative_error(plain["dskip"], want["dskip"]) * size)
        several.append(errors_of_plain_torch(one, tensors, want)["dskip"] * size)
    assert max(several) / min(several) < max(one_draw) / min(one_draw) / 1.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "mask"), [k for k in KINDS if k[1] != "full"])
def test_states_are_float32_and_outputs_keep_the_dtype(name: str, mask: str, dtype: torch.dtype) -> None:
    problem = replace(_problem(name, mask, dtype), state=True, gates="H")
    tensors = draw(problem)
    got = run(problem, tensors, getattr(hla_dist, name))  # also checks every gradient's dtype
    assert got["out"].dtype == dtype
    for field in problem.state_names:
        assert got[field].dtype == torch.float32


@pytest.mark.parametrize(("name", "mask"), KINDS)
def test_accumulates_in_float32(name: str, mask: str) -> None:
    """A sum of 4096 bf16 ones is exact: in bf16 it would stop at 256."""
    ones = torch.ones(1, 4096, 1, 1, dtype=torch.bfloat16)
    out, _ = getattr(hla_dist, name)(ones, ones, ones, **mask_options(mask))
    n = 4096
    want = {
        ("linear_attention", "causal"): n,
        ("hla2", "causal"): n * (n + 1) // 2,
        ("ahla", "causal"): n * (n + 1) // 2,
        ("hla3", "causal"): n * (n + 1) * (2 * n + 1) // 6,
        ("hla2", "prefix"): n**2,
        ("hla2", "paper"): n * (n + 1) // 2,
        ("linear_attention", "full"): n,
        ("hla2", "full"): n**2,
        ("ahla", "full"): n**2,
        ("hla3", "full"): n**3,
    }[name, mask]
    assert out[0, -1, 0, 0].item() == torch.tensor(float(want)).bfloat16().item()
