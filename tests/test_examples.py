"""The examples of docs/examples: each runs, learns, and prints one line; what they claim of their operators holds."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.harness import shifted
from tests.tolerances import SECOND_DIFFERENCES, TRANSPORT

FOLDER = Path(__file__).parents[1] / "docs" / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_help_says_what_it_does(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        example(name).main(["--help"])
    assert "--steps" in capsys.readouterr().out


def test_transport_is_attention_whose_rows_and_columns_sum_to_one() -> None:
    """LOTFormer's weights, formed; the example's linear attention averages values by them."""
    module = example("pivots")
    torch.manual_seed(shifted(0))
    mix = module.ByTransport().double()
    q, k, v = torch.randn(3, 2, module.TOKENS, module.WIDTH, dtype=torch.float64)
    left, right = (module.transport(x, mix.pivots) for x in (q, k))
    weights = module.PIVOTS * module.TOKENS * left @ right.mT
    torch.testing.assert_close(mix(q, k, v), weights @ v)
    ones = torch.ones(2, module.TOKENS, dtype=torch.float64)
    torch.testing.assert_close(weights.sum(-1), ones, rtol=0, atol=TRANSPORT)
    torch.testing.assert_close(weights.sum(-2), ones, rtol=0, atol=TRANSPORT)


def test_fields_solve_poissons_equation() -> None:
    """By differences of second order around a point."""
    module, h = example("poisson"), 1e-4
    steps = torch.tensor([[0, 0], [h, 0], [-h, 0], [0, h], [0, -h]], dtype=torch.float64)
    weights = torch.randn(1, module.MODES, module.MODES, dtype=torch.float64)
    f, u = module.solution((torch.tensor([0.3, 0.6]) + steps)[None], weights)
    laplacian = (u[0, 1:].sum() - 4 * u[0, 0]) / h**2
    torch.testing.assert_close(-laplacian, f[0, 0], rtol=SECOND_DIFFERENCES, atol=SECOND_DIFFERENCES)


def test_digits_without_scikit_learn_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit, match=r"digits.py: expected scikit-learn \(pip install '.\[examples\]'\)"):
        example("digits").main(["--steps", "1"])


@pytest.mark.slow
def test_poisson(capsys: pytest.CaptureFixture[str]) -> None:
    results = example("poisson").main([])
    assert results["near + far"] < 0.42 < results["near"] < 1
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.slow
def test_pivots(capsys: pytest.CaptureFixture[str]) -> None:
    results = example("pivots").main([])
    assert results["transport"] > 0.8 > 0.6 > results["no mixing"]
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.slow
def test_digits(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn, of the extra 'examples', is not installed")
    results = example("digits").main([])
    assert results["hla2"] > 0.9 and results["linear_attention"] > 0.9 and results["no mixing"] < 0.5
    assert capsys.readouterr().out.count("\n") == 1
