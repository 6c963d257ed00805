"""Runs transformers' own common model tests on ours; they come with its source archive, not with its wheel.

pip download --no-deps --no-binary transformers transformers==5.23.0 && tar xzf transformers-5.23.0.tar.gz
pip install parameterized && python -m tests.huggingface.transformers_common transformers-5.23.0
"""

from __future__ import annotations

import importlib
import sys
import types
import unittest
from pathlib import Path
from typing import Any

import torch

# Not in the archive. Ours inherit empty ones: the tests of generation are mirrored in test_generation.py.
ABSENT = {
    "exporters.test_export": {"ExportTesterMixin": object},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
}
CHECKPOINTING = "asks for transformers' GradientCheckpointingLayer; the network has its own checkpointing"
NOT_OURS = {
    "test_gradient_checkpointing_enable_disable": CHECKPOINTING,
    "test_training_gradient_checkpointing": CHECKPOINTING,
    "test_training_gradient_checkpointing_use_reentrant_false": CHECKPOINTING,
    "test_training_gradient_checkpointing_use_reentrant_true": CHECKPOINTING,
    "test_peft_gradient_checkpointing_enable_disable": CHECKPOINTING,
    "test_can_set_attention_dynamically": "asks for transformers' own words of refusal; ours say what to use instead",
    "test_reverse_loading_mapping": "asks that older names are saved again; ours get those of today",
    "test_generation_tester_mixin_inheritance": "the archive has no GenerationTesterMixin",
}


def load(archive: Path) -> types.ModuleType:
    """The archive's ``tests.test_modeling_common``, under another name than our own ``tests``."""
    package = types.ModuleType("upstream")
    package.__path__ = [str(archive / "tests")]
    sys.modules["upstream"] = package
    for name, contents in ABSENT.items():
        sys.modules[f"upstream.{name.split('.')[0]}"] = types.ModuleType(name)
        sys.modules[f"upstream.{name}"] = types.ModuleType(name)
        vars(sys.modules[f"upstream.{name}"]).update(contents)
    return importlib.import_module("upstream.test_modeling_common")


def build(common: Any) -> type[unittest.TestCase]:
    """The common tests for our two classes."""
    from transformers.models.auto import modeling_auto

    from hla_dist.huggingface import HLAConfig, HLAForCausalLM, HLAModel

    # the tests ask these tables, which list transformers' own models, which inputs a class takes
    modeling_auto.MODEL_MAPPING_NAMES["hla"] = "HLAModel"
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["hla"] = "HLAForCausalLM"

    class Tester:
        batch_size, seq_length, hidden_size, num_hidden_layers, num_attention_heads = 3, 7, 32, 2, 2
        vocab_size, is_training = 99, True

        def get_config(self) -> HLAConfig:
            return HLAConfig(vocab_size=99, hidden_size=32, num_layers=2, num_heads=2, pad_token_id=0, bos_token_id=1,
                             eos_token_id=2, attention={"rope_theta": 1e4})  # fmt: skip

        def prepare_config_and_inputs_for_common(self) -> tuple[HLAConfig, dict[str, torch.Tensor]]:
            mask = torch.ones(3, 7, dtype=torch.long)
            return self.get_config(), {"input_ids": common.ids_tensor([3, 7], 99), "attention_mask": mask}

    class HLATest(common.ModelTesterMixin, unittest.TestCase):
        all_model_classes = (HLAModel, HLAForCausalLM)
        has_attentions = False

        def setUp(self) -> None:
            if self._testMethodName in NOT_OURS:
                self.skipTest(NOT_OURS[self._testMethodName])
            self.model_tester = Tester()

    return HLATest


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "tests/test_modeling_common.py").is_file():
        sys.exit("expected the folder of transformers' unpacked source archive (see the head of this file)")
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(build(load(Path(sys.argv[1]))))
    sys.exit(not unittest.TextTestRunner(verbosity=1).run(suite).wasSuccessful())
