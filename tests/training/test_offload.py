"""Offloading: the same numbers through host memory, only what is worth it, and refused where there is no other memory.

The copies run here on a CPU, through the hooks and the policy that a GPU would use (FSDP2's in test_mesh.py): how much
of a GPU's memory that spares has not been measured.
"""

from __future__ import annotations

import pytest
import torch

from hla_dist.models import LanguageModel, ModelConfig
from hla_dist.processes.failure import UserError
from hla_dist.training import offload
from hla_dist.training.config import parse
from hla_dist.training.estimate import planned
from tests.harness import shifted

MODEL = ModelConfig(vocab_size=50, hidden_size=32, num_layers=2, num_heads=2)


@pytest.mark.parametrize("policy", ["none", "layer", "sublayer"])
def test_gradients_keep_their_bits_and_parameters_their_place(monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    torch.manual_seed(shifted(0))
    model = LanguageModel(MODEL)
    model.activation_checkpointing = policy
    tokens, labels = torch.randint(50, (2, 1, 1500))
    model(tokens, labels=labels).backward()
    want = [p.grad.clone() for p in model.parameters()]
    for least in (1, offload.LEAST):
        monkeypatch.setattr(offload, "LEAST", least)
        model.zero_grad()
        hooks = offload.SavedOnHost()
        kept: list[torch.Tensor] = []
        pack = hooks.pack_hook
        hooks.pack_hook = lambda x, pack=pack, kept=kept: kept.append(x) or pack(x)  # type: ignore[method-assign]
        with hooks:
            loss = model(tokens, labels=labels)
        loss.backward()
        assert all(torch.equal(p.grad, gradient) for p, gradient in zip(model.parameters(), want, strict=True))
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        moved = [x for x in kept if x.nbytes >= least and x.untyped_storage().data_ptr() not in own]
        assert len(moved) < len(kept)
        assert hooks.nbytes == sum(x.nbytes for x in moved) > 0
        if policy == "layer" and least == 1:  # tokens and labels, each block's input, the last one's output
            assert hooks.nbytes == 1500 * (2 * 8 + 3 * 32 * 4)


def test_without_another_memory_it_is_refused() -> None:
    with pytest.raises(UserError, match="--offload-activations: expected a GPU, whose memory it saves, got the device"):
        parse(["--offload-activations", "--device", "cpu"])
    with pytest.raises(UserError, match="--offload-parameters: expected a GPU"):
        parse(["--offload-parameters", "--dp-shard", "2", "--device", "cpu"])
    with pytest.raises(UserError, match="--offload-parameters: expected --dp-shard beside it"):
        parse(["--offload-parameters"])
    with pytest.raises(UserError, match="--dry-run: expected --offload-activations False, got True"):
        planned(parse(["--dry-run", "--offload-activations"]), 1)
