"""The language model as a transformers model: ``import hla_dist.huggingface`` registers it with the Auto classes.

    model = AutoModelForCausalLM.from_pretrained(DIR)        config.json with model_type "hla"

Needs the extra ``hf``; nothing else in the library imports transformers. See docs/huggingface.md.
"""

try:
    import transformers
except ImportError as exc:
    raise ImportError(
        "hla_dist.huggingface needs transformers (Python 3.11 or later): pip install 'hla-dist[hf]'"
    ) from exc
if int(transformers.__version__.split(".")[0]) < 5:
    raise ImportError(
        f"hla_dist.huggingface needs transformers 5, got {transformers.__version__}: pip install 'hla-dist[hf]'"
    )

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from hla_dist.huggingface.cache import HLACache
from hla_dist.huggingface.configuration import HLAConfig
from hla_dist.huggingface.modeling import (
    HLAForCausalLM,
    HLAForSequenceClassification,
    HLAForTokenClassification,
    HLAModel,
)
from hla_dist.huggingface.parameters import from_huggingface, to_huggingface
from hla_dist.huggingface.pretrained import load_softmax
from hla_dist.huggingface.tokenizer import byte_tokenizer

__all__ = [
    "HLACache",
    "HLAConfig",
    "HLAForCausalLM",
    "HLAForSequenceClassification",
    "HLAForTokenClassification",
    "HLAModel",
    "byte_tokenizer",
    "from_huggingface",
    "load_softmax",
    "to_huggingface",
]

AutoConfig.register("hla", HLAConfig, exist_ok=True)
AutoModel.register(HLAConfig, HLAModel, exist_ok=True)
AutoModelForCausalLM.register(HLAConfig, HLAForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(HLAConfig, HLAForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(HLAConfig, HLAForTokenClassification, exist_ok=True)
