"""launch/generate.py with a pretrained folder: tokenizer, chat template, and the token that ends an answer."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from hla_dist.huggingface import byte_tokenizer
from tests.huggingface.test_pretrained import random_model

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }} {% endfor %}"


def test_a_pretrained_folder_speaks_as_in_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("generate_program", ROOT / "launch" / "generate.py")
    assert spec is not None and spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, program)
    spec.loader.exec_module(program)

    def said(*arguments: str) -> tuple[int, str, str]:
        common = ["--checkpoint", str(tmp_path), "--greedy", "--threads", "1"]
        monkeypatch.setattr(sys, "argv", ["generate.py", *common, *arguments])
        capfd.readouterr()
        return program.main(), *capfd.readouterr()

    tokenizer, reference = byte_tokenizer(), random_model("llama", {"vocab_size": 256})
    reference.generation_config.eos_token_id = None
    prompts = ["def main", "x"]
    turns = [f"[user] {prompt} " for prompt in prompts]

    def continued(text: str) -> list[int]:
        ids = torch.tensor([list(text.encode())])
        return reference.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()

    reference.save_pretrained(tmp_path)
    code, _, error = said()
    assert code == 1 and error.startswith("generate.py: error: ") and ": expected a tokenizer, got none: " in error
    assert len(error.splitlines()) == 1
    tokenizer.save_pretrained(tmp_path)
    assert said("--tokens", "12", "--prompt", prompts[0]) == (
        0, prompts[0] + tokenizer.decode(continued(prompts[0])) + "\n", "",
    )  # fmt: skip
    code, _, error = said("--chat", "--prompt", "x")
    assert code == 1 and error == "generate.py: error: --chat: expected a model with a chat template, got one without\n"

    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    end = continued(turns[0])[5]
    reference.generation_config.eos_token_id = [end]
    reference.save_pretrained(tmp_path)
    answers = []
    for prompt, turn in zip(prompts, turns, strict=True):
        tokens = continued(turn)
        answers.append(f"{prompt}\n{tokenizer.decode(tokens[:-1] if tokens[-1] == end else tokens)}\n")
    assert len(answers[0]) < len(prompts[0]) + 8
    assert said("--chat", "--tokens", "12", "--prompt", prompts[0])[:2] == (0, answers[0])
    both = "".join(f"--- {index + 1} of 2\n{answer}" for index, answer in enumerate(answers))
    assert said("--chat", "--tokens", "12", "--prompt", *prompts)[:2] == (0, both)
