"""Runs lm-evaluation-harness on a saved folder, as docs/huggingface.md says, and compares its log-likelihoods.

The harness brings many packages along, so it is no part of the test suite:

pip install lm-eval && python -m tests.huggingface.lm_evaluation
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from hla_dist.huggingface import HLAConfig, HLAForCausalLM, byte_tokenizer
from tests.harness import shifted

PREFIX = 10  # a newline: a byte tokenizer has no token of its own for the beginning of a text
QUESTIONS = [("count: one,", 1), ("count: one, two, three, four,", 0), ("x", 1)]
CHOICES = [" one", " two"]
TASK = {
    "task": "count", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
    "doc_to_text": "{{text}}", "target_delimiter": "", "doc_to_choice": CHOICES, "doc_to_target": "label",
    "metric_list": [{"metric": "acc"}],
}  # fmt: skip


def log_likelihood(model: HLAForCausalLM, text: str, choice: str) -> float:
    """Sum of the log probabilities of ``choice`` after ``text``."""
    ids = torch.tensor([[*text.encode(), *choice.encode()]])
    with torch.no_grad():
        logs = model(ids).logits.log_softmax(-1)[0, :-1]
    return logs.gather(1, ids[0, 1:, None])[-len(choice) :].sum().item()


def main() -> int:
    """Return 0 if every log-likelihood is the model's own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(shifted(0))
        model = HLAForCausalLM(HLAConfig(hidden_size=32, num_layers=2, num_heads=2, pad_token_id=0)).eval()
        model.save_pretrained(folder / "model")
        byte_tokenizer().save_pretrained(folder / "model")
        lines = [json.dumps({"text": text, "label": label}) for text, label in QUESTIONS]
        (folder / "count.jsonl").write_text("\n".join(lines))
        task = TASK | {"dataset_kwargs": {"data_files": {"test": str(folder / "count.jsonl")}}}
        (folder / "count.yaml").write_text(json.dumps(task))
        found = simple_evaluate(
            model="hf", tasks=["count"], task_manager=TaskManager(include_path=str(folder)), batch_size=4, device="cpu",
            model_args=f"pretrained={folder / 'model'},trust_remote_code=True,prefix_token_id={PREFIX},dtype=float32,"
            "max_length=512",
        )  # fmt: skip
    assert found is not None
    samples = sorted(found["samples"]["count"], key=lambda sample: sample["doc_id"])
    worst = 0.0
    for (text, _), sample in zip(QUESTIONS, samples, strict=True):
        for choice, answer in zip(CHOICES, sample["filtered_resps"], strict=True):
            worst = max(worst, abs(float(answer[0]) - log_likelihood(model, text, choice)))
    print(f"{len(samples)} questions, largest difference of a log-likelihood {worst:.1e}")
    return int(not worst < 1e-3)


if __name__ == "__main__":
    sys.exit(main())
