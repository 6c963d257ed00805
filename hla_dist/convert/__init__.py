"""Pretrained softmax models into models of this library: swap the mixers, teach them, tell what they are used for.

student = swap(model, memory={"window": 64})
transfer(student, model, rows)          layer by layer, feature maps and gates alone
distill(student, rows)                  all layers together, by adapters or whole
usage(student, held_out)                with and without memory and window
grow(model, head_dim)                   larger states, the function unchanged
"""

from hla_dist.convert.distill import distill
from hla_dist.convert.grow import grow
from hla_dist.convert.recipes import RECIPES, Recipe
from hla_dist.convert.swap import swap
from hla_dist.convert.transfer import LayerError, transfer
from hla_dist.convert.usage import Usage, perplexity, usage

__all__ = ["RECIPES", "LayerError", "Recipe", "Usage", "distill", "grow", "perplexity", "swap", "transfer", "usage"]
