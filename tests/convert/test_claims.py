"""What conversions promise, on small models that have learned a text: slow, and each a few seconds."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hla_dist.convert import RECIPES, distill, grow, perplexity, swap, transfer, usage
from hla_dist.models import LanguageModel, ModelConfig
from tests.convert.test_convert import rows, teacher
from tests.harness import assert_close, shifted
from tests.tolerances import FLOAT64

SYMBOLS, TOPIC, WINDOW = 24, 3, 6


def topics(count: int, tokens: int = 48, seed: int = 0) -> Tensor:
    """Rows of a few symbols each: the more of a row is seen, the better they are known."""
    random = torch.Generator().manual_seed(shifted(seed))
    chosen = torch.stack([torch.randperm(SYMBOLS, generator=random)[:TOPIC] for _ in range(count)])
    return chosen.gather(1, torch.randint(TOPIC, (count, tokens), generator=random))


@pytest.fixture(scope="module")
def learned() -> LanguageModel:
    """A softmax model that has learned to look at all of its row."""
    torch.manual_seed(shifted(4))
    softmax = {"rope_theta": 1e4, "qk_norm": None}
    sizes = dict(vocab_size=SYMBOLS, hidden_size=32, num_layers=2, num_heads=2)
    model = LanguageModel(ModelConfig(**sizes, pattern="softmax", softmax=softmax))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.0)
    for batch in topics(16 * 120).split(16):
        loss = model(batch[:, :-1], labels=batch[:, 1:]) / batch[:, 1:].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert perplexity(model, topics(8, seed=1)) < 0.4 * SYMBOLS
    return model.eval()


def converted(model: LanguageModel, recipe: str, steps: int, **memory: Any) -> LanguageModel:
    """By a recipe, with a small window."""
    stages = RECIPES[recipe]
    student = swap(model, memory={**stages.swap["memory"], "window": WINDOW, **memory})
    if stages.transfer is not None:
        transfer(student, model, topics(40, seed=2), steps=steps, **stages.transfer)
    distill(student, topics(40, seed=2), teacher=model, steps=steps, batch=8, **stages.distill)
    return student


@pytest.mark.slow
def test_tptt_is_the_pretrained_model_at_gate_0_and_learns_at_a_half(learned: LanguageModel) -> None:
    """Streaming and beams are the full forward: tests/huggingface/test_generation.py, tests/nn."""
    held_out = topics(8, seed=1)
    shut = swap(learned, memory={"window": 48, "memory": "all", "join": "token", "gate_bias": -200.0})
    with torch.no_grad():
        for block in shut.blocks:
            block.attention.gate_proj.weight.zero_()
        want = copy.deepcopy(learned).double()(held_out)
        assert_close("logits", shut.double()(held_out), want, FLOAT64)
    used = usage(converted(learned, "tptt", 40, gate_bias=0.0), held_out)
    assert used.whole < 1.1 * perplexity(learned, held_out)
    assert all(0.3 < share < 0.7 for shares in used.shares.values() for share in shares)


@pytest.mark.slow
def test_a_memory_of_everything_that_trained_without_its_window_can_do_without_it(learned: LanguageModel) -> None:
    held_out = topics(8, seed=1)
    before, everything = (usage(converted(learned, name, 15), held_out) for name in ("lolcats", "hedgecats"))
    lost = [used.without_window - used.whole for used in (before, everything)]
    assert 0 < lost[1] < 0.5 * lost[0], lost


@pytest.mark.slow
def test_windows_dropped_on_a_schedule_are_leaned_on_less(learned: LanguageModel) -> None:
    """By the same training otherwise; the whole model is a little worse for it after so few steps."""
    held_out, lost = topics(8, seed=1), []
    for schedule in (None, (0.9, 0.1)):
        student = swap(learned, memory={"window": WINDOW, "memory": "all"})
        options: dict[str, Any] = dict(teacher=learned, kl=1.0, lr=3e-3, window_dropout=schedule)
        distill(student, topics(200, seed=2), steps=40, batch=8, **options)
        used = usage(student, held_out)
        lost.append(used.without_window - used.whole)
    assert lost[1] < 0.95 * lost[0], lost


def test_radlads_lowers_each_stages_loss_at_every_step() -> None:
    """RADLADS' second and third stage, on all rows at once so that no step differs in its text."""
    model, recipe, text = teacher(softmax={"rope_theta": 100.0, "qk_norm": None}), RECIPES["radlads"], rows(4)
    student = swap(model, **recipe.swap)
    transfer(student, model, text, steps=2, **recipe.transfer or {})
    losses = distill(student, text, teacher=model, steps=10, batch=len(text), **recipe.distill)
    assert all(after < before for before, after in pairwise(losses)), losses
    joined = text.reshape(1, -1)  # the third stage, of next tokens alone
    before = perplexity(student, joined)
    losses = distill(student, joined, steps=10, **recipe.longer or {})
    assert all(after < before for before, after in pairwise(losses)), losses
    assert perplexity(student, joined) < before


