"""Training through transformers and peft: Trainer learns, resumes and evaluates; LoRA sits on the projections."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hla_dist.huggingface import HLAConfig, HLAForCausalLM
from hla_dist.huggingface.folders import main
from tests.harness import assert_bitwise, assert_close, shifted
from tests.huggingface.models import VOCABULARY, model, tokens
from tests.tolerances import FLOAT64


class Counting(Dataset):
    """Sequences that count upwards from a start of their own, modulo the vocabulary, of different lengths."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        length = 10 + index % 7
        ids = 1 + (torch.arange(length) + 5 * index) % (VOCABULARY - 1)
        return {"input_ids": ids, "labels": ids.clone()}


def padded(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch with padding at the right, as the usual collators make it."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        ids[i, :n], labels[i, :n], mask[i, :n] = row["input_ids"], row["labels"], 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def trainer(hla: torch.nn.Module, out: Path, **options) -> Trainer:
    collator = options.pop("collator", padded)
    arguments = TrainingArguments(
        str(out), **{"max_steps": 40, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "save_strategy": "no",
                     "report_to": "none", "logging_steps": 10, "disable_tqdm": True, "use_cpu": True, **options}
    )  # fmt: skip
    return Trainer(hla, arguments, data_collator=collator, train_dataset=Counting(), eval_dataset=Counting())


def small() -> HLAForCausalLM:
    torch.manual_seed(shifted(0))
    return HLAForCausalLM(HLAConfig(vocab_size=VOCABULARY, hidden_size=32, num_layers=2, num_heads=2, pad_token_id=0))


def test_trainer_learns_resumes_and_evaluates(tmp_path: Path):
    hla = small()
    whole = trainer(hla, tmp_path, save_strategy="steps", save_steps=20, gradient_accumulation_steps=2)
    first = whole.evaluate()["eval_loss"]
    whole.train()
    last = whole.evaluate()["eval_loss"]
    assert first > 3.5 and last < 0.5, (first, last)
    start = torch.tensor([[7, 8, 9]])
    assert hla.eval().generate(start, max_new_tokens=6, do_sample=False)[0].tolist() == list(range(7, 16))
    other = small()
    half = str(tmp_path / "checkpoint-20")
    trainer(other, tmp_path, gradient_accumulation_steps=2).train(resume_from_checkpoint=half)
    for (name, one), two in zip(hla.named_parameters(), other.parameters(), strict=True):
        assert_bitwise(name, two, one)


def test_a_trainer_of_an_earlier_version_resumes_with_its_moments(tmp_path: Path):
    """Scales of heads' norms had names that decay: a trainer that goes by those names stands for it."""
    options = dict(weight_decay=0.1, save_strategy="steps", save_steps=2, max_steps=2)
    hla = model(attention={"qk_norm": "rms"}, pattern="hla2,softmax")
    one = trainer(hla, tmp_path, **options)
    names = [name for name, p in hla.named_parameters() if p.dim() > 1 or re.search(r"\.[qko]_norm\.", name)]
    one.get_decay_parameter_names = lambda _: names  # type: ignore[method-assign]
    one.train()
    folder = tmp_path / "checkpoint-2"
    tensors = load_file(folder / "model.safetensors")
    earlier = {re.sub(r"([qko])_norm\.weight", r"\1_weight", name): x for name, x in tensors.items()}
    save_file(earlier, folder / "model.safetensors", {"format": "pt"})

    other = model(attention={"qk_norm": "rms"}, pattern="hla2,softmax")
    with pytest.warns(UserWarning, match="python -m hla_dist.huggingface.folders optimizer FOLDER"), \
         pytest.raises(ValueError, match="parameter group that doesn't match"):  # fmt: skip
        trainer(other, tmp_path, **options | {"max_steps": 3}).train(resume_from_checkpoint=str(folder))
    assert main(["optimizer", str(folder)]) == 0
    assert main(["optimizer", str(folder)]) == 1  # it is in today's groups
    two = trainer(other, tmp_path, **options | {"max_steps": 3})
    moments = []

    class Look(TrainerCallback):
        def on_train_begin(self, arguments, state, control, optimizer=None, **more):
            assert optimizer is not None
            moments.extend({k: x.clone() for k, x in optimizer.state[p].items()} for p in other.parameters())

    two.add_callback(Look())
    with pytest.warns(UserWarning, match="an earlier version's names"):
        two.train(resume_from_checkpoint=str(folder))
    for name, got, want in zip(dict(hla.named_parameters()), moments, hla.parameters(), strict=True):
        assert_bitwise(name, got["exp_avg"], one.optimizer.state[want]["exp_avg"])


def test_weight_decay_spares_every_vector(tmp_path: Path):
    """The Trainer goes by names; those of norms and gates say what they are."""
    for attention in ({}, {"qk_norm": "rms", "key_term": True}, {"decay": "head", "conv": 4}):
        hla = model(attention=attention, pattern="hla2,softmax")
        decayed = set(trainer(hla, tmp_path).get_decay_parameter_names(hla))
        assert decayed - {"lm_head.weight"} == {name for name, p in hla.named_parameters() if p.dim() > 1}


def test_packing_without_padding_and_checkpointing_train_the_same_task(tmp_path: Path):
    """DataCollatorWithFlattening: one row of several documents a batch, each with its own state."""
    losses = []
    for collator in (padded, DataCollatorWithFlattening(), DataCollatorWithFlattening(return_flash_attn_kwargs=True)):
        hla = small().double()
        one = trainer(hla, tmp_path, max_steps=3, logging_steps=1, collator=collator,
                      activation_checkpointing=collator is not padded)  # fmt: skip
        one.train()
        losses.append([entry["loss"] for entry in one.state.log_history if "loss" in entry])
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[2] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize(
    "changes", [{"attention": {"conv": 4}}, {"pattern": "memory", "memory": {"window": 3}}], ids=str
)
def test_lora_on_the_projections(changes: dict[str, Any], tmp_path: Path):
    hla, ids = model(**changes), tokens(2, 9)
    before = hla(ids).logits.detach()
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up", "down"]
    projections += [] if "pattern" in changes else ["g_proj"]
    lora = get_peft_model(hla, LoraConfig(r=2, target_modules=projections, task_type="CAUSAL_LM")).double()
    assert_close("logits", lora(ids).logits, before, FLOAT64)
    trained = {name for name, p in lora.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * len(projections) and all("lora_" in name for name in trained)
    frozen = {name: p.clone() for name, p in lora.named_parameters() if not p.requires_grad}
    trainer(lora, tmp_path, max_steps=5).train()
    assert all(torch.equal(p, frozen[name]) for name, p in lora.named_parameters() if name in frozen)
    lora.eval()
    after = lora(ids).logits.detach()
    assert (after - before).norm() > 0.01 * before.norm()
    got = lora.generate(ids, max_new_tokens=5, do_sample=False)
    lora.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(model(**changes), tmp_path / "adapter").double()
    assert_close("logits", again(ids).logits, after, FLOAT64)
    merged = again.merge_and_unload()
    assert type(merged) is HLAForCausalLM
    assert_close("logits", merged(ids).logits, after, FLOAT64)
    assert torch.equal(merged.generate(ids, max_new_tokens=5, do_sample=False), got)


def test_an_embedding_trained_with_lora_is_merged_saved_and_loaded(tmp_path: Path):
    hla, ids = model(), tokens(2, 9)
    options = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embedding"], task_type="CAUSAL_LM")
    lora = get_peft_model(hla, options).double().train()
    trainer(lora, tmp_path, max_steps=3).train()
    want = lora.eval()(ids).logits.detach()
    merged = lora.merge_and_unload()
    assert not merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64)
    assert_close("logits", again(ids).logits, want, FLOAT64)


def test_experts_train_generate_and_are_saved(tmp_path: Path):
    """The loss holds the balance loss, per label, of the tokens that are none of padding; evaluation's does not."""
    hla = model(experts=4, balance=0.5)
    batch = padded([Counting()[index] for index in range(3)])
    entropy = hla(**batch).loss
    assert hla(**batch).aux_loss is None
    output = hla.train()(**batch)
    assert 0.4 * 33 < output.aux_loss < 0.9 * 33  # 33 tokens, weight 0.5
    assert_close("loss", output.loss - output.aux_loss / 30, entropy, FLOAT64)
    assert_close("loss", hla(**batch, num_items_in_batch=60).loss * 2, output.loss, FLOAT64)
    output.loss.backward()
    assert all(p.grad is not None for p in hla.parameters())
    hla.eval().save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for (name, one), two in zip(hla.named_parameters(), again.parameters(), strict=True):
        assert_bitwise(name, two, one)
    start = tokens(2, 5)
    want = hla.generate(start, max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(hla.generate(start, max_new_tokens=5, do_sample=False), want)
