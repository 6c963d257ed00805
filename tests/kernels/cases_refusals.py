"""What the kernels refuse, by its text. Run interpreted."""

from __future__ import annotations

import pytest
import torch

import hla_dist
from hla_kernels import device, tiles
from tests.harness import raises_value_error

assert device.INTERPRETED, "run by test_interpreter.py, with TRITON_INTERPRET=1"


def _inputs(K: int = 4, V: int = 4, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    return tuple(torch.zeros(1, 3, 1, width, dtype=dtype) for width in (K, K, V))


def test_bfloat16_in_the_interpreter() -> None:
    with raises_value_error("q: expected float32 or float16", "interpreter", "bfloat16"):
        hla_dist.hla2(*_inputs(dtype=torch.bfloat16), backend="triton")


def test_float64() -> None:
    with raises_value_error("q: expected bfloat16, float16 or float32", "triton", "float64"):
        hla_dist.hla2(*_inputs(dtype=torch.float64), backend="triton")


@pytest.mark.parametrize(("K", "V", "name"), [(257, 4, "q"), (4, 257, "v")])
def test_too_many_columns(K: int, V: int, name: str) -> None:
    with raises_value_error(f"{name}: expected at most 256 columns", "triton", "got 257"):
        hla_dist.hla2(*_inputs(K, V), backend="triton")


def test_the_column_of_ones_counts() -> None:
    with raises_value_error("v: expected at most 256 columns", "column of ones", "got 257"):
        hla_dist.hla2(*_inputs(4, 256), normalize=True, backend="triton")


def test_options_without_kernels() -> None:
    with raises_value_error("backend:", "mask='full'", "'triton'"):
        hla_dist.hla2(*_inputs(), mask="full", backend="triton")
    with raises_value_error("backend:", "hla2_paper", "'triton'"):
        hla_dist.hla2(*_inputs(), decay_form="paper", backend="triton")
    with raises_value_error("chunk_size: expected None", "triton", "got 64"):
        hla_dist.hla2(*_inputs(), chunk_size=64, backend="triton")


def test_an_entry_proven_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the running version and architecture, and for no other."""
    q, k, v = _inputs()
    for entry, refused in (
        (("interpreter", torch.float32, 64, "99.0.0"), True),
        (("interpreter", torch.float32, 64, "3.6.0"), False),
        (("interpreter", torch.float16, 64, "99.0.0"), False),
        (("interpreter", torch.float32, 128, "99.0.0"), False),
        (("sm_90", torch.float32, 64, "99.0.0"), False),
    ):
        monkeypatch.setattr(tiles, "WRONG", (entry,))
        if refused:
            with raises_value_error("backend:", "Triton", "interpreter", "are wrong", "99.0.0"):
                hla_dist.hla2(q, k, v, backend="triton")
        else:
            hla_dist.hla2(q, k, v, backend="triton")


def test_auto_stays_torch_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args, **kwargs):
        raise AssertionError("a kernel was launched")

    monkeypatch.setattr(device, "_launcher", fail)
    hla_dist.hla2(*_inputs())
    with pytest.raises(AssertionError, match="a kernel was launched"):
        hla_dist.hla2(*_inputs(), backend="triton")