@pytest.mark.slow
def test_infini_attention_recalls_a_pass_key_sixteen_windows_back() -> None:
    """Better than its window alone, which cannot see that far: chance is an eighth."""
    keys, window, ask = 8, 4, 16
    right = []
    for mixer in (
        {"pattern": "memory", "memory": {"join": "gate", "features": "elu+1", "window": window}},
        {"pattern": "softmax", "softmax": {"window": window}},
    ):
        torch.manual_seed(shifted(5))
        model = LanguageModel(ModelConfig(vocab_size=17, hidden_size=32, num_layers=2, num_heads=2, **mixer))
        optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
        for _ in range(140):
            key = torch.randint(keys, (32, 1))
            fill = torch.randint(keys, ask, (32, 16 * window))
            text = torch.cat([key, fill, torch.full((32, 1), ask)], 1)
            logits = model(text)[:, -1]
            loss = F.cross_entropy(logits, key[:, 0])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        right.append(float((logits.argmax(-1) == key[:, 0]).float().mean()))
    assert right[0] > 0.7 and right[1] < 0.4, right


class Recall(nn.Module):
    """Pairs are shown, then keys are asked for: what one layer's state holds is what is recalled."""

    def __init__(self, symbols: int, config: ModelConfig) -> None:
        super().__init__()
        self.symbols, self.model = symbols, LanguageModel(config)
        self.key, self.value = nn.Embedding(symbols, config.hidden_size), nn.Embedding(symbols + 1, config.hidden_size)
        self.read = nn.Linear(config.hidden_size, symbols)

    def recalled(self, steps: int, seed: int) -> float:
        """Train for so many steps; the share of right answers in the last ones."""
        random = torch.Generator().manual_seed(shifted(seed))
        optimizer = torch.optim.AdamW(self.parameters(), 3e-3)
        right, pairs = [], self.symbols // 2
        for _ in range(steps):
            keys = torch.stack([torch.randperm(self.symbols, generator=random)[:pairs] for _ in range(32)])
            values = torch.randint(self.symbols, (32, pairs), generator=random)
            order = torch.stack([torch.randperm(pairs, generator=random) for _ in range(32)])
            shown = self.key(torch.cat([keys, keys.gather(1, order)], 1))
            x = shown + self.value(torch.cat([values, torch.full_like(values, self.symbols)], 1))
            logits = self.read(self.model.features(x)[0][:, pairs:])
            answers = values.gather(1, order)
            loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            right.append(float((logits.argmax(-1) == answers).float().mean()))
        return sum(right[-20:]) / len(right[-20:])


@pytest.mark.slow
def test_a_grown_state_recalls_more_after_training() -> None:
    torch.manual_seed(shifted(6))
    small = dict(hidden_size=48, num_layers=1, num_heads=1, head_dim=6, op="linear_attention", mlp_size=48)
    task = Recall(32, ModelConfig(**small, attention={"decay": None, "value_dim": 48}))
    task.recalled(200, seed=7)
    grown = copy.deepcopy(task)
    grown.model = grow(grown.model, 24)
    assert grown.recalled(200, seed=8) > 1.1 * task.recalled(200, seed=8)
