"""Language models built from the library's layers."""

from hla_dist.models.config import SIZES, ModelConfig
from hla_dist.models.language_model import LanguageModel

__all__ = ["SIZES", "LanguageModel", "ModelConfig"]
